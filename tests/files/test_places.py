"""Where results may lie: mount points, closed folders, ~, and files that others have made."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from told import TOLD

import bitwright
from bitwright.checkpoint import CheckpointWriter, work_folder
from bitwright.checkpoint.work_folder import LAST, WorkFolder, content_of
from bitwright.cli.main import cli
from bitwright.files.home import expanded
from bitwright.files.replacing import taken
from bitwright.runs.journal import Journal

DEMO = bitwright.demo_folder()
TEXT = DEMO / "calibration.txt"
SETTINGS: dict[str, Any] = {"calibration": TEXT, "samples": 8, "length": 64, "progress": False}


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint but for its card, which names the command."""
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in TOLD
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    bitwright.quantize(DEMO, out, **SETTINGS)
    return content(out)


# mount points


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture(params=["disk", "part of the same disk", "closed parent", "link"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty folder that cannot be moved, as containers are given it."""
    out, points = tmp_path / "out with spaces", list[Path]()
    try:
        if request.param == "closed parent":
            out = tmp_path / "parent" / "out"
            out.parent.mkdir()
            mount("-t", "tmpfs", "tmpfs", str(out.parent))
            points.append(out.parent)
        out.mkdir()
        if request.param == "part of the same disk":
            (tmp_path / "data").mkdir()
            mount("--bind", str(tmp_path / "data"), str(out))
        else:
            mount("-t", "tmpfs", "tmpfs", str(out))
        points.append(out)
        if request.param == "closed parent":
            mount("-o", "remount,ro", str(out.parent))
        if request.param == "link":
            (tmp_path / "link").symlink_to(out)
            yield tmp_path / "link"
        else:
            yield out
    finally:
        for point in reversed(points):
            subprocess.run(["umount", "--lazy", str(point)], check=False)


def test_outputs_that_are_mount_points(mounted: Path, undisturbed: dict[str, bytes]) -> None:
    """Written into, and written over where that is asked for."""
    (mounted / "lost+found").mkdir()
    for _ in range(2):
        bitwright.quantize(DEMO, mounted, overwrite=True, **SETTINGS)
        (mounted / "lost+found").rmdir()
        assert content(mounted) == undisturbed
        (mounted / "lost+found").mkdir()
    with pytest.raises(bitwright.OutputExistsError, match="exists already"):
        bitwright.quantize(DEMO, mounted, **SETTINGS)


def test_closed_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is computed."""
    closed = tmp_path / "closed"
    closed.mkdir()
    mount("-t", "tmpfs", "-o", "ro", "tmpfs", str(closed))
    monkeypatch.setattr("bitwright.loading.model.Model.block", None)
    monkeypatch.setattr("bitwright.precision.estimate._Estimate._batch", None)
    try:
        for out in (closed, closed / "out", closed / "new" / "out"):
            with pytest.raises(bitwright.OutputError, match="cannot be written: Read-only"):
                bitwright.quantize(DEMO, out, **SETTINGS)
            with pytest.raises(bitwright.OutputError, match="cannot be written: Read-only"):
                bitwright.collect_statistics(DEMO, out, **SETTINGS)
        for file in (closed / "s.json", closed / "new" / "s.json"):
            with pytest.raises(bitwright.OutputError, match="nothing can be made in"):
                bitwright.estimate_sensitivities(DEMO, TEXT, out=file)
    finally:
        subprocess.run(["umount", "--lazy", str(closed)], check=False)


def test_files_that_are_mount_points(tmp_path: Path) -> None:
    for name in ("there", "s.json"):
        (tmp_path / name).touch()
    mount("--bind", str(tmp_path / "there"), str(tmp_path / "s.json"))
    try:
        with pytest.raises(bitwright.OutputError, match="it is a mount point. Mount the folder"):
            bitwright.estimate_sensitivities(DEMO, TEXT, out=tmp_path / "s.json", overwrite=True)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "s.json")], check=False)


# the same where nothing can be mounted


@pytest.fixture
def fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is taken for a mount point."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(work_folder, "is_mount_point", lambda place: place == out)
    return out


def test_all_that_is_written_as_folders(tmp_path: Path, fixed: Path) -> None:
    few: dict[str, Any] = {"length": 64, "progress": False}
    inode = fixed.stat().st_ino
    short = tmp_path / "short.txt"
    short.write_text(TEXT.read_text()[:2000])

    def emptied(*expected: str) -> None:
        assert set(expected) <= names(fixed)
        assert not any(name.startswith(".") for name in names(fixed))
        assert fixed.stat().st_ino == inode
        for path in list(fixed.iterdir()):
            path.unlink()

    bitwright.collect_statistics(DEMO, fixed, TEXT, samples=4, **few)
    assert bitwright.Statistics(fixed).tokens == 4 * 64
    emptied("statistics.json", "head.safetensors")
    bitwright.dynamic_quantize(
        DEMO,
        fixed,
        4.5,
        None,
        "rtn",
        calibration=TEXT,
        sensitivity_samples=4,
        evaluation=short,
        **few,
    )
    emptied("config.json", "model.safetensors")
    bitwright.dwq_quantize(
        DEMO,
        lambda folder: bitwright.quantize(DEMO, folder, "rtn", 3, progress=False),
        fixed,
        short,
        tokens=256,
        **few,
    )
    emptied("config.json", "dwq.json")
    bitwright.compute_dwq_targets(DEMO, TEXT, fixed, k=8, length=64, samples=2)
    bitwright.compute_dwq_targets(DEMO, TEXT, fixed, k=8, length=64, samples=2)
    emptied("targets.json")
    bitwright.quantize(DEMO, fixed, "rtn", format="gguf", group_size=32, progress=False)
    bitwright.convert(fixed, tmp_path / "float", "float", progress=False)
    emptied("model.gguf")


def test_interrupted_runs_go_on_inside(
    fixed: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    commit, done = Journal.commit, []

    def committed(journal: Journal, blocks: int, *rest: Any) -> None:
        commit(journal, blocks, *rest)
        done.append(blocks)
        if done == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "commit", committed)
    with pytest.raises(KeyboardInterrupt, match=f"resumes from what is done, in {fixed}/.out.work"):
        bitwright.quantize(DEMO, fixed, **SETTINGS)
    assert names(fixed) == {".out.work"}
    with pytest.raises(bitwright.ResumeError, match="other options"):
        bitwright.quantize(DEMO, fixed, bits=3, **SETTINGS)
    bitwright.quantize(DEMO, fixed, **SETTINGS)
    assert done == [1, 2, 3]
    assert content(fixed) == undisturbed
    assert names(fixed.parent) == {"out"}


def write(out: Path, value: int) -> None:
    with CheckpointWriter(out, overwrite=True, shard_bytes=12) as writer:
        for name in "ab":
            writer.add(name, np.full(3, value, np.float32))
        writer.write_text("note.txt", str(value))
        writer.write_json("config.json", {"model_type": "llama"})


def in_a_child(act: Callable[[], None]) -> int:
    """Run something in a process of its own; return its exit status."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("replaces", [False, True])
def test_kills_while_files_are_moved(
    fixed: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    """At whatever move: config.json is only there with all others, and the next run takes all back."""
    if replaces:
        write(fixed, 1)
    old, killed_at = content(fixed), 0
    rename, os_rename = Path.rename, os.rename
    while True:
        moves = 0

        def count(killed_at: int = killed_at) -> None:
            nonlocal moves
            moves += WorkFolder(fixed).path.joinpath(LAST).exists()
            if moves > killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

        def path_rename(path: Path, target: Any, count: Callable[[], None] = count) -> Path:
            count()
            return rename(path, target)

        def plain_rename(path: Any, target: Any, count: Callable[[], None] = count) -> None:
            count()
            os_rename(path, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", path_rename)
            patched.setattr(os, "rename", plain_rename)
            status = in_a_child(lambda: write(fixed, 2))
        if status != -signal.SIGKILL:
            break
        killed_at += 1
        present = names(fixed) - {".out.work"}
        if "config.json" in present:
            assert present == {*old} or (fixed / "note.txt").read_text() == "2"
        if not (fixed / "config.json").exists() or killed_at == 1:
            with WorkFolder(fixed):
                pass
            assert content(fixed) == old
    assert killed_at > 4
    assert (fixed / "note.txt").read_text() == "2"
    assert content_of(fixed)
    assert names(fixed.parent) == {"out"}


def everything(place: Path) -> dict[str, bytes]:
    files = (path for path in sorted(place.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


@pytest.mark.parametrize("place", [0, 3, "name", "checksum", "cut", "no text"])
def test_a_damaged_list_of_moves_is_named(
    fixed: Path, monkeypatch: pytest.MonkeyPatch, place: int | str
) -> None:
    """By it what is half done is taken back, so what it has become is not guessed; nothing is lost."""
    write(fixed, 1)
    last, rename, os_rename = WorkFolder(fixed).path / LAST, Path.rename, os.rename

    def killed(move: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *paths: os._exit(9) if last.exists() else move(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed(rename))
        patched.setattr(os, "rename", killed(os_rename))
        assert in_a_child(lambda: write(fixed, 2)) == 9
    whole = last.read_bytes()
    damaged = bytearray(whole)
    if place == "no text":
        damaged = bytearray(b"\xbb\xfe" + whole[2:])
    elif place == "cut":
        del damaged[-1:]
    else:
        at = {"name": whole.index(b"note.txt"), "checksum": len(whole) - 1}.get(str(place), place)
        damaged[int(at)] ^= 1
    last.write_bytes(damaged)
    before = everything(fixed.parent)
    for _ in range(2):
        with pytest.raises(bitwright.OutputError, match=f"{last}: was changed since .* remove"):
            write(fixed, 3)
        assert everything(fixed.parent) == before
    last.write_bytes(whole)
    write(fixed, 3)
    assert (fixed / "note.txt").read_text() == "3"


@pytest.mark.parametrize("kind", ["recipe", "sensitivities", "plot"])
@pytest.mark.parametrize("there", [True, False])
def test_links_to_files_are_followed(tmp_path: Path, kind: str, there: bool) -> None:
    """What they lead to is written, and they stay; what is not ours is not replaced through them."""
    known = bitwright.Sensitivities(
        {"a": 0.1, "b": 0.2}, {"a": 64, "b": 64}, (3, 64), (5, 64), "model", "tokens", "kl", 0.1
    )
    link, real = tmp_path / "link.svg", tmp_path / "disk" / "[real].svg"
    real.parent.mkdir()
    if kind == "plot":
        pytest.importorskip("matplotlib")
    from bitwright.records.plots import check_plot

    writes: dict[str, Callable[[Path], None]] = {
        "recipe": bitwright.Recipe({"a": (4, 64)}, 4.5, 4.5).save,
        "sensitivities": known.save,
        "plot": lambda path: bitwright.plot_sensitivities(known, path),
    }
    writes[kind](real)
    whole = real.read_bytes()
    if not there:
        real.unlink()
    link.symlink_to("disk/[real].svg")
    (real.parent / ".[real].svg.partial-x").write_text("left by a run that was killed")
    writes[kind](link)
    assert link.is_symlink()
    assert real.read_bytes() == whole
    assert names(tmp_path) == {"link.svg", "disk"}
    assert names(real.parent) == {"[real].svg"}
    if kind == "plot":
        real.unlink()
        check_plot(link)
        real.write_text("mine")
        with pytest.raises(bitwright.OutputExistsError, match="link.svg"):
            check_plot(link)


@pytest.mark.parametrize("inside", [True, False])
def test_errors_while_files_are_moved(
    fixed: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """What was there before is there again."""
    if not inside:
        monkeypatch.setattr(work_folder, "is_mount_point", lambda _: False)
    write(fixed, 1)
    old, rename = content(fixed), Path.rename

    def fail(path: Path, target: Any) -> Path:
        wanted = "config.json" if inside else "checkpoint"
        if path.name == wanted and path.parent.name in ("checkpoint", ".out.work"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(bitwright.OutputError, match="No space left"):
            write(fixed, 2)
    assert content(fixed) == old
    assert names(fixed.parent) == {"out"}
    write(fixed, 2)
    assert (fixed / "note.txt").read_text() == "2"


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY, errno.EPERM])
def test_folders_that_cannot_be_moved_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """As those of a container's image: their files can be."""
    out = tmp_path / "out"
    write(out, 1)
    rename, inode = Path.rename, out.stat().st_ino

    def refuse(path: Path, target: Any) -> Path:
        if out in (path, target):
            raise OSError(code, os.strerror(code))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    write(out, 2)
    assert (out / "note.txt").read_text() == "2"
    assert out.stat().st_ino == inode
    assert names(tmp_path) == {"out"}


def test_a_killed_command_goes_on_inside(
    tmp_path: Path, fixed: Path, undisturbed: dict[str, bytes]
) -> None:
    """A whole run, killed between two of its last moves, ends in the same bytes."""
    program = """
import os, signal, sys
from pathlib import Path
import bitwright
from bitwright.checkpoint import work_folder
out, rename = Path(sys.argv[1]), Path.rename
work_folder.is_mount_point = lambda place: place == out
def killed(path, target):
    if path.name == "model.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
killer = lambda: setattr(Path, "rename", killed)
put = work_folder.WorkFolder.put_into_place
work_folder.WorkFolder.put_into_place = lambda *a, **k: (killer(), put(*a, **k))
text = bitwright.demo_folder() / "calibration.txt"
bitwright.quantize(
    bitwright.demo_folder(), out, calibration=text, samples=8, length=64, progress=False
)
"""
    done = subprocess.run([sys.executable, "-c", program, str(fixed)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert "model.safetensors" not in names(fixed)
    assert {".out.work", "README.md", "generation_config.json"} <= names(fixed)
    bitwright.quantize(DEMO, fixed, **SETTINGS)
    assert content(fixed) == undisturbed
    assert names(tmp_path) == {"out"}


# ~


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a model and a text, beside the folder that everything runs in."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "model").symlink_to(DEMO)
    (folder / "text.txt").symlink_to(TEXT)
    monkeypatch.setenv("HOME", str(folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


@pytest.mark.slow
def test_home_in_calls(home: Path) -> None:
    few: dict[str, Any] = {"length": 64, "samples": 4}
    quiet: dict[str, Any] = {"progress": False}
    text = "~/text.txt"
    report = bitwright.quantize(
        "~/model", "~/q", calibration=Path(text), preset="fast", **few, **quiet
    )
    assert report.out == home / "q"
    found = bitwright.estimate_sensitivities("~/model", text, out="~/s.json", **few, **quiet)
    assert bitwright.Sensitivities.load("~/s.json") == found
    bitwright.choose_precisions("~/model", found, 4.5).save("~/r.json")
    bitwright.quantize("~/model", "~/r", "rtn", recipe="~/r.json", **quiet)
    bitwright.dynamic_quantize(
        "~/model",
        "~/d",
        4.5,
        method="rtn",
        sensitivities="~/s.json",
        evaluation=text,
        **few,
        **quiet,
    )
    bitwright.collect_statistics("~/model", "~/part-1", text, **few, **quiet)
    bitwright.collect_statistics("~/model", "~/part-2", text, seed=1, length=32, samples=4, **quiet)
    bitwright.merge_statistics(["~/part-1", Path("~/part-2")], "~/stats")
    bitwright.quantize("~/model", "~/known", statistics="~/stats", **quiet)
    bitwright.collect_activations("~/model", "~/a.npz", text, **few)
    bitwright.awq_quantize_model("~/model", "~/awq", "~/a.npz", 32, verbose=False)
    bitwright.compute_dwq_targets("~/model", text, "~/targets", k=8, **few)
    bitwright.DwqTargets("~/targets")
    bitwright.dwq_quantize(
        "~/model", "~/q", "~/dwq", text, length=64, tokens=256, k=64, targets="~/t", **quiet
    )
    bitwright.refine_model("~/model", "~/q", "~/refined", text, **few, **quiet)
    bitwright.convert("~/q", "~/float", "float", **quiet)
    bitwright.evaluate("~/q", text, reference="~/model", **few)
    assert bitwright.inspect_model("~/model").blocks == 3
    assert bitwright.Checkpoint("~/q").config == bitwright.load_model("~/q").checkpoint.config
    ids = bitwright.load_tokens(text, tokenizer="~/model", **few)
    # A text is no path.
    assert len(bitwright.load_tokens(["~/text.txt"] * 99, tokenizer="~/model", **few)) == len(ids)
    assert names(home) >= {"q", "r", "d", "known", "stats", "awq", "dwq", "refined", "float", "t"}
    assert not names(Path.cwd())


@pytest.mark.slow
def test_home_in_commands(home: Path) -> None:
    """Also after "--out=", which the shell leaves alone."""
    few = ["--length", "64", "--samples", "4"]
    for arguments in (
        ["quantize", "~/model", "--out=~/q", "--calibration=~/text.txt", "--preset=fast", *few],
        ["sensitivities", "~/model", "--out=~/s.json", "--calibration=~/text.txt", *few],
        ["dynamic", "~/model", "--out=~/d", "--target-bpw=4.5", "--calibration=~/text.txt", *few,
         "--method=rtn", "--sensitivities=~/s.json", "--recipe=~/r.json", "--evaluation=~/text.txt"],
        ["statistics", "collect", "~/model", "--out=~/stats", "--calibration=~/text.txt", *few],
        ["statistics", "merge", "~/stats", "--out=~/merged"],
        ["dwq", "~/model", "--out=~/dwq", "--calibration=~/text.txt", "--tokens=256",
         "--length=64", "--student-calibration=~/text.txt", "--method=rtn"],
        ["convert", "~/q", "--out=~/float", "--format=float"],
        ["refine", "~/q", "--reference=~/model", "--out=~/better", "--calibration=~/text.txt", *few],
        ["salient", "~/model", "--out=~/w", "--activations=~/a.npz",
         "--calibration=~/text.txt", "--group-size=32", *few],
        ["evaluate", "~/q", "--reference=~/model", "--evaluation=~/text.txt", *few],
        ["inspect", "~/model"],
    ):  # fmt: skip
        cli.main(arguments, standalone_mode=False)
    written = {"q", "s.json", "d", "r.json", "stats", "merged", "dwq", "float", "better", "w"}
    assert names(home) >= {*written, "a.npz"}
    assert not names(Path.cwd())


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~") == "/home/me"
    assert expanded("~/x") == "/home/me/x"
    assert expanded(Path("~/x")) == Path("/home/me/x")
    assert expanded("~root") == os.path.expanduser("~root") != "~root"
    for kept in ("a/~/x", "x~", "~nobody-has-this-name/x", ["~"], None, 3):
        assert expanded(kept) == kept


def test_every_public_path_expands() -> None:
    """Whatever has a parameter that may be a path has the wrapper that expands it."""

    def expands(function: Any) -> bool:
        while function is not None:
            if function.__code__.co_filename.endswith("bitwright/files/home.py"):
                return True
            function = getattr(function, "__wrapped__", None)
        return False

    seen = 0
    for name in bitwright.__all__:
        public = getattr(bitwright, name)
        if isinstance(public, type):
            methods = (getattr(public, each, None) for each in ("__init__", "load", "save"))
        else:
            methods = iter([public])
        for method in methods:
            function = getattr(method, "__func__", method)
            if "PathLike" in str(getattr(function, "__annotations__", "")):
                seen += 1
                assert expands(function), f"{name}: {method}"
    assert seen > 25


# files that others have made


@pytest.mark.slow
def test_own_files_are_replaced_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--calibration", str(TEXT), "--length", "64", "--samples", "4"]
    mine, plot, recipe = (tmp_path / name for name in ("mine.json", "plot.svg", "recipe.json"))
    sensitivities = ["sensitivities", str(DEMO), "--out", str(mine), "--plot", str(plot), *few]
    dynamic = ["dynamic", str(DEMO), "--target-bpw", "4.5", "--recipe", str(recipe), *few]
    dynamic += ["--sensitivities", str(mine), "--out", str(tmp_path / "out"), "--method", "rtn"]
    for path, command in (mine, sensitivities), (plot, sensitivities), (recipe, dynamic):
        path.write_text('{"all": "that I have"}')
        with pytest.raises(bitwright.OutputExistsError, match=f"{path.name}: exists already"):
            cli.main(command, standalone_mode=False)
        assert path.read_text() == '{"all": "that I have"}'
        if command is dynamic:
            break
        if path is plot:
            cli.main([*command, "--overwrite"], standalone_mode=False)
        else:
            path.unlink()
    # Its own files are replaced; of dynamic's, sensitivities that are there are only read.
    cli.main([*sensitivities, "--seed", "1"], standalone_mode=False)
    known = mine.read_bytes()
    cli.main([*dynamic, "--overwrite"], standalone_mode=False)
    cli.main([*dynamic, "--overwrite"], standalone_mode=False)
    assert mine.read_bytes() == known
    assert bitwright.Recipe.load(recipe).target_bpw == 4.5
    assert names(tmp_path) == {"mine.json", "plot.svg", "recipe.json", "out"}


def test_what_exists_is_told_in_one_place() -> None:
    """With how to replace it, wherever that is found."""
    package = Path(bitwright.__file__).parent
    said = [path for path in package.rglob("*.py") if "exists already" in path.read_text()]
    assert [path.name for path in said] == ["replacing.py"]
    assert "(overwrite=True, --overwrite)" in str(taken(Path("a")))


@pytest.mark.parametrize("ending", ["png", "svg", "pdf", "eps"])
def test_plots_are_known_again(tmp_path: Path, ending: str) -> None:
    from bitwright.records.plots import check_plot

    path = tmp_path / f"plot.{ending}"
    found = bitwright.Sensitivities(
        {"a": 0.1}, {"a": 64}, (3, 64), (5, 64), "model", "tokens", "kl", 0.1
    )
    bitwright.plot_sensitivities(found, path)
    check_plot(path)
    shutil.copy(__file__, path)
    with path.open("r+b") as file:
        file.truncate(99)
    with pytest.raises(bitwright.OutputExistsError):
        check_plot(path)
    check_plot(path, overwrite=True)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_plot_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Whatever the date, and whatever names are drawn; and it is whole or not there."""
    from matplotlib.figure import Figure

    path = tmp_path / f"plot.{ending}"
    found = bitwright.Sensitivities(
        {"a": 0.1, "b": 0.2}, {"a": 64, "b": 64}, (3, 64), (5, 64), "model", "tokens", "kl", 0.1
    )
    plots = set()
    for date in "0", "1000000000":
        monkeypatch.setenv("SOURCE_DATE_EPOCH", date)
        bitwright.plot_sensitivities(found, path)
        plots.add(path.read_bytes())
    assert len(plots) == 1

    def save_half(figure: Figure, place: Path, **options: Any) -> None:
        Path(place).write_text("half")
        raise OSError("no space is left")

    monkeypatch.setattr(Figure, "savefig", save_half)
    with pytest.raises(bitwright.OutputError, match=f"plot.{ending}: cannot be written: no space"):
        bitwright.plot_sensitivities(found, path)
    assert {path.read_bytes()} == plots
    assert names(tmp_path) == {path.name}


def test_a_file_that_appears_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the work of the run that it is in the way of does."""
    from bitwright.precision.estimate import _Estimate

    place, go = tmp_path / "s.json", _Estimate.go

    def late(*given: Any) -> Any:
        found = go(*given)
        place.write_text("mine")
        return found

    monkeypatch.setattr(_Estimate, "go", late)
    few: dict[str, Any] = {"samples": 4, "length": 64, "progress": False, "out": place}
    with pytest.raises(bitwright.OutputExistsError, match=r"s.json: exists already"):
        bitwright.estimate_sensitivities(DEMO, TEXT, **few)
    assert place.read_text() == "mine"
    monkeypatch.undo()
    place.unlink()
    monkeypatch.setattr(_Estimate, "_batch", None)  # nothing is left to compute
    assert bitwright.estimate_sensitivities(DEMO, TEXT, **few).kl_divergence > 0
