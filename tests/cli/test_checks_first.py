"""Wrong options are known before anything is computed: one line, in no time, and nothing is left."""

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_data import TESTS

import bitwright
from bitwright.cli.main import main
from bitwright.formats import FORMATS
from bitwright.loading.model import Model
from bitwright.models.network import Network
from bitwright.precision.choices import dynamic_choices
from bitwright.presets.quantize import check_quantization
from bitwright.quantization.options import keyword_defaults
from bitwright.tools.convert import _Conversion

DEMO = bitwright.demo_folder()
TEXT = str(DEMO / "calibration.txt")
TINY = TESTS / "data" / "tiny"
COMPUTED = AssertionError("something was computed before the options were checked")

QUANTIZE = ("quantize", "DEMO", "--out", "OUT")
CALIBRATED = (*QUANTIZE, "--calibration", TEXT)
TRANSFORMERS = (*QUANTIZE, "--backend", "transformers")
BEST = (*QUANTIZE, "--preset", "best")
DYNAMIC = ("dynamic", "DEMO", "--out", "OUT", "--calibration", TEXT, "--target-bpw", "4.5")
SENSITIVITIES = ("sensitivities", "DEMO", "--out", "DIR/s.json", "--calibration", TEXT)
DWQ = ("dwq", "DEMO", "--out", "OUT")
DATA = ("--calibration", TEXT, "--length", "64")
TAUGHT = ("--reference", "DEMO", "--out", "OUT")
STUDENT = ("dwq", "DIR/student", *TAUGHT)
SALIENT = ("salient", "DEMO", "--out", "OUT", "--group-size", "32")
NEW = ("--activations", "DIR/a.npz", "--calibration", TEXT)
REFINE = ("refine", "DIR/student", "--reference", "DEMO", "--out", "OUT")
COLLECT = ("statistics", "collect", "DEMO", "--out", "OUT")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders that commands are given."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "empty.txt").write_text("")
    (folder / "few.txt").write_text("Once upon a time there was a fox. " * 8)
    (folder / "text.pdf").write_text("%PDF-1.7")
    (folder / "mine.json").write_text('{"all": "that I have"}')
    (folder / "mine.svg").write_text("<svg>my drawing</svg>")
    (folder / "file").write_text("a file")
    np.save(folder / "beyond.npy", np.full((4, 64), 10**6))
    np.save(folder / "one.npy", np.ones((4, 1), np.int32))
    (folder / "taken").mkdir()
    (folder / "taken" / "letter.txt").write_text("mine")
    bare = Path(shutil.copytree(DEMO, folder / "bare"))
    (bare / "tokenizer.json").unlink()
    bitwright.quantize(DEMO, folder / "student", "rtn", 4, 32, progress=False)
    bitwright.quantize(TINY / "qwen2", folder / "other", "rtn", 4, 32, progress=False)
    names = list(bitwright.load_model(DEMO).linear_shapes())
    bitwright.Recipe({"nobody.has_this": (4, 32)}, 4.5, 4.5).save(folder / "other_recipe.json")
    for name, precision in ("recipe.json", (4, 32)), ("three.json", (3, 64)):
        bitwright.Recipe(dict.fromkeys(names, precision), 4.5, 4.5).save(folder / name)
    bitwright.Sensitivities({"a": 0.1}, {"a": 64}, (3, 64), (5, 64), "m", "t", "kl", 0.1).save(
        folder / "others.json"
    )
    np.savez(folder / "few.npz", **{f"{names[0]}": np.ones((8, 64), np.float32)})
    return folder


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise COMPUTED

    for kind, name in (
        *((Model, "block"), (Model, "embed"), (Network, "final_states")),
        *((Network, "gradients"), (_Conversion, "plan")),
    ):
        monkeypatch.setattr(kind, name, fail)


def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
) -> tuple[int, list[str]]:
    """Run a command in this process; return its exit code and what it says on standard error."""
    monkeypatch.setattr(sys, "argv", ["bitwright", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    code = ended.value.code
    return int(code or 0), capsys.readouterr().err.strip().splitlines()


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


WRONG: list[tuple[tuple[str, ...], str]] = [
    ((*QUANTIZE, "--calibration", "DIR/absent.txt"), "absent.txt: there is no such file"),
    ((*QUANTIZE, "--calibration", "DIR/text.pdf"), "is a PDF document; give its text"),
    ((*QUANTIZE, "--calibration", TEXT, "--text-key", "body"), "is plain text without records"),
    ((*QUANTIZE, "--calibration", "DIR/empty.txt"), "is empty"),
    ((*QUANTIZE, "--calibration", "DIR/few.txt"), "too few for one sample of 256"),
    ((*QUANTIZE, "--calibration", "DIR/beyond.npy"), "token id 1000000"),
    ((*CALIBRATED, "--samples", "99999"), "99999 samples were asked for"),
    ((*CALIBRATED, "--recipe", "DIR/none.json"), "none.json: there is no such file')"),
    ((*CALIBRATED, "--group-size", "48"), "stores groups of 32, 64 or 128, not 48"),
    ((*CALIBRATED, "--format", "awq", "--bits", "3"), "awq format stores 4 bits"),
    ((*CALIBRATED, "--format", "gptq", "--bits", "5"), "2, 3, 4 or 8 bits"),
    ((*CALIBRATED, "--format", "gguf", "--group-size", "64"), "groups of 32"),
    ((*CALIBRATED, "--grid", "k"), "grids, not k"),
    ((*CALIBRATED, "--include", "nope*"), "matches no layer"),
    ((*CALIBRATED, "--exclude", "*"), "leave no layer"),
    ((*CALIBRATED, "--override", "*.q_proj=bits:7"), "not 7"),
    ((*CALIBRATED, "--format", "gptq", "--embedding-bits", "4"), "embedding_bits"),
    ((*CALIBRATED, "--head-bits", "4", "--embedding-bits", "4"), "head_bits"),
    ((*CALIBRATED, "--format", "awq", "--scale-dtype", "float32"), "scale_dtype"),
    ((*CALIBRATED, "--method", "salient", "--bits", "3"), "salient stores 4 bits"),
    ((*CALIBRATED, "--drift", "--propagate", "original"), "drift"),
    ((*CALIBRATED, "--damping", "nan"), "damping"),
    ((*CALIBRATED, "--memory", "0.01"), "memory"),
    ((*CALIBRATED, "--recipe", "DIR/absent.json"), "absent.json"),
    ((*CALIBRATED, "--recipe", "DIR/mine.json"), "is not a recipe"),
    ((*CALIBRATED, "--recipe", "DIR/other_recipe.json"), "nobody.has_this"),
    ((*CALIBRATED, "--statistics", "DIR/absent"), "take the place of calibration"),
    ((*QUANTIZE, "--statistics", "DIR/absent"), "absent"),
    (("quantize", "DIR/bare", "--out", "OUT", "--calibration", TEXT), "tokenizer.json: is missing"),
    (("quantize", "DIR/student", "--out", "OUT", "--calibration", TEXT), "quantized already"),
    (("quantize", "DEMO", "--out", "DIR/file/out", "--method", "rtn"), "Not a directory"),
    (("quantize", "DEMO", "--out", "DIR/file", "--method", "rtn"), "exists already"),
    (("quantize", "DEMO", "--out", "DIR/file", "--method", "rtn", "--overwrite"), "is a file"),
    (("quantize", "DEMO", "--out", "DIR/taken", "--method", "rtn"), "exists already"),
    (("quantize", "DEMO", "--out", "DIR/taken", "--method", "rtn", "--overwrite"), "not a checkpoi"),
    (("quantize", "DIR/bare", "--out", "DIR/bare", "--method", "rtn", "--overwrite"), "overlaps"),
    (("quantize", "DIR/bare", "--out", "DIR/bare/q", "--method", "rtn"), "overlaps"),
    (("quantize", "DEMO", "--out", "/proc/out", "--method", "rtn"), "/proc/out: cannot be written"),
    ((*TRANSFORMERS, "--calibration", "DIR/absent.txt"), "absent.txt: there is no such file"),
    ((*TRANSFORMERS, "--method", "rtn", "--format", "gguf"), "with the transformers backend"),
    ((*TRANSFORMERS, "--method", "rtn", "--out", "DIR/taken"), "exists already"),
    ((*BEST, "--calibration", "DIR/few.txt", "--length", "64"), "are for validation"),
    ((*BEST, "--calibration", TEXT, "--samples", "99999"), "99999 samples"),
    ((*BEST, "--calibration", TEXT, "--group-size", "48"), "groups of 32, 64 or 128, not 48"),
    ((*BEST, "--calibration", TEXT, "--include", "nope*"), "matches no layer"),
    ((*BEST, "--calibration", TEXT, "--damping", "nan"), "damping"),
    ((*BEST, "--calibration", TEXT, "--memory", "0.01"), "memory"),
    ((*DYNAMIC, "--format", "awq"), "awq has one precision for all layers"),
    ((*DYNAMIC, "--format", "marlin"), "marlin has one precision for all layers"),
    ((*DYNAMIC, "--format", "gptq", "--candidates", "3:64,5:64"), "not 5"),
    ((*DYNAMIC, "--format", "compressed-tensors", "--candidates", "3:64,4:64"), "not 3"),
    ((*DYNAMIC, "--format", "gguf", "--candidates", "4:64,5:64"), "groups of 32"),
    ((*DYNAMIC, "--candidates", "3:48"), "groups of 48 do not divide"),
    ((*DYNAMIC, "--candidates", "3:64,4:64", "--target-bpw", "5.2"), "reach from 3.5 to 4.5"),
    ((*DYNAMIC, "--target-bpw", "1.5"), "the mlx format reaches from 2.5 to 8.5"),
    ((*DYNAMIC, "--target-bpw", "20"), "out of reach"),
    ((*DYNAMIC, "--method", "salient"), "method: expected one of awq, awq+gptq, gptq, rtn"),
    ((*DYNAMIC, "--samples", "99999"), "99999 samples"),
    ((*DYNAMIC, "--sensitivity-samples", "99999"), "99999 samples"),
    ((*DYNAMIC, "--calibration", "DIR/absent.txt"), "absent.txt"),
    ((*DYNAMIC, "--evaluation", "DIR/absent.txt"), "absent.txt"),
    ((*DYNAMIC, "--evaluation", "DIR/few.txt"), "too few"),
    ((*DYNAMIC, "--evaluation", "DIR/one.npy"), "no next token"),
    ((*DYNAMIC, "--sensitivities", "DIR/mine.json"), "does not hold sensitivities"),
    ((*DYNAMIC, "--sensitivities", "DIR/others.json"), "are not those of"),
    ((*DYNAMIC, "--sensitivities", "DIR/taken"), "does not hold sensitivities"),
    ((*DYNAMIC, "--recipe", "DIR/mine.json"), "mine.json: exists already"),
    ((*DYNAMIC, "--recipe", "DIR/taken"), "it is a folder"),
    ((*DYNAMIC, "--recipe", "DIR/x.json", "--sensitivities", "DIR/x.json"), "the same file"),
    ((*DYNAMIC, "--recipe", "OUT"), "the same file"),
    ((*DYNAMIC, "--sensitivities", "OUT"), "the same file"),
    ((*DYNAMIC, "--sensitivities", "OUT/s.json"), "overlaps the sensitivities"),
    ((*DYNAMIC, "--format", "gptq", "--embedding-bits", "4"), "embedding_bits"),
    ((*DYNAMIC, "--grid", "symmetric"), "symmetric"),
    ((*DYNAMIC, "--memory", "0.01"), "memory"),
    ((*SENSITIVITIES, "--low", "3:48"), "groups of 48 do not divide"),
    ((*SENSITIVITIES, "--high", "8:128"), "groups of 128 do not divide"),
    ((*SENSITIVITIES, "--samples", "99999"), "99999 samples"),
    ((*SENSITIVITIES, "--plot", "DIR/s.xyz"), "choose an ending"),
    ((*SENSITIVITIES, "--plot", "DIR/mine.svg"), "mine.svg: exists already"),
    ((*SENSITIVITIES, "--plot", "DIR/s.json"), "the same file"),
    ((*SENSITIVITIES, "--out", "DIR/mine.json"), "mine.json: exists already"),
    ((*SENSITIVITIES, "--out", "DIR/taken"), "it is a folder"),
    ((*SENSITIVITIES, "--calibration", "DIR/absent.txt"), "absent.txt"),
    (("sensitivities", "DIR/student", "--out", "DIR/s.json", "--calibration", TEXT), "quantized already"),
    ((*STUDENT, "--calibration", "DIR/absent.txt"), "absent.txt"),
    ((*STUDENT, "--calibration", "DIR/few.txt", "--length", "64"), "are for validation"),
    ((*STUDENT, *DATA, "--k", "99999"), "k: expected"),
    ((*STUDENT, *DATA, "--validation", "DIR/absent.txt"), "absent.txt"),
    ((*STUDENT, *DATA, "--plot", "DIR/mine.svg"), "mine.svg: exists already"),
    ((*STUDENT, *DATA, "--plot", "DIR/d.xyz"), "choose an ending"),
    ((*STUDENT, *DATA, "--targets", "DIR/taken"), "holds no targets"),
    ((*DWQ, *DATA, "--targets", "DIR/taken"), "holds no targets"),
    (("dwq", "DEMO", *TAUGHT, *DATA), "quantized"),
    (("dwq", "DIR/other", *TAUGHT, *DATA), "is not made from"),
    ((*DWQ, *DATA, "--format", "gptq", "--bits", "5"), "2, 3, 4 or 8 bits"),
    ((*DWQ, *DATA, "--format", "awq", "--target-bpw", "4.5"), "one precision for all layers"),
    ((*DWQ, *DATA, "--target-bpw", "20"), "out of reach"),
    ((*DWQ, *DATA, "--samples", "99999"), "99999 samples"),
    ((*DWQ, *DATA, "--student-calibration", "DIR/absent.txt"), "absent.txt: there is no such file"),
    (("dwq", "DEMO", "--out", "DIR/taken", *DATA), "exists already"),
    (
        ("dwq", "DIR/student", "--reference", "DEMO", "--out", "DIR/student", *DATA,
         "--overwrite"),
        "overlaps",
    ),
    ((*SALIENT, *NEW, "--group-size", "48"), "groups of 32, 64 or 128, not 48"),
    ((*SALIENT, *NEW, "--samples", "99999"), "99999 samples"),
    ((*SALIENT, *NEW, "--format", "gguf", "--group-size", "64"), "groups of 32"),
    ((*SALIENT, *NEW, "--out", "DIR/taken"), "exists already"),
    ((*SALIENT, "--activations", "DIR/mine.json", "--calibration", TEXT), "exists already"),
    ((*SALIENT, "--activations", "DIR/a.npz", "--calibration", "DIR/no.txt"), "no.txt"),
    ((*SALIENT, "--activations", "DIR/absent.npz"), "absent.npz"),
    ((*SALIENT, "--activations", "DIR/few.npz"), "has no activations"),
    ((*REFINE, "--calibration", "DIR/absent.txt"), "absent.txt"),
    ((*REFINE, "--calibration", TEXT, "--damping", "nan"), "damping"),
    (("refine", "DEMO", "--reference", "DEMO", "--out", "OUT", "--calibration", TEXT), "quantized"),
    (
        ("refine", "DIR/other", "--reference", "DEMO", "--out", "OUT", "--calibration", TEXT),
        "is not made from",
    ),
    (
        ("refine", "DIR/student", "--reference", "DEMO", "--out", "DIR/student",
         "--calibration", TEXT, "--overwrite"),
        "overlaps",
    ),
    ((*COLLECT, "--calibration", "DIR/absent.txt"), "absent.txt"),
    ((*COLLECT, "--calibration", TEXT, "--samples", "99999"), "99999 samples"),
    (("statistics", "collect", "DEMO", "--out", "DIR/taken", "--calibration", TEXT), "exists alr"),
    (("statistics", "merge", "DIR/absent", "--out", "OUT"), "absent"),
    (("convert", "DEMO", "--out", "OUT", "--format", "mlx"), "is not quantized"),
    (("convert", "DIR/student", "--out", "DIR/taken", "--format", "gguf"), "exists already"),
    (("convert", "DIR/student", "--out", "DIR/student/x", "--format", "gguf"), "overlaps"),
    (("evaluate", "DEMO", "--evaluation", "DIR/absent.txt"), "absent.txt"),
    (("evaluate", "DEMO", "--evaluation", "DIR/one.npy"), "no next token"),
    (("evaluate", "DEMO", "--evaluation", TEXT, "--reference", "DIR/other"), "vocabulary"),
]  # fmt: skip


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize(
    ("arguments", "said"), WRONG, ids=[f"{command[0]}: {said}" for command, said in WRONG]
)
def test_wrong_options(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    inputs: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    out, before = tmp_path / "out", tree(inputs)
    given = (
        word.replace("DIR", str(inputs)).replace("OUT", str(out)).replace("DEMO", str(DEMO))
        for word in arguments
    )
    code, lines = run(monkeypatch, capsys, *given)
    assert code in (1, 2)
    assert said in lines[-1]
    assert len(lines) == 1 or code == 2
    assert tree(inputs) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_is_computed")
@pytest.mark.parametrize("command", [SENSITIVITIES, (*STUDENT, *DATA)])
def test_plots_without_matplotlib(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    inputs: Path,
    command: tuple[str, ...],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    given = (
        word.replace("DIR", str(inputs)).replace("OUT", str(tmp_path / "out"))
        for word in (*command, "--plot", "DIR/p.svg")
    )
    code, lines = run(monkeypatch, capsys, *(str(DEMO) if w == "DEMO" else w for w in given))
    assert (code, len(lines)) == (1, 1)
    assert "pip install bitwright[plot]" in lines[0]


MODEL_COMMANDS = [
    ("quantize", "MODEL"),
    ("quantize", "MODEL", "--out", "OUT", "--method", "awq", "--calibration", "absent.txt"),
    ("salient", "MODEL"),
    ("sensitivities", "MODEL"),
    ("dynamic", "MODEL", "--target-bpw", "4.5"),
    ("dwq", "MODEL"),
    ("dwq", "--reference", "MODEL"),
    ("dwq", "MODEL", "--calibration", "absent.txt"),
    ("convert", "MODEL"),
    ("refine", "MODEL"),
    ("refine", "--reference", "MODEL"),
    ("statistics", "collect", "MODEL"),
    ("evaluate", "MODEL"),
    ("evaluate", "--reference", "MODEL"),
    ("inspect", "MODEL"),
]


@pytest.mark.parametrize("command", MODEL_COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_a_model_that_is_not_there_is_missed_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
) -> None:
    """Whatever else is missing; a name on a hub and a misspelt one say what to do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Llama-3.2-1B").mkdir()
    (tmp_path / "story.gguf").touch()
    for model, said in (
        ("meta-llama/Llama-3.2-1B", "HF_HUB_OFFLINE is set, and the cache of the hub's client"),
        ("Llama-3.2-1b", "Is Llama-3.2-1B meant?"),
        (str(tmp_path / "stroy.gguf"), f"Is {tmp_path}/story.gguf meant?"),
        ("nowhere", "nowhere: there is no such folder. A model at the hub is named ORG/NAME"),
    ):
        arguments = (word.replace("MODEL", model) for word in command)
        code, lines = run(monkeypatch, capsys, *arguments)
        assert (code, len(lines)) == (1, 1)
        assert lines[0].startswith(f"bitwright: {model}: there is no such folder")
        assert said in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {"Llama-3.2-1B", "story.gguf"}


@pytest.mark.parametrize(
    "call",
    [
        lambda out: bitwright.quantize("nowhere", out),
        lambda out: bitwright.quantize("nowhere", out, preset="best"),
        lambda out: bitwright.quantize_best("nowhere", out),
        lambda out: bitwright.dynamic_quantize("nowhere", out, 4.5),
        lambda out: bitwright.dwq_quantize("nowhere", "no", out),
        lambda out: bitwright.dwq_quantize(DEMO, "nowhere", out),
        lambda out: bitwright.quantize_with_transformers("nowhere", out),
        lambda out: bitwright.collect_activations("nowhere", out, "absent.txt"),
        lambda out: bitwright.collect_statistics("nowhere", out, "absent.txt"),
        lambda out: bitwright.estimate_sensitivities("nowhere", "absent.txt"),
        lambda out: bitwright.refine_model("nowhere", "no", out, "absent.txt"),
        lambda out: bitwright.awq_quantize_model("nowhere", out, "absent.npz"),
        lambda out: bitwright.compute_dwq_targets("nowhere", "absent.txt", out),
        lambda out: bitwright.evaluate("nowhere", "absent.txt"),
    ],
)  # fmt: skip
def test_calls_miss_the_model_first(tmp_path: Path, call: Any) -> None:
    with pytest.raises(bitwright.CheckpointNotFoundError, match="^nowhere: there is no such"):
        call(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# dynamic precision's candidates


@pytest.mark.parametrize(
    ("format", "target", "candidates"),
    [
        ("mlx", 4.5, [(3, 64), (4, 64), (5, 64)]),
        ("mlx", 3.6, [(3, 64), (4, 64), (5, 64)]),
        ("mlx", 2.8, [(2, 64), (3, 64), (4, 64)]),
        ("mlx", 6.2, [(4, 64), (5, 64), (6, 64)]),
        ("mlx", 8.0, [(5, 64), (6, 64), (8, 64)]),
        ("gptq", 3.2, [(2, 64), (3, 64), (4, 64)]),
        ("gptq", 5.5, [(3, 64), (4, 64), (8, 64)]),
        ("compressed-tensors", 4.5, [(4, 64), (8, 64)]),
        ("gguf", 5.5, [(4, 32), (5, 32)]),
        ("gguf", 7.0, [(4, 32), (5, 32), (8, 32)]),
    ],
)
def test_default_candidates(
    format: Any, target: float, candidates: list[tuple[int, int | None]]
) -> None:
    """What the format stores, with the target among it."""
    model = bitwright.load_model(DEMO)
    choices = dynamic_choices(model, target, None, format)
    assert list(choices.candidates) == candidates
    for bits, size in candidates:
        for name, shape in model.linear_shapes().items():
            FORMATS[format].check(
                name, shape, bitwright.formats.Precision(bits, size, choices.grid)
            )


def test_default_candidates_follow_the_shapes() -> None:
    """Of GGUF the k grids where rows have whole superblocks; groups that divide all rows."""
    wide = bitwright.load_model(TINY / "qwen2")
    shapes = {f"layer{i}": (64, width) for i, width in enumerate((256, 512))}
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr(Model, "linear_shapes", lambda _: shapes)
        choices = dynamic_choices(wide, 4.5, None, "gguf")
        assert (choices.grid, choices.candidates) == ("k", ((3, 16), (4, 32), (5, 32)))
        shapes["layer2"] = (64, 96)
        choices = dynamic_choices(wide, 5.0, None, "mlx")
        assert {size for _, size in choices.candidates} == {32}
        shapes["layer2"] = (64, 20)
        with pytest.raises(ValueError, match="no precision that fits all layers"):
            dynamic_choices(wide, 4.5, None, "mlx")


@pytest.mark.parametrize(
    ("format", "target"),
    [("mlx", "4.5"), ("gptq", "4.5"), ("gguf", "5.2"), ("compressed-tensors", "4.5")],
)
def test_dynamic_with_its_defaults(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    format: str,
    target: str,
) -> None:
    arguments = ("dynamic", str(DEMO), "--out", str(tmp_path / "out"), "--format", format)
    few = ("--length", "64", "--samples", "4", "--sensitivity-samples", "4", "--calibration", TEXT)
    recipe = tmp_path / "recipe.json"
    wanted = ("--target-bpw", target, "--recipe", str(recipe))
    code, lines = run(monkeypatch, capsys, *arguments, *few, *wanted)
    assert code == 0, lines
    assert {path.name for path in tmp_path.iterdir()} == {"out", "recipe.json"}
    stored = bitwright.load_model(tmp_path / "out")
    planned = bitwright.Recipe.load(recipe)
    assert planned.bits_per_weight <= float(target)
    for name, (bits, _) in planned.layers.items():
        assert stored.quantized(name).bits == bits  # type: ignore[union-attr]


def test_a_corrected_command_goes_on_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that was refused is no interrupted run of the next one."""
    out = ("dynamic", str(DEMO), "--out", str(tmp_path / "out"), "--target-bpw", "4.5", *DATA)
    few = ("--samples", "4", "--sensitivity-samples", "4", "--method", "rtn")
    for wrong in (("--format", "awq"), ("--candidates", "3:48,4:64"), ("--memory", "0.01")):
        assert run(monkeypatch, capsys, *out, *few, *wrong)[0] == 1
        assert list(tmp_path.iterdir()) == []
    code, lines = run(monkeypatch, capsys, *out, *few, "--candidates", "3:32,5:64")
    assert code == 0, lines
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] in (
        3,
        5,
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda out: bitwright.quantize_best(DEMO, out, calibration=TEXT, colour=1),
        lambda out: bitwright.dynamic_quantize(
            DEMO, out, 4.5, calibration=TEXT, colour=1, progress=False
        ),
        lambda out: check_quantization(DEMO, out, calibration=TEXT, colour=1),
    ],
)
def test_keywords_that_nobody_knows(call: Callable[[Path], object], tmp_path: Path) -> None:
    """Where options are handed on, too, and before anything is computed."""
    with pytest.raises(TypeError, match="there is no keyword argument 'colour'"):
        call(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_options_have_the_defaults_of_the_call() -> None:
    parameters = inspect.signature(bitwright.quantize).parameters
    stated = {name: each.default for name, each in parameters.items()}
    del stated["model"], stated["out"]
    assert keyword_defaults() == stated


@pytest.mark.slow
def test_best_takes_the_keywords_of_quantize(tmp_path: Path) -> None:
    options = {"n_grid": 3, "exclude": ["*.v_proj"], "scale_dtype": "float16"}
    tokens = np.arange(64 * 64, dtype=np.int32).reshape(64, 64) % 500
    run = {"calibration": tokens, "progress": False, "overwrite": True, "length": 32}
    report = bitwright.quantize_best(DEMO, tmp_path / "out", "rtn", 3, 32, **run, **options)
    assert not any("v_proj" in layer.name for layer in report.layers)
    assert "n_grid=3" in (tmp_path / "out" / "README.md").read_text()
