"""Kills every command before every change it makes to files, repeats it, and compares all bytes.

    python tests/kill_at_events.py [COMMAND …] [--sample SEED [--draw N]] [--twice] [--errors] [--list]

Each command is run undisturbed once, and its events are counted: what it opens to write, makes, writes,
renames, removes and synchronizes; see file_system_events.py. Then, for each of these events, it is started
anew in the same place, killed just before the event, and repeated to the end. The repeat must end well (or
say that the output exists, where all of it was there), all files must have the bytes of the undisturbed
run, and nothing else may be left, in the folder of the output or in the one for temporary files. Of
several writes in a row to one file, the first, one between and the last are taken.

With --sample only some events are: all around those by which something appears in its place, and N
more, drawn by the seed. With --twice the repeat is killed, too, at an event drawn for each, and repeated
again. With --errors nothing is killed, but each event ends with the error of a full or a broken disk: the
command must end well all the same, or say what is wrong, and the repeat goes on. One row is printed for
each command; the exit status is 1 if any repeat failed.

Models and data are tiny, so that a run takes a fraction of a second.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
sys.path.append(str(Path(__file__).parent / "support"))

import command_server
import file_system_events
import numpy as np
from file_system_events import KILL, WRITES, Answer, Event
from safetensors.numpy import load_file, save_file

import bitwright
from bitwright.checkpoint import work_folder, writer
from bitwright.presets import best
from bitwright.quantization import plan as planner
from bitwright.records import card
from bitwright.runs import states

TESTS = Path(__file__).parent
TINY = TESTS / "data" / "tiny"
MODEL, EXPERTS = TINY / "qwen2", TINY / "qwen3_moe"
FAMILIES = ("bamba", "gemma4", "gpt_oss", "lfm2", "qwen3_5")  # whose blocks are unlike Llama's
HUB_NAME = "org/story"
DEMO = bitwright.demo_folder()
_served: list[object] = []
Content = dict[str, bytes | None]
Run = list[str] | Callable[[], object]


def nothing() -> None:
    """Leave everything as it is."""


@dataclass(frozen=True)
class Command:
    """What is run again and again.

    Attributes
    ----------
    name
        For people.
    run
        Arguments of bitwright, or a function; paths are relative to the folder of the output.
    before
        Commands whose output is there when it starts.
    begun
        Whether an interrupted run of the same is there when it starts.
    patch
        Changes in the child what the place or the model would have to be for.
    needs
        Modules that it takes.
    last
        Where folders are filled file by file in their places, the file that tells that one is whole, or
        "" if each file counts; None where folders appear whole.
    status
        With which it ends.
    """

    name: str
    run: Run
    before: Sequence[Run] = ()
    begun: bool = False
    patch: Callable[[], object] = nothing
    needs: Sequence[str] = ()
    last: str | None = None
    status: int = 0


@dataclass
class Row:
    """What has come of the kills of one command."""

    events: int = 0
    kills: int = 0
    equal: int = 0
    whole: int = 0  # of these, where the output was all there
    left_over: int = 0
    faults: list[str] = field(default_factory=list)


class Place:
    """A folder for the output of commands, and one beside it for temporary files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inputs, self.log = root / "inputs", root / "log.txt"
        self.watched = root / "watched"
        self.folder, self.temporary = self.watched / "place", self.watched / "temporary"
        self.inputs.mkdir()
        self.start = root / "start"
        self.begin(empty=True)

    def begin(self, empty: bool = False) -> None:
        """Make everything as it is when a command starts."""
        if empty:
            shutil.rmtree(self.start, ignore_errors=True)
            self.start.mkdir()
        shutil.rmtree(self.watched, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        shutil.copytree(self.start, self.folder, symlinks=True)

    def keep(self) -> None:
        """Make what is there what is there when a command starts."""
        shutil.rmtree(self.start)
        shutil.copytree(self.folder, self.start, symlinks=True)

    def run(
        self, command: Command, answer: Answer = lambda number, event: 0
    ) -> tuple[int, list[Event]]:
        """Run a command, which does at each event what `answer` says."""
        self.log.write_text("")

        def child() -> int:
            os.chdir(self.folder)
            os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
            command.patch()
            if isinstance(command.run, list):
                return command_server.run(command.run, str(self.log))
            command.run()
            return 0

        return file_system_events.run(child, self.watched, answer)

    def content(self) -> Content:
        """Return all that is there: the bytes of files, None for folders."""
        paths = sorted(self.watched.rglob("*"))
        return {
            str(path.relative_to(self.watched)): path.read_bytes() if path.is_file() else None
            for path in paths
        }


def at(number: int, answer: int) -> Answer:
    """Return what answers so to the event of this number, and lets all others happen."""
    return lambda found, event: answer if found == number else 0


def taken(events: Sequence[Event], sample: random.Random | None, drawn: int) -> list[int]:
    """Choose events to kill at; of writes in a row the first, one between and the last."""
    numbers: list[int] = []
    row: list[int] = []
    for number, event in enumerate([*events, None]):
        if event is not None and event.call in WRITES and row and events[row[0]] == event:
            row.append(number)
            continue
        numbers += sorted({row[0], row[len(row) // 2], row[-1]}) if row else []
        row = []
        if event is not None and event.call in WRITES:
            row = [number]
        elif event is not None:
            numbers.append(number)
    if sample is None:
        return numbers
    moves = [place for place, number in enumerate(numbers) if shows(events[number])]
    near = {place + step for place in moves for step in (0, 1)} & set(range(len(numbers)))
    rest = sorted(set(range(len(numbers))) - near)
    more = sample.sample(rest, min(drawn, len(rest)))
    return [numbers[place] for place in sorted({*near, *more})]


def shows(event: Event) -> bool:
    """Tell whether something gets or loses a name that is not hidden."""
    return event.call.startswith(("rename", "link")) and any(
        not is_hidden(path) for path in event.paths
    )


class Trial:
    """One command, killed at its events one after another.

    Attributes
    ----------
    started, expected
        What is there before an undisturbed run, and after it.
    events
        What it does.
    """

    def __init__(self, command: Command, place: Place, seed: int | None, drawn: int = 1) -> None:
        self.command, self.place, self.row = command, place, Row()
        self.rng = random.Random(f"{command.name} {seed}")
        place.begin(empty=True)
        for before in command.before:
            self._undisturbed(Command("", before))
        place.keep()
        if command.begun:
            events = self._undisturbed(command)
            expected = place.content()
            moved = next(number for number, event in enumerate(events) if shows(event))
            place.begin()
            place.run(command, at(moved * 2 // 3, KILL))
            place.keep()
        self.started = place.content()
        self.events = self._undisturbed(command)
        self.expected = place.content()
        if command.begun and self.expected != expected:
            self.row.faults.append("a resumed run ends otherwise than one that never stopped")
        self.row.events = len(self.events)
        self.numbers = taken(self.events, None if seed is None else self.rng, drawn)

    def kill(self, number: int, twice: bool) -> None:
        """Kill the command before an event, and repeat it."""
        command, place, row = self.command, self.place, self.row
        place.begin()
        where = f"killed before event {number}, {self.events[number]}"
        status, seen = place.run(command, at(number, KILL))
        if [each.call for each in seen] != [each.call for each in self.events[: number + 1]]:
            row.faults.append(f"{where}: it did something else before, up to {seen[-1]}")
        if status != -signal.SIGKILL:
            row.faults.append(f"{where}: it ended with {status} before")
            return
        row.kills += 1
        self._check_half(where)
        if twice:
            second = self.rng.randrange(len(self.events))
            status, seen = place.run(command, at(second, KILL))
            if status == -signal.SIGKILL:
                row.kills += 1
                where += f", then before event {second}, {seen[-1]}"
        self._repeat(where)

    def fail(self, number: int) -> None:
        """Have an event end with an error, and repeat the command if that was its end."""
        place, error = self.place, self.rng.choice([errno.ENOSPC, errno.EIO])
        place.begin()
        where = f"{errno.errorcode[error]} at event {number}, {self.events[number]}"
        status, _ = place.run(self.command, at(number, error))
        said = place.log.read_text()
        self.row.kills += 1
        self._check_half(where)
        if status == self.command.status:
            self._check_end(where, status, hidden=False)  # what cannot be removed stays
            return
        if status != 1 or "Traceback" in said:
            self.row.faults.append(f"{where}: status {status}: {last_line(said)}")
        self._repeat(where)

    def _undisturbed(self, command: Command) -> list[Event]:
        status, events = self.place.run(command)
        if status != command.status:
            raise RuntimeError(f"an undisturbed run failed: {self.place.log.read_text()}")
        return events

    def _check_half(self, where: str) -> None:
        half = half_written(self.command, self.place.content(), self.started, self.expected)
        if half:
            self.row.faults.append(f"{where}: half-written: {', '.join(half)}")

    def _repeat(self, where: str) -> None:
        whole = differences(self.place.content(), self.expected, hidden=False) == []
        status, _ = self.place.run(self.command)
        if status == 1 and whole and "exists already" in self.place.log.read_text():
            self.row.whole += 1
            status = self.command.status
        self._check_end(where, status)

    def _check_end(self, where: str, status: int, hidden: bool = True) -> None:
        differ = differences(self.place.content(), self.expected, hidden)
        self.row.left_over += any(each.startswith("left") for each in differ)
        if differ or status != self.command.status:
            said = last_line(self.place.log.read_text())
            self.row.faults.append(f"{where}: status {status}, {'; '.join(differ)}: {said}")
        else:
            self.row.equal += 1


def last_line(text: str) -> str:
    return next(iter(text.strip().splitlines()[-1:]), "")


def differences(found: Content, expected: Content, hidden: bool = True) -> list[str]:
    """Say in what two folders differ, hidden files included or not."""
    return [
        f"left {path}" if path not in expected
        else f"no {path}" if path not in found
        else f"other bytes in {path}"
        for path in sorted({*found, *expected})
        if found.get(path, 0) != expected.get(path, 0) and (hidden or not is_hidden(path))
    ]  # fmt: skip


def half_written(
    command: Command, found: Content, started: Content, expected: Content
) -> list[str]:
    """Return what is there of the output, neither as it was nor as it will be.

    Temporary folders have other names each time; the repeat has to remove them."""
    files: Content = {
        path: data
        for path, data in found.items()
        if data is not None and not is_hidden(path) and not path.startswith("temporary/")
    }
    wrong = [
        path for path, data in files.items() if data not in (started.get(path), expected.get(path))
    ]

    def folders(content: Content) -> dict[str, Content]:
        found: dict[str, Content] = {}
        for path, data in content.items():
            if data is not None and not is_hidden(path):
                found.setdefault(os.path.dirname(path), {})[path] = data
        return found

    before, after = folders(started), folders(expected)
    return wrong + [
        folder
        for folder, content in folders(files).items()
        if folder != "place"
        and content not in (before.get(folder), after.get(folder))
        and (command.last is None or f"{folder}/{command.last}" in content)
    ]


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def taken_for_mount_point() -> None:
    """Have the output taken for a folder that cannot be moved."""
    vars(work_folder)["is_mount_point"] = lambda place: place.name == "out"


def states_in_files() -> None:
    """Have no room in memory for what layers see."""
    shared = states.ChunkPlan.shared

    def without_room(*arguments: Any) -> states.ChunkPlan:
        return replace(shared(*arguments), resident=0)

    states.ChunkPlan.shared = without_room  # type: ignore[method-assign, assignment]


def ask_a_hub() -> None:
    """Serve the model on loopback, to a client with a cache beside the place, which it has filled before.

    How the client fills one is its own affair, and in another order each time."""
    import pytest
    from hub_server import TOKEN, client_of_server

    patch = pytest.MonkeyPatch()
    context = client_of_server(Path.cwd().parents[1], patch)
    context.__enter__().models[HUB_NAME, "main"] = MODEL
    patch.setenv("HF_TOKEN", TOKEN)
    patch.chdir("watched/place")
    _served.append(context)  # until the child ends


def add_evaluations() -> None:
    """Add a table to the card of the output."""
    found = bitwright.evaluate(MODEL, np.arange(64).reshape(4, 16))
    card.add_evaluations("out", {"original": found})


def small_files() -> None:
    """Have weights in several files."""
    writer.CheckpointWriter.__init__.__defaults__ = tuple(
        30_000 if value == writer.SHARD_BYTES else value
        for value in writer.CheckpointWriter.__init__.__defaults__ or ()
    )


def commands(inputs: Path) -> Iterator[Command]:
    """Yield all commands."""
    ids, other_ids = str(inputs / "ids.npy"), str(inputs / "other.npy")
    model, wide, out = str(MODEL), str(inputs / "wide"), ["--out", "out"]
    one = ["--threads", "1"]
    read = ["--calibration", ids, *one]
    gptq, rtn = ["quantize", model, *out, "--group-size", "32", *read], inputs / "rtn"
    for method in ("gptq", "rtn", "awq", "awq+gptq", "salient"):
        yield Command(f"quantize {method}", [*gptq, "--method", method])
    for name in ("gptq", "awq", "compressed-tensors", "gguf", "marlin"):
        size = "128" if name == "marlin" else "32"
        source = {"marlin": wide, "gguf": str(DEMO)}.get(name, model)
        arguments = ["quantize", source, *out, "--format", name, "--group-size", size, *read]
        yield Command(f"quantize to {name}", arguments)
    yield Command("quantize k", ["quantize", wide, *out, "--format", "gguf", "--grid", "k", *read])
    yield Command("quantize fast", [*gptq, "--preset", "fast"])
    yield Command("quantize high", [*gptq, "--preset", "high"])
    yield Command("quantize best", [*gptq, "--preset", "best", "--bits", "4"])
    for name in ("mxfp4", "nvfp4"):
        yield Command(f"quantize {name}", ["quantize", model, *out, "--bits", name, *read])
    for name in ("iq4_nl", "iq4_xs"):
        to = ["quantize", wide, *out, "--format", "gguf", "--bits", name, *read]
        yield Command(f"quantize {name}", to)
    types = ["quantize", wide, *out, "--format", "gguf", "--type", "Q4_K_M", *read]
    yield Command("quantize to a mixture of types", types)
    split = ["quantize", wide, *out, "--format", "gguf", "--split-max-size", "200K", *read]
    yield Command("quantize to GGUF files", split)
    experts = ["quantize", str(EXPERTS), *out, "--group-size", "32", *read]
    yield Command("quantize experts", experts)
    for name in FAMILIES:
        rows = ["--format", "compressed-tensors", "--group-size", "-1"]
        yield Command(f"quantize {name}", ["quantize", str(TINY / name), *out, *rows, *read])
    adapter = str(inputs / "adapter")
    yield Command("quantize an adapter", ["quantize", adapter, *out, "--group-size", "32", *read])
    yield Command("convert an adapter", ["convert", adapter, *out, "--format", "float"])
    hub: dict[str, Any] = {"patch": ask_a_hub, "needs": ("huggingface_hub",)}
    named = ["quantize", HUB_NAME, *out, "--group-size", "32", *read]
    yield Command("quantize from the hub", named, **hub)
    yield Command("quantize and upload", [*gptq, "--push-to", "me/q"], **hub)
    settings = ["--save-config", "run.yaml"]
    yield Command("quantize and save settings", [*gptq, *settings])
    yield Command("quantize imatrix", [*gptq[:-4], "--imatrix", str(inputs / "i.gguf"), *one])
    yield Command("quantize in files", [*gptq, "--method", "rtn"], patch=small_files)
    yield Command("quantize in little memory", gptq, patch=states_in_files)
    spoilt = ["quantize", str(inputs / "spoilt"), *out, "--group-size", "32", *read]
    yield Command("quantize what cannot be", spoilt, status=1)
    yield Command("quantize deeper", [*gptq, "--out", "a/b/out"])
    linked = [lambda: os.mkdir("there"), lambda: os.symlink("there", "out")]
    yield Command("quantize through a link", gptq, linked)
    yield Command("quantize again", [*gptq, "--overwrite"], [[*gptq, "--bits", "3"]])
    yield Command("quantize resumed", gptq, begun=True)
    yield Command(
        "quantize anew", [*gptq, "--no-resume", "--overwrite"], [[*gptq, "--bits", "3"]], True
    )
    fixed: dict[str, Any] = {"patch": taken_for_mount_point, "last": "config.json"}
    yield Command("quantize in place", gptq, [lambda: os.mkdir("out")], **fixed)
    yield Command(
        "quantize in place again", [*gptq, "--overwrite"], [[*gptq, "--bits", "3"]], **fixed
    )
    statistics = ["--statistics", str(inputs / "statistics")]
    yield Command(
        "quantize statistics", ["quantize", model, *out, "--group-size", "32", *statistics, *one]
    )
    yield Command(
        "quantize transformers",
        [*gptq, "--backend", "transformers"],
        needs=("torch", "transformers.models.qwen2.modeling_qwen2"),
    )
    salient = [
        *("salient", model, "--out", "out", "--group-size", "32"),
        *("--activations", "a.npz", *one),
    ]
    yield Command("salient", [*salient, "--calibration", ids])
    yield Command("salient dry", [*salient, "--calibration", ids, "--dry-run"])
    yield Command("salient given", salient, [[*salient, "--calibration", ids, "--dry-run"]])
    yield Command(
        "salient again",
        [*salient, "--calibration", ids, "--overwrite"],
        [[*salient, "--calibration", other_ids]],
    )
    data = ["--calibration", ids, "--batch-size", "2", *one]
    low = ["--low", "3:32", "--high", "4:32"]
    sensitivities = ["sensitivities", model, "--out", "s.json", *data, *low]
    yield Command("sensitivities", sensitivities)
    yield Command(
        "sensitivities plot", [*sensitivities, "--plot", "s.svg"], needs=("matplotlib.figure",)
    )
    dynamic = [
        *("dynamic", model, *out, "--calibration", ids, *one, "--target-bpw", "4.4"),
        *("--candidates", "3:32,4:32"),
    ]
    extra = ["--sensitivities", "s.json", "--recipe", "r.json", "--evaluation", ids]
    yield Command("dynamic", dynamic)
    yield Command("dynamic files", [*dynamic, *extra])
    yield Command("dynamic again", [*dynamic, *extra, "--overwrite"], [dynamic])
    dwq = ["dwq", *out, *data, "--checkpoint-every", "1", "--validate-every"]
    dwq += ["2", "--tokens", "128", "--validation-samples", "2"]
    given = [str(rtn), "--reference", model]
    made = [model, "--group-size", "32", "--bits", "3"]
    yield Command("dwq", [*dwq, *given])
    yield Command("dwq targets", [*dwq, *given, "--targets", "targets"], last="")
    yield Command("dwq made", [*dwq, *made])
    yield Command("dwq dynamic", [*dwq, *made, "--target-bpw", "4.4", "--candidates", "3:32,4:32"])
    yield Command("dwq plot", [*dwq, *given, "--plot", "p.svg"], needs=("matplotlib.figure",))
    yield Command("dwq again", [*dwq, *given, "--overwrite"], [[*dwq, *made]])
    yield Command("refine", ["refine", str(rtn), "--reference", model, *out, *read])
    for source, to in (("rtn", "gptq"), ("demo", "gguf"), ("rtn", "float"), ("gguf", "mlx")):
        yield Command(f"convert {source} to {to}", [
            "convert", str(inputs / source), *out, "--format", to, "--allow-requantize"
        ])  # fmt: skip
    convert_back = ["convert", str(rtn), *out, "--format", "float"]
    yield Command("convert again", [*convert_back, "--overwrite"], [gptq])
    collect = ["statistics", "collect", model, *out, *read]
    yield Command("statistics collect", collect)
    yield Command(
        "statistics collect experts", ["statistics", "collect", str(EXPERTS), *out, *read]
    )
    yield Command("statistics resumed", collect, begun=True)
    parts = [str(inputs / "statistics"), str(inputs / "more")]
    yield Command("statistics merge", ["statistics", "merge", *parts, *out])
    for name in ("i.gguf", "i.dat"):
        export = ["statistics", "export", str(inputs / "statistics"), "--imatrix", name]
        yield Command(f"statistics export {name}", export)
    yield Command(
        "evaluate", ["evaluate", str(rtn), "--reference", model, "--evaluation", ids, *one]
    )
    yield Command("evaluations on the card", add_evaluations, [gptq])
    yield Command("inspect", ["inspect", str(rtn), *one])
    yield Command("demo", ["demo", *one])


def make_wide(folder: Path) -> None:
    """Write the first block of the demo model with four times the channels."""
    shutil.copytree(DEMO, folder)
    config = json.loads((DEMO / "config.json").read_text())
    config |= {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    wide = {}
    for name, tensor in load_file(DEMO / "model.safetensors").items():
        times = (1 if "embed" in name else 4, 4) if tensor.ndim == 2 else (4,)
        if ".layers." not in name or ".layers.0." in name:
            wide[name] = np.tile(tensor, times)
    save_file(wide, folder / "model.safetensors")


def make_spoilt(folder: Path) -> None:
    """Write the model with a weight in its last block that is no number."""
    shutil.copytree(MODEL, folder)
    tensors = load_file(MODEL / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors")


def make_adapter(folder: Path) -> None:
    """Write a LoRA adapter of the model's queries."""
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    said["base_model_name_or_path"] = str(MODEL)
    (folder / "adapter_config.json").write_text(json.dumps(said))
    prefix, rng = "base_model.model.model.layers.0.self_attn.q_proj", np.random.default_rng(1)
    rows, columns = load_file(MODEL / "model.safetensors")[
        "model.layers.0.self_attn.q_proj.weight"
    ].shape
    factors = {
        f"{prefix}.lora_A.weight": rng.standard_normal((2, columns), np.float32) / 8,
        f"{prefix}.lora_B.weight": rng.standard_normal((rows, 2), np.float32) / 8,
    }
    save_file(factors, folder / "adapter_model.safetensors")


def make_inputs(place: Place) -> None:
    """Write what the commands read."""
    inputs, rng = place.inputs, np.random.default_rng(0)
    make_wide(inputs / "wide")
    make_spoilt(inputs / "spoilt")
    make_adapter(inputs / "adapter")
    rtn = ["--method", "rtn", "--group-size", "32", "--threads", "1", "--out"]
    made = [
        ["quantize", str(MODEL), *rtn, str(inputs / "rtn")],
        ["quantize", str(DEMO), *rtn, str(inputs / "demo")],
        ["quantize", str(DEMO), "--format", "gguf", *rtn, str(inputs / "gguf")],
    ]
    for ids, statistics in ("ids.npy", "statistics"), ("other.npy", "more"):
        np.save(inputs / ids, rng.integers(0, 64, (6, 16)))
        collect = ["statistics", "collect", str(MODEL), "--threads", "1"]
        made.append(
            [*collect, "--calibration", str(inputs / ids), "--out", str(inputs / statistics)]
        )
    export = ["statistics", "export", str(inputs / "statistics")]
    made.append([*export, "--imatrix", str(inputs / "i.gguf")])
    for arguments in made:
        status, _ = place.run(Command("", arguments))
        assert status == 0, place.log.read_text()


def make_runs_short() -> None:
    """Leave out what takes long and changes nothing in kind."""
    planner.MEASURED_SECONDS, planner.MEASURED_SIZE = 0.0, 8  # only a forecast is made with it
    best.TRAINED_TOKENS = 256


def is_there(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="*", help="Names, or their beginnings; by default all.")
    parser.add_argument("--sample", type=int, metavar="SEED", help="Kill at some events only.")
    parser.add_argument("--draw", type=int, metavar="N", default=1, help="How many of them.")
    parser.add_argument("--twice", action="store_true", help="Kill the repeat, too.")
    parser.add_argument("--errors", action="store_true", help="Let events fail, instead of kills.")
    parser.add_argument("--list", action="store_true", help="Print the commands' names.")
    options = parser.parse_args()
    if problem := file_system_events.missing():
        parser.error(problem)
    make_runs_short()
    failed = False
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        place = Place(Path(os.path.realpath(root)))
        known = {each.name: each for each in commands(place.inputs)}
        named = [
            [name] if name in known else [each for each in known if each.startswith(name)]
            for name in options.command or [""]
        ]
        if unknown := [
            name for name, found in zip(options.command, named, strict=False) if not found
        ]:
            parser.error(f"unknown commands: {', '.join(unknown)}")
        chosen = [known[name] for names in named for name in names]
        if options.list:
            print(*(each.name for each in chosen), sep="\n")
            return 0
        make_inputs(place)
        print(
            "| command | events | kills | equal | whole already | left-overs | faults | seconds |"
        )
        print("|---|--:|--:|--:|--:|--:|--:|--:|")
        for command in chosen:
            lacking = [each for each in command.needs if not is_there(each)]
            if lacking:
                print(f"| {command.name} | needs {', '.join(lacking)} |", flush=True)
                continue
            start = time.perf_counter()
            try:
                trial = Trial(command, place, options.sample, options.draw)
            except RuntimeError as error:
                print(f"{command.name}: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            for number in trial.numbers:
                if options.errors:
                    trial.fail(number)
                else:
                    trial.kill(number, options.twice)
            row, seconds = trial.row, time.perf_counter() - start
            numbers = (row.events, row.kills, row.equal, row.whole, row.left_over, len(row.faults))
            cells = " | ".join(map(str, numbers))
            print(f"| {command.name} | {cells} | {seconds:.1f} |", flush=True)
            for fault in row.faults:
                print(f"{command.name}: {fault}", file=sys.stderr, flush=True)
            failed = failed or bool(row.faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
