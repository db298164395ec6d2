"""A sandbox for untrusted templates, with limits on time and memory."""

import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS = 5  # of processor time for one text; templates need thousandths of one
ALL_SECONDS = 30  # for all texts together, and beside them
TEXT_SECONDS, BYTE_SECONDS = 2e-3, 1e-5  # for each of them, and for each byte that it is made of
SPARE = 1 << 20  # bytes that a value may have
FACTOR = 4  # times what the template is given that it may have beside them
VALUES = 256  # times that is the limit for all values together that are made for one text
PRODUCT = 64  # times that is the limit for the estimated size of a product
ITEM = 16  # bytes counted for an item beside its characters
BITS = 4096  # of an integer
PRODUCTS = frozenset(
    [
        *("*", "**", "%", "center", "expandtabs", "format", "format_map", "indent", "join"),
        *("ljust", "replace", "rjust", "to_bytes", "tojson", "translate", "zfill"),
    ]
)
"""Operations whose result can be larger than their operands together: up to the product of their sizes."""
_UNUSED = ("batch", "pprint", "slice", "urlize", "wordwrap", "xmlattr")  # filters beyond that
_FORMATTING = ("%", "format", "format_map")
_LONG = (str, bytes, list, tuple)
_HOLDERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)
_NUMBERS = re.compile(r"\d+")


class SlowTemplateError(SecurityError):
    """All texts together take too long, though no single one does."""


class _Generator(CodeGenerator):
    """Generates the Python of a template so that every value it makes is reported to the environment."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self._made(super().visit_Concat, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        inner = [each for node in nodes_ if isinstance(node, nodes.Output) for each in node.nodes]
        data = sum(len(each.data) for each in inner if isinstance(each, nodes.TemplateData))
        self.writeline(f"environment.write({data})")
        super().blockvisit(nodes_, frame)

    def _made(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


class _Namespace(Namespace):
    """A namespace whose repr does not show its content."""

    def __repr__(self) -> str:
        return "<Namespace>"


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """An immutable sandbox in which a template can neither run for long nor make large values.

    Every value that a template makes is measured, with all that is in it, and before that what operators,
    methods and filters would make that can multiply. Time is looked at whenever a block is entered or a
    value made; as no value is large, nothing in between takes long. What is made between `start` and `stop`
    counts as one text; all texts together have less time than each has by itself.

    Parameters
    ----------
    filters
        More of them, by name.
    options
        As for jinja2's environments.

    Examples
    --------
    >>> sandbox = BoundedSandbox()
    >>> template = sandbox.from_string("{{ 'a' * number }}")
    >>> template.render(number=3)
    'aaa'
    >>> template.render(number=10**9)
    Traceback (most recent call last):
    jinja2.exceptions.SecurityError: it makes a value of more than 1048640 bytes
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, filters: Mapping[str, Callable[..., Any]] | None = None, **options: Any):
        @pass_context
        def finalize(_context: Context, value: Any) -> Any:
            self.write(self._size(value))
            return value

        # Nothing is computed ahead, without these checks: a finalizer with a context prevents it, too.
        super().__init__(optimized=False, finalize=finalize, **options)
        self.filters |= filters or {}
        self.filters = {
            name: self._bounded(name, each)
            for name, each in self.filters.items()
            if name not in _UNUSED
        }
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]
        self._left: float = ALL_SECONDS
        self.start({})

    def start(self, given: dict[str, Any]) -> None:
        """Allow time for another text, and memory by the size of what it is made of."""
        self._most = 1 << 62
        size = self._size(given)
        self._most = SPARE + FACTOR * size
        self._written = self._made = 0
        self._left += TEXT_SECONDS + BYTE_SECONDS * size
        self._begin = time.thread_time()

    def stop(self) -> None:
        """Subtract the time since the start from the time for all texts."""
        self._left -= time.thread_time() - self._begin

    def write(self, count: int) -> None:
        """Subtract so many characters, and the time until now, from what is left."""
        self._written += count
        if self._written > self._most:
            raise SecurityError(f"it writes more than {self._most} characters")
        taken = time.thread_time() - self._begin
        if taken > SECONDS:
            raise SecurityError(f"it takes more than {SECONDS} seconds")
        if taken > self._left:
            raise SlowTemplateError("all texts together take too long")

    def made(self, value: Any) -> Any:
        """Return a value that was made, if it is not too large, nor are all together."""
        self.write(0)
        self._size(value)
        self._made += len(value) if isinstance(value, str | bytes) else ITEM
        self._made += ITEM * len(value) if isinstance(value, list | tuple | dict) else 0
        if self._made > VALUES * self._most:
            raise SecurityError(f"it makes values of more than {VALUES * self._most} bytes")
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or isinstance(left, _LONG) or isinstance(right, _LONG):
            self._check_product(operator, (left, right))
        return self.made(super().call_binop(context, operator, left, right))

    def call(*args: Any, **values: Any) -> Any:
        # Its own parameters must not have names that the template's may have.
        self, context, function, *rest = args
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        name = getattr(function, "__name__", "")
        self._check_product(name, (owner, *rest, *values.values()))
        called = ImmutableSandboxedEnvironment.call
        return self.made(called(self, context, function, *rest, **values))

    def _bounded(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(filter)
        def run(*args: Any, **values: Any) -> Any:
            args = tuple(
                self._listed(each) if isinstance(each, Iterator) else each for each in args
            )
            own = Context | EvalContext | BoundedSandbox
            given = [each for each in args if not isinstance(each, own)]
            self._check_product(name, (*given, *values.values()))
            return self.made(filter(*args, **values))

        return run

    def _listed(self, values: Iterator[Any]) -> list[Any]:
        """Return all values of a generator; they are made as they are asked for."""
        listed, size = [], 0
        for each in values:
            size += self._size(each)
            self._check(size)
            listed.append(each)
        return listed

    def _check_product(self, name: str, values: tuple[Any, ...]) -> None:
        if name not in PRODUCTS:
            return
        first, *others = values
        size, times = self._size(first), sum(map(self._size, others))
        if name in ("*", "**"):
            size, times = (max(each) for each in zip((size, times), _counts(values), strict=True))
        elif name not in _FORMATTING:
            times = max(times, *_counts(others), 0)
        elif isinstance(first, str):
            if "*" in first or re.search(r"{[^{}]*{", first):
                raise SecurityError("it formats by widths that are values")
            size += sum(int(each[:19]) for each in _NUMBERS.findall(first))
        self._check(size * times // PRODUCT)

    def _size(self, value: Any) -> int:
        """Return about how many bytes are in a value, each as often as it is there."""
        size, left = ITEM, list[Iterable[Any]]([(value,)])
        while left:
            for each in left.pop():
                if isinstance(each, str | bytes):
                    size += len(each)
                elif isinstance(each, _HOLDERS):
                    size += ITEM * len(each)
                    left.append(each)
                    if isinstance(each, dict):
                        left.append(each.values())
                elif isinstance(each, int) and each.bit_length() > BITS:
                    raise SecurityError(f"it makes an integer of more than {BITS} bits")
                if size > self._most:
                    self._check(size)
        return size

    def _check(self, size: int) -> None:
        if size > self._most:
            raise SecurityError(f"it makes a value of more than {self._most} bytes")


def _counts(values: Iterable[Any]) -> list[int]:
    """Return what values are worth as numbers."""
    return [abs(each) if isinstance(each, int) else 0 for each in values]
