"""Templates from strangers: what they may do they do as in jinja2's sandbox, and what they may not is refused
before it takes memory or time."""

import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bitwright.text import template_sandbox
from bitwright.text.template_sandbox import BoundedSandbox

# What templates of released models do, in one.
USUAL = """{%- set ns = namespace(turns=[], text='', calls=0) -%}
{%- if messages[0]['role'] == 'system' %}{% set system, rest = messages[0].content, messages[1:] %}
{%- else %}{% set system, rest = 'Be kind.', messages %}{% endif -%}
{%- macro show(tool, depth=0) -%}
{{ '  ' * depth ~ tool.name }}{% for key, value in tool.parameters | dictsort %} {{ key }}={{ value }}{% endfor %}
{%- endmacro -%}
{{ '<|%s|>' % 'system' }}{{ system | trim }}
{% for tool in tools or [] %}{{ show(tool, 1) }} {{ tool | tojson(indent=2) }}{{ ', ' if not loop.last }}{% endfor %}
{%- for message in rest | rejectattr('role', 'equalto', 'tool') %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{% set ns.calls = ns.calls + 1 %}{% endif %}
{%- set content %}{{ message.content | default('') | replace('\\n', ' ') }}{% endset %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{%- set ns.turns = ns.turns + [(message.role | upper, content)] %}
{%- set ns.text = ns.text ~ content[:40] %}
{{- '<|' + message['role'] + '|>' }}{{ "{}: {}".format(loop.index, content) }}{{ content | length }}
{%- endfor %}
{{ ns.turns | map(attribute=0) | unique | join('|') }} {{ ns.text | title }} {{ 'é' | tojson }} {{ 2 ** 10 }}
{{ rest | selectattr('role', 'in', ['user']) | map(attribute='content') | list | join(', ') | indent(4) }}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
SANDBOX = BoundedSandbox()
TEMPLATES = [each.from_string(USUAL) for each in (ImmutableSandboxedEnvironment(), SANDBOX)]
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": st.text(max_size=30) | st.just("a\n</think>\nb"),
    }
)
TOOL = st.fixed_dictionaries(
    {"name": st.text(max_size=5), "parameters": st.dictionaries(st.text(max_size=3), st.integers())}
)


@settings(deadline=None, max_examples=40)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=6), tools=st.none() | st.lists(TOOL))
def test_usual_templates_write_the_same(messages: Any, tools: Any) -> None:
    given = {"messages": messages, "tools": tools}
    SANDBOX.start(given)
    assert TEMPLATES[0].render(given) == TEMPLATES[1].render(given)


LOOP = "{% set ns = namespace(x=%s) %}{% for i in range(60) %}%s{% endfor %}{{ ns.x }}"
LARGE = {
    **{f"{value} {number}": LOOP.replace("%s", value, 1).replace("%s", each, 1)
       for number, (value, each) in enumerate([
           ("'a'", "{% set ns.x = ns.x ~ ns.x %}"),
           ("'a'", "{% set ns.x = ns.x + ns.x %}"),
           ("''", "{% set ns.x %}{{ ns.x }}ab{{ ns.x }}{% endset %}"),
           ("['']", "{% set ns.x = [ns.x, ns.x] %}"),
           ("{}", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
           ("()", "{% set ns.x = (ns.x, ns.x) %}"),
           ("dict()", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
           ("{}", "{% set ns.x = {'a': [ns.x.items(), ns.x.items()]} %}"),
           ("99", "{% set ns.x = ns.x * ns.x %}"),
       ])},
    "repeated": "{{ 'a' * 10**10 }}",
    "a list repeated": "{{ 10**10 * [1] }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "ljust by another name": "{% set f = 'a' | attr('ljust') %}{{ f(10**10) }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "center": "{{ 'a' | center(10**10) }}",
    "center in map": "{{ ['a'] | map('center', 10**10) | list }}",
    "center of a block": "{% filter center(10**10) %}a{% endfilter %}",
    "width": "{{ '%9999999999d' % 1 }}",
    "width of format": "{{ '{:>9999999999}'.format(1) }}",
    "width of the filter": "{{ '%.9999999999f' | format(1.5) }}",
    "width as a value": "{{ '%*d' % (10**10, 1) }}",
    "width as a value of format": "{{ '{:>{w}}'.format_map({'w': 10**10}) }}",
    "replace": "{{ ('a' * 10000).replace('a', 'b' * 9999) }}",
    "replace in map": "{{ range(9999) | map('string') | map('replace', '9', 'b' * 9999) | join }}",
    "join": "{{ range(9999) | map('string') | join('a' * 9999) }}",
    "indent": "{{ ('a\\n' * 10000) | indent(10**8) }}",
    "tojson": "{{ [1, 2] | tojson(indent=10**9) }}",
    "translate": "{{ ('a' * 10000).translate({97: 'b' * 9999}) }}",
    "data": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "data in a block": "{% set a %}{% for i in range(99999) %}xxxxxxxxxxxxx{% endfor %}{% endset %}",
    "many values": "{% set a = 'a' * 50000 %}{% for i in range(999) %}{{ (a ~ i)[:0] }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_large_values_are_not_made(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(template_sandbox, "SPARE", 1 << 16)
    template = BoundedSandbox().from_string(LARGE[name])
    tracemalloc.start()
    try:
        with pytest.raises(SecurityError, match="it (makes|writes|formats)"):
            template.render()
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% if range(999) | sum %}{% endif %}{% endfor %}",
        "{% for i in range(99999) if range(999) | sum < 0 %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
        + "{% call f() %}" * 18
        + "{% endcall %}" * 18,
    ],
)
def test_time_is_limited(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.1)
    sandbox = BoundedSandbox()
    template = sandbox.from_string(text)
    for _ in range(2):
        sandbox.start({})
        with pytest.raises(SecurityError, match=r"it takes more than 0\.1 seconds"):
            template.render()


def test_limits_grow_with_what_is_given() -> None:
    sandbox = BoundedSandbox()
    template = sandbox.from_string("{% set x = text ~ text %}{{ x }}")
    text = "a" * 5_000_000
    with pytest.raises(TemplateError):
        template.render(text=text)
    sandbox.start({"text": text})
    assert template.render(text=text) == 2 * text


@pytest.mark.parametrize("text", ["{{ lipsum() }}", "{{ 'a' | wordwrap(1) }}"])
def test_what_no_chat_needs_is_not_there(text: str) -> None:
    with pytest.raises(TemplateError):
        BoundedSandbox().from_string(text).render()
