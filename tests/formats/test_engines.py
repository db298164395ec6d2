"""Names in generated configs are those of the engines, and what engines refuse is refused here."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from engine_rules import (
    GATE_UP,
    LATENT,
    QKV,
    RENAMED,
    Vllm,
    compressed_tensors,
    gptqmodel,
    optimum,
    transformers_awq,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from made_models import new_spelling
from safetensors.numpy import load_file
from shared_data import ARCH, OWN, TESTS, TINY

import bitwright
from bitwright.cli.main import cli
from bitwright.formats import FORMATS, Precision
from bitwright.formats.engine_names import EngineNames, check_fused, fused_groups, mlx_name

DEMO = bitwright.demo_folder()
GEMMA = next(each for each in TINY if each.name == "gemma3")
NESTED = [folder for folder in TINY if "text_config" in (folder / "config.json").read_text()]
DEFAULT, OTHER = Precision(4, 32, "symmetric"), Precision(8, 64, "symmetric")
MIXED = ("gptq", "compressed-tensors")


@dataclass(frozen=True)
class Case:
    """The layers of a model by the names of its files, and what engines call them."""

    block: str
    linears: tuple[str, ...]  # in the blocks
    others: tuple[str, ...]  # never quantized
    transformers: Mapping[str, str]
    vllm: Mapping[str, str]
    engine: Vllm

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.linears, *self.others)


def text_model(folder: Path) -> Case:
    model = bitwright.load_model(folder)
    linears, others = tuple(model.linear_shapes()), tuple(model.never_quantized())
    names = {name: name for name in (*linears, *others)}
    packed: dict[str, Any] = QKV | GATE_UP
    if model.config.latent is not None:
        packed = GATE_UP | (LATENT if model.config.latent.query_rank else {})
    return Case(model.names.block.format(""), linears, others, names, names, Vllm(packed, {}))


LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
TOWERS = {
    "gemma3": ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
               "vision_tower.vision_model.encoder.layers.1.mlp.fc1"),
    "llava": ("vision_tower.vision_model.encoder.layers.1.mlp.fc1", "multi_modal_projector.linear_1"),
    "mistral3": ("vision_tower.transformer.layers.1.attention.q_proj",
                 "multi_modal_projector.patch_merger.merging_layer"),
    "qwen2_5_vl": ("visual.blocks.1.mlp.gate_proj", "visual.merger.mlp.0"),
}  # fmt: skip


def multimodal_model(family: str, spelling: str) -> Case:
    """One whose files are spelled as older ones are, as transformers saves them, or as Qwen's are."""
    before, tower = {
        "old": ("language_model.model.", ""),
        "new": ("model.language_model.", "model."),
        "qwen": ("model.", ""),
    }[spelling]
    linears = [f"layers.{i}.{name}" for i in (0, 1, 10, 11) for name in LINEARS]
    others = TOWERS[family]
    return Case(
        before + "layers.",
        tuple(before + name for name in linears),
        tuple(tower + name for name in others),
        {
            **{before + name: f"model.language_model.{name}" for name in linears},
            **{tower + name: f"model.{name}" for name in others},
        },
        {
            **{before + name: f"language_model.model.{name}" for name in linears},
            **{tower + name: name for name in others},
        },
        Vllm(QKV | GATE_UP, RENAMED),
    )


CASES = {
    **{f"tiny-{folder.name}": (text_model, (folder,)) for folder in OWN if folder not in NESTED},
    **{f"arch-{folder.name}": (text_model, (folder,)) for folder in ARCH},
    **{
        f"{family}-{spelling}": (multimodal_model, (family, spelling))
        for family in ("gemma3", "llava", "mistral3")
        for spelling in ("old", "new")
    },
    "qwen2_5_vl-qwen": (multimodal_model, ("qwen2_5_vl", "qwen")),
    "qwen2_5_vl-new": (multimodal_model, ("qwen2_5_vl", "new")),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    make, arguments = CASES[request.param]
    made: Case = make(*arguments)  # type: ignore[operator]
    return made


def said(kind: Precision | None) -> tuple[int, int] | None:
    return None if kind is None else (kind.bits, kind.group_size or -1)


def config(format: str, plan: Mapping[str, Precision | None], block: str) -> Any:
    """Return quantization_config as it is read from a file."""
    kind: Any = FORMATS[format]  # type: ignore[index]
    return json.loads(json.dumps(kind.config(DEFAULT, plan, block)["quantization_config"]))


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
@settings(max_examples=15)
@given(data=st.data())
def test_engines_find_what_is_planned(case: Case, format: str, data: st.DataObject) -> None:
    """Whatever each module of vLLM is, it is in vLLM, transformers, compressed-tensors and GPTQModel."""
    kinds = [DEFAULT, None] if format == "awq" else [DEFAULT, OTHER, None]
    modules = case.engine.modules(case.linears, case.vllm)
    plan: dict[str, Precision | None] = {}
    for module in modules:
        plan |= dict.fromkeys(module.parts, data.draw(st.sampled_from(kinds)))
    plan |= dict.fromkeys(case.others)
    check_fused(FORMATS[format], plan)  # type: ignore[index]
    found = config(format, plan, case.block)
    stored = [name for name, kind in plan.items() if kind is not None]
    beside = [
        module for module in case.engine.modules(case.others, case.vllm) if not module.experts
    ]
    for module in (*modules, *beside):
        wanted = said(plan[module.parts[0]])
        if format == "gptq":
            assert case.engine.gptq(found, module, stored) == wanted, module
        elif format == "awq":
            assert case.engine.awq(found, module) == wanted, module
        else:
            assert case.engine.compressed_tensors(found, module) == wanted, module
    for name, kind in plan.items():
        module_name = case.transformers[name]
        if format == "gptq":
            assert gptqmodel(found, module_name) == said(kind), name
            if name.startswith(case.block):
                assert optimum(found, module_name) == (kind is not None), name
        elif format == "awq":
            assert transformers_awq(found, module_name) == said(kind), name
        else:
            assert compressed_tensors(found, module_name) == said(kind), name


@settings(max_examples=15)
@given(data=st.data())
def test_what_differs_inside_of_a_module_is_refused(case: Case, data: st.DataObject) -> None:
    """By the formats of vLLM, for what vLLM fuses, and for nothing else."""
    modules = case.engine.modules(case.linears, case.vllm)
    fused = [module for module in modules if len(module.parts) > 1]
    plan: dict[str, Precision | None] = dict.fromkeys(case.layers, DEFAULT)
    plan |= dict.fromkeys(data.draw(st.sampled_from(modules)).parts, OTHER)
    for format in MIXED:
        check_fused(FORMATS[format], plan)  # type: ignore[index]
    if not fused:
        return
    module = data.draw(st.sampled_from(fused))
    chosen = data.draw(st.sampled_from(module.parts))
    plan[chosen] = None
    for format in ("gptq", "awq", "compressed-tensors"):
        with pytest.raises(ValueError, match="vLLM computes") as caught:
            check_fused(FORMATS[format], plan)  # type: ignore[index]
        assert "--exclude" in str(caught.value)
        assert "--allow-unfused" in str(caught.value)
    for format in ("mlx", "gguf"):
        check_fused(FORMATS[format], plan)  # type: ignore[index]


def test_layers_are_grouped_as_the_engine_does(case: Case) -> None:
    wanted = {module.parts for module in case.engine.modules(case.linears, case.vllm)}
    assert set(fused_groups(case.linears).values()) == wanted


@pytest.mark.parametrize(
    ("chosen", "patterns"),
    [
        (
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj",
             "model.layers.1.self_attn.v_proj"],
            [r"model\.layers\.1\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)"],
        ),
        (["model.layers.1.self_attn.q_proj"], [r"model\.layers\.1\.self_attn\.q_proj"]),
        (
            [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 10) for n in ("gate", "up")],
            [r"model\.layers\.(0|10)\.mlp\.(gate_proj|up_proj|gate_up_proj)"],
        ),
        (
            [f"model.layers.2.mlp.experts.{i}.{n}_proj" for i in (0, 1) for n in ("gate", "down")],
            [r"model\.layers\.2\.mlp\.experts(\..+)?"],
        ),
    ],
)  # fmt: skip
def test_patterns_are_few_and_match_whole_names(chosen: list[str], patterns: list[str]) -> None:
    layers = [f"model.layers.{i}.{name}" for i in (0, 1, 10, 11) for name in LINEARS]
    layers += [f"model.layers.2.mlp.experts.{i}.{n}_proj" for i in (0, 1) for n in ("gate", "down")]
    assert EngineNames(layers).patterns(chosen) == patterns
    for layer in layers:
        assert any(re.match(f"^{each}$", layer) for each in patterns) == (layer in chosen)


def test_many_layers_alike_take_few_rules() -> None:
    layers = [f"model.layers.{i}.{name}" for i in range(60) for name in LINEARS]
    plan = {name: OTHER if number % 3 else DEFAULT for number, name in enumerate(layers)}
    for parts in fused_groups(layers).values():
        plan |= dict.fromkeys(parts, plan[parts[0]])
    assert len(config("gptq", plan, "model.layers.")["dynamic"]) <= 4  # qkv, o, gate and up, down


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.language_model.layers.1.mlp.up_proj.weight",
         "language_model.model.layers.1.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.scales", "language_model.model.embed_tokens.scales"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight",
         "vision_tower.encoder.layers.0.mlp.fc1.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
    ],
)  # fmt: skip
def test_mlx_names(name: str, wanted: str) -> None:
    assert mlx_name(name) == wanted


@pytest.mark.parametrize("format", ["mlx", "gptq", "compressed-tensors"])
def test_both_spellings_of_a_multimodal_model_are_one(tmp_path: Path, format: Any) -> None:
    """What is written for mlx-lm has its names, whatever the source's are; all else keeps them."""
    choice: dict[str, Any] = {
        "overrides": {"*layers.0.mlp.down_proj": {"bits": 8}},
        "exclude": ["*layers.1.mlp.down_proj"],
    }
    folders = {"old": GEMMA, "new": new_spelling(tmp_path / "source")}
    configs, logits = {}, {}
    for spelling, folder in folders.items():
        out = tmp_path / f"{format}-{spelling}"
        bitwright.quantize(folder, out, "rtn", 4, 32, format, progress=False, **choice)
        configs[spelling] = json.loads((out / "config.json").read_text())
        logits[spelling] = bitwright.load_model(out).logits([[5, 6, 7]])
    np.testing.assert_array_equal(logits["old"], logits["new"])
    assert configs["old"] == configs["new"]
    if format == "gptq":
        settings = configs["old"]["quantization_config"]
        listed = settings["modules_in_block_to_quantize"][0]
        assert len(listed) == 20
        assert all(name.startswith("model.language_model.layers.") for name in listed)
        # GPTQModel takes no other names in files, transformers takes any.
        stored = load_file(tmp_path / "gptq-old" / "model.safetensors")
        assert {f"{name}.qweight" for name in listed} < set(stored)
        assert "model.vision_tower.encoder.layers.0.mlp.fc1.weight" in stored
    if format == "mlx":
        assert configs["old"]["vocab_size"] == 96  # mlx-lm has no other place for it
        names = [set(load_file(tmp_path / f"mlx-{each}" / "model.safetensors")) for each in folders]
        assert names[0] == names[1]
        key = "language_model.model.layers.0.mlp.down_proj"
        assert configs["new"]["quantization"][key]["bits"] == 8
        # A second time through our own reader.
        bitwright.convert(tmp_path / "mlx-new", tmp_path / "again", "mlx", progress=False)
        assert set(load_file(tmp_path / "again" / "model.safetensors")) == names[0]


@pytest.mark.parametrize("format", ["compressed-tensors", "awq", "gptq"])
def test_all_of_a_vision_tower_stays_in_float(tmp_path: Path, format: Any) -> None:
    """As transformers calls it, in its versions, and vLLM, which fuses there as well."""
    bitwright.quantize(GEMMA, tmp_path / "out", "rtn", 4, 32, format, progress=False)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    rule = {"compressed-tensors": compressed_tensors, "awq": transformers_awq, "gptq": gptqmodel}
    for tower in ("model.vision_tower.encoder", "model.vision_tower.vision_model.encoder"):
        for name in ("mlp.fc1", "self_attn.q_proj", "self_attn.out_proj"):
            assert rule[format](found, f"{tower}.layers.0.{name}") is None
    assert rule[format](found, "model.language_model.layers.2.mlp.gate_proj") == (4, 32)
    if format == "compressed-tensors":
        assert compressed_tensors(found, "lm_head") is None


@pytest.mark.parametrize("format", ["mlx", "gptq", "awq", "compressed-tensors"])
def test_what_is_made_of_a_folder_has_its_names(tmp_path: Path, format: Any) -> None:
    """Of tensors, and in config.json."""
    ids = np.random.default_rng(0).integers(0, 96, (6, 24))
    exclude = ["*.1.self_attn.[qkv]_proj", "*.0.mlp.down_proj"]
    first = tmp_path / "first"
    bitwright.quantize(GEMMA, first, "rtn", 4, 32, format, exclude=exclude, progress=False)
    bitwright.dwq_quantize(GEMMA, first, tmp_path / "trained", ids, progress=False)
    bitwright.refine_model(GEMMA, first, tmp_path / "refined", ids, progress=False)
    bitwright.convert(first, tmp_path / "converted", format, progress=False)
    wanted = json.loads((first / "config.json").read_text())
    for name in ("trained", "refined", "converted"):
        out = tmp_path / name
        assert set(load_file(out / "model.safetensors")) == set(
            load_file(first / "model.safetensors")
        )
        found = json.loads((out / "config.json").read_text())
        assert found["quantization_config"] == wanted["quantization_config"], name


# what engines refuse, in the commands


HALVES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("gptq", {"exclude": ["*.q_proj"]}, ["q_proj is in float", "--exclude '*.self_attn.k_proj'"]),
    (
        "awq",
        {"exclude": ["*.1.mlp.gate_proj"]},
        ["model.layers.1.mlp.gate_up_proj", "--exclude 'model.layers.1.mlp.up_proj'"],
    ),
    (
        "compressed-tensors",
        {"include": ["*.v_proj", "*.mlp.*"]},
        ["q_proj and k_proj are in float"],
    ),
    (
        "gptq",
        {"overrides": {"*.q_proj": {"bits": 8, "group_size": 32}}},
        ["8 bits in groups of 32", "--override '*.self_attn.v_proj=bits:8,group_size:32'",
         "2 more modules"],
    ),
    (
        "compressed-tensors",
        {"overrides": {"*.2.mlp.up_proj": {"bits": 8}}},
        ["gate_proj is in 4 bits", "--override 'model.layers.2.mlp.gate_proj=bits:8,group_size:64'"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("format", "options", "words"), HALVES)
def test_half_of_a_fused_module_is_refused_or_allowed(
    tmp_path: Path, format: Any, options: dict[str, Any], words: list[str]
) -> None:
    made: dict[str, Any] = {"method": "rtn", "format": format, "progress": False, **options}
    with pytest.raises(ValueError, match="--allow-unfused") as caught:
        bitwright.quantize(DEMO, tmp_path / "out", **made)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    bitwright.quantize(DEMO, tmp_path / "out", allow_unfused=True, **made)
    assert bitwright.load_model(tmp_path / "out").logits([[1, 2, 3]]).shape == (1, 3, 512)
    assert not_for_vllm(tmp_path / "out")


def not_for_vllm(folder: Path) -> bool:
    """Tell whether a card says so, and shows another way to load."""
    card = (folder / "README.md").read_text()
    assert ("vllm serve" in card) != ("not for" in card)
    assert "vllm serve" in card or "from_pretrained" in card or "GPTQModel.load" in card
    return "vllm serve" not in card


def test_refine_and_dwq_keep_what_was_allowed(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 512, (6, 32))
    half: dict[str, Any] = {"exclude": ["*.1.self_attn.q_proj"], "allow_unfused": True}
    bitwright.quantize(
        DEMO, tmp_path / "half", "rtn", 4, 64, "gptq", scale_dtype="float16", progress=False, **half
    )
    bitwright.refine_model(DEMO, tmp_path / "half", tmp_path / "refined", ids, progress=False)
    bitwright.dwq_quantize(DEMO, tmp_path / "half", tmp_path / "dwq", ids, progress=False)
    for out in ("half", "refined", "dwq"):
        model = bitwright.load_model(tmp_path / out)
        assert model.quantized("model.layers.1.self_attn.q_proj") is None
        assert model.quantized("model.layers.1.self_attn.k_proj") is not None
        assert not_for_vllm(tmp_path / out)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_the_patterns_that_an_error_names_would_do(tmp_path: Path, format: Any) -> None:
    """Also together: a half of each kind of module."""
    halves = ["--exclude", "*.q_proj", "--override", "*.0.mlp.up_proj=bits:8,group_size:32"]
    base = ["quantize", str(DEMO), "--method", "rtn", "--format", format]
    base += ["--out", str(tmp_path / "out")]
    failed = CliRunner().invoke(cli, base + halves)
    assert failed.exit_code != 0
    message = str(failed.exception) + failed.output
    named = re.findall(r"--(exclude|override) '([^']+)'", message)
    assert len(named) == 5
    more = [part for option, pattern in named for part in (f"--{option}", pattern)]
    assert CliRunner().invoke(cli, base + halves + more).exit_code == 0


def test_experts_are_one_module(tmp_path: Path) -> None:
    folder = next(each for each in TINY if each.name == "qwen3_moe")
    halves: list[dict[str, Any]] = [
        {"exclude": ["*.experts.2.*"]},
        {"overrides": {"*.experts.*.down_proj": {"bits": 8}}},
    ]
    for half in halves:
        with pytest.raises(ValueError, match=r"\.mlp\.experts: vLLM computes") as caught:
            bitwright.quantize(
                folder, tmp_path / "out", "rtn", 4, 32, "gptq", progress=False, **half
            )
        assert ".experts.*" in str(caught.value)
    bitwright.quantize(
        folder, tmp_path / "out", "rtn", 4, 32, "gptq", exclude=["*.experts.*"], progress=False
    )
    rules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "dynamic"
    ]
    assert any(re.match(rule[2:], "model.layers.1.mlp.experts") for rule in rules)


# in other commands


@pytest.mark.parametrize("target", ["gptq", "compressed-tensors"])
def test_converted_layers_that_are_fused_get_one_precision(tmp_path: Path, target: Any) -> None:
    """The smallest that holds all of them: mlx-lm fuses nothing, so there they may differ."""
    options: dict[str, Any] = {"format": "gguf", "grid": "symmetric", "progress": False}
    mixed = {"*.q_proj": {"bits": 8}, "*.1.mlp.up_proj": {"bits": 8}}
    bitwright.quantize(DEMO, tmp_path / "q", "rtn", 4, 32, overrides=mixed, **options)
    report = bitwright.convert(tmp_path / "q", tmp_path / "out", target, progress=False)
    assert not report.lossy
    stored = {each.name: each.after for each in report.layers}
    for parts in fused_groups(stored).values():
        assert len({stored[part] for part in parts}) == 1
    assert stored["model.layers.0.self_attn.k_proj"] == Precision(8, 32, "symmetric")
    assert stored["model.layers.0.self_attn.o_proj"] == Precision(4, 32, "symmetric")
    assert not not_for_vllm(tmp_path / "out")
    report = bitwright.convert(
        tmp_path / "q", tmp_path / "each", target, allow_unfused=True, progress=False
    )
    stored = {each.name: each.after for each in report.layers}
    assert stored["model.layers.0.self_attn.k_proj"] == Precision(4, 32, "symmetric")
    assert stored["model.layers.0.self_attn.q_proj"] == Precision(8, 32, "symmetric")
    assert not_for_vllm(tmp_path / "each")
    same = [
        bitwright.load_model(tmp_path / out).logits([[1, 2, 3]]) for out in ("q", "out", "each")
    ]
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[0], same[2])


@pytest.mark.parametrize("target", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("left", ["*.v_proj", "*.0.mlp.gate_proj", "*.2.self_attn.[kv]_proj"])
def test_a_part_in_float_is_not_converted(tmp_path: Path, left: str, target: Any) -> None:
    bitwright.quantize(
        DEMO,
        tmp_path / "q",
        "rtn",
        4,
        64,
        "gptq",
        exclude=[left],
        allow_unfused=True,
        progress=False,
    )
    with pytest.raises(ValueError, match="vLLM computes.*Quantize the original anew: --exclude"):
        bitwright.convert(tmp_path / "q", tmp_path / "out", target, progress=False)
    assert not (tmp_path / "out").exists()
    bitwright.convert(tmp_path / "q", tmp_path / "out", target, allow_unfused=True, progress=False)
    bitwright.convert(
        tmp_path / "q", tmp_path / "mlx", "mlx", allow_requantize=True, progress=False
    )
    arguments = ["convert", str(tmp_path / "q"), "--format", target, "--out", str(tmp_path / "cli")]
    assert CliRunner().invoke(cli, arguments).exit_code != 0
    assert CliRunner().invoke(cli, [*arguments, "--allow-unfused"]).exit_code == 0


def test_dynamic_precision_asks_before_it_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitwright.presets.dynamic.estimate_sensitivities", None)
    for half in ({"exclude": ["*.q_proj"]}, {"overrides": {"*.1.mlp.up_proj": {"bits": 8}}}):
        with pytest.raises(ValueError, match="vLLM computes"):
            bitwright.dynamic_quantize(
                DEMO, tmp_path / "out", 4.0, [(3, 64), (4, 64)], "rtn", "gptq",
                DEMO / "calibration.txt", progress=False, **half,
            )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_dynamic_precision_of_what_nobody_fuses(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 512, (4, 32))
    found = bitwright.estimate_sensitivities(DEMO, ids, 3, 64, 8, 64, progress=False)
    made: dict[str, Any] = {"candidates": [(3, 64), (4, 64), (8, 64)], "format": "gptq"}
    together = bitwright.choose_precisions(DEMO, found, 4.5, **made)
    apart = bitwright.choose_precisions(DEMO, found, 4.5, allow_unfused=True, **made)
    for recipe, alike in ((together, True), (apart, False)):
        groups = fused_groups(recipe.layers).values()
        assert all(len({recipe.layers[part] for part in parts}) == 1 for parts in groups) == alike
    arguments: Any = (DEMO, tmp_path / "out", "rtn", 4, 64, "gptq")
    with pytest.raises(ValueError, match="vLLM computes"):
        bitwright.quantize(*arguments, recipe=apart, progress=False)
    bitwright.dynamic_quantize(
        DEMO, tmp_path / "out", 4.5, made["candidates"], "rtn", "gptq", sensitivities=found,
        allow_unfused=True, progress=False,
    )  # fmt: skip
    assert not_for_vllm(tmp_path / "out")


def test_the_page_names_tests_that_are_there() -> None:
    """Of docs/engines.md, whose rows say which test holds a constraint."""
    page = (TESTS.parent / "docs" / "engines.md").read_text()
    named = re.findall(r"`(\w+/test_\w+\.py)(?:::(\w+))?", page)
    assert len(named) > 30
    for file, name in named:
        text = (TESTS / file).read_text()
        assert not name or f"def {name}(" in text, f"{file}::{name}"
