"""DWQ: scales and biases of a quantized model, trained by distillation from the original.

Distilled weight quantization, as in mlx-lm: the codes stay, so the result has the same size and speed."""

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from bitwright.checkpoint import CheckpointWriter, copy_side_files
from bitwright.checkpoint.fingerprint import model_fingerprint, tokenizer_fingerprint
from bitwright.checkpoint.front_matter import CARD_NAME
from bitwright.checkpoint.hub import finds_models
from bitwright.checkpoint.work_folder import (
    CHECKSUM,
    WorkFolder,
    again_message,
    as_identity,
    check_identity,
    remove_tree,
)
from bitwright.checkpoint.writer import UNFINISHED, check_apart, completed, write_safetensors
from bitwright.distill.adam import Adam
from bitwright.distill.gradient_memory import (
    backward_bytes,
    final_bytes,
    head_bytes,
    logits_bytes,
    sub_block_bytes,
)
from bitwright.distill.losses import LOSSES, DistillationLoss, LossFunction, TopTokens, next_tokens
from bitwright.distill.student import ZEROS, Student, Zeros, trained_bytes
from bitwright.distill.targets import (
    DEFAULT_K,
    SHARD_BYTES,
    DwqTargets,
    check_targets,
    read_manifest,
    write_targets,
)
from bitwright.errors import (
    CalibrationError,
    CheckpointError,
    NonFiniteError,
    RankError,
    ResumeError,
    check_choice,
    malformed_as,
)
from bitwright.files.home import expands_home
from bitwright.files.inputs import same_inputs
from bitwright.files.links import is_own_file
from bitwright.files.replacing import replaced
from bitwright.files.seals import buffers_checksum, files_of
from bitwright.formats import Format
from bitwright.formats.engine_names import unfused
from bitwright.loading.model import Model, load_model
from bitwright.models.config import plainly_spelled
from bitwright.models.network import Network
from bitwright.models.operations import Float32
from bitwright.process.memory import peak_memory_bytes
from bitwright.ranks import current
from bitwright.records.card import model_card, python_call
from bitwright.records.described import write_report
from bitwright.records.made_by import made_by
from bitwright.records.plots import PlotBeside, plot_dwq
from bitwright.records.reports import DwqReport, QuantizationReport
from bitwright.runs.budget import Budget, one_budget
from bitwright.runs.limits import RunLimits
from bitwright.runs.progress import Phase, Progressing, in_phases, phase
from bitwright.spellings import Old, respelled
from bitwright.text.calibration import CalibrationOptions
from bitwright.text.samples import (
    Samples,
    TokenSource,
    load_tokenizer,
    tokens_fingerprint,
)
from bitwright.warned import reports_warnings

Schedule = Literal["cosine", "linear", "constant"]
SCHEDULES: tuple[Schedule, ...] = ("cosine", "linear", "constant")
VALIDATION_SAMPLES = 8
BATCH_SIZE = 4
TARGET_BYTES = 8  # of a token that the teacher knows of a position
VALIDATIONS = 8  # in a run, unless told otherwise
SAME = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
REPORT_NAME = "dwq.json"
STUDENT, TRAINING = "student", "training.safetensors"  # in the work folder


@dataclass(frozen=True)
class _Settings:
    """What decides a run's result, apart from the models and the tokens."""

    learning_rate: float
    schedule: Schedule
    warmup: float
    temperature: float
    batch_size: int
    accumulate: int
    loss: str
    zeros: Zeros
    steps: int
    validate_every: int
    patience: int | None

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        left = 1 - step / self.steps
        fall = {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}
        return self.learning_rate * rise * fall[self.schedule]


@dataclass(eq=False)
class _Progress:
    """The state of a run between two steps, which a checkpoint holds beside the arrays."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0

    @classmethod
    def parse(cls, text: str, steps: int) -> "_Progress":
        """Read the JSON of a run of so many steps; one of `MALFORMED` if it cannot be of such a run."""
        state = cls(**json.loads(text))
        state.validations = [(int(step), float(value)) for step, value in state.validations]
        numbers = [state.seconds, *state.losses, *(value for _, value in state.validations)]
        sound = (
            type(state.step) is int
            and 0 < state.step < steps
            and len(state.losses) == state.step
            and all(type(number) is float and math.isfinite(number) for number in numbers)
            and state.seconds > 0
            and state.best_step == min(state.validations, key=lambda each: each[1])[0]
        )
        if not sound:
            raise ValueError("state")
        return state

    @property
    def best(self) -> float:
        """The least validation KL so far."""
        return min(value for _, value in self.validations)


@respelled(Old("teacher", "reference"), Old("student", "model"), Old("data", "calibration"))
@reports_warnings
@expands_home
@finds_models
@same_inputs()
def dwq_quantize(
    reference: str | os.PathLike[str],
    model: str | os.PathLike[str] | Callable[[Path], object],
    out: str | os.PathLike[str],
    calibration: TokenSource | None = None,
    *,
    made_with: Mapping[str, object] | None = None,
    targets: str | os.PathLike[str] | None = None,
    validation: TokenSource | None = None,
    validation_samples: int | None = None,
    length: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    bos: bool = True,
    learning_rate: float = 5e-4,
    schedule: Schedule = "cosine",
    warmup: float = 0.1,
    temperature: float = 1.0,
    batch_size: int = BATCH_SIZE,
    accumulate: int = 1,
    loss: str | LossFunction = "kl",
    k: int | None = None,
    zeros: Zeros = "fixed",
    validate_every: int | None = None,
    patience: int | None = None,
    checkpoint_every: int | None = None,
    plot: str | os.PathLike[str] | None = None,
    memory: float | None = None,
    resume: bool = True,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progressing = True,
) -> DwqReport:
    """Train the scales and biases of a quantized model to reproduce the original's outputs on some text.

    The codes stay what they are, and so do size and format. What is trained is what is stored: the forward
    pass uses scales and biases rounded to their dtype. The student with the least KL on the validation
    samples is written, be it the one that it began with. The ranks of an MPI run share the samples of each
    step (see `bitwright.ranks.spread_over`), and the first writes.

    Parameters
    ----------
    reference
        Checkpoint folder of the original, the teacher.
    model
        The student: checkpoint folder of a quantized model, in any format that is read, whoever made it;
        or a function that is given a folder to write one to.
    out
        Folder to write; it appears when everything is done, or not at all. What a run needs to go on lies
        beside it, in ``.NAME.work``, until then.
    calibration
        Text or token ids to train on, see `load_tokens`. None takes those that `targets` were made of.
    made_with
        What the student that a function makes depends on beside `reference` and `calibration`, such as its
        options, by words that a user knows. With it, what an interrupted run has made is used again;
        otherwise the function is called again, and must make the same.
    targets
        Folder of the teacher's targets, see `compute_dwq_targets`: made there, or used again if they are
        of this teacher and data. By default they are made beside `out`, and removed in the end.
    validation, validation_samples
        What to validate on; by default so many samples, at most 8, that are taken out of `calibration`.
    length
        Tokens per sample; by default 512 of a text, or as many as the teacher knows positions, and the
        whole rows of an array.
    tokens
        How many to train on, several times over if `calibration` has fewer; by default all once.
    seed
        Chooses the samples and their order.
    bos
        Begin every sample of a text with what the tokenizer puts first, see `load_tokens`.
    learning_rate, schedule, warmup
        Of Adam: see `bitwright.distill.student.TrainedTensor` for its unit; ``"cosine"`` or ``"linear"``
        fall to 0, ``"constant"`` does not; the first share `warmup` of the steps rises linearly.
    temperature
        Both models' logits are divided by it.
    batch_size, accumulate
        Samples per pass, and passes per step.
    loss
        ``"kl"``, ``"reverse_kl"``, ``"js"``, ``"cross_entropy"`` (of the text itself), ``"logits_mse"``, or
        a function, see `DistillationLoss`.
    k
        The teacher's tokens per position: by default 1024, or the vocabulary if it is smaller.
    zeros
        Of integer grids: ``"fixed"``, or ``"project"`` to train them too and round them.
    validate_every
        Steps between two validations, by default an eighth of the run.
    patience
        Stop after so many validations without a new best; by default never.
    checkpoint_every
        Steps between two checkpoints, by default as `validate_every`.
    plot
        File to plot loss and KL to, see `plot_dwq`, just before `out` appears.
    memory
        Budget in gigabytes (10⁹ bytes); by default three quarters of what is free.
    resume
        Go on where an interrupted run of the same settings stopped.
    overwrite
        Replace an existing checkpoint folder `out`, once the new one is complete, and whatever file `plot`
        is; otherwise only a plot of bitwright's.
    threads
        Number of threads from now on, in the whole process.
    progress
        Show loss, validation KL, tokens per second and time left on standard error, or a function which
        gets each record of them, see `Progress`.

    Returns
    -------
    DwqReport

    Raises
    ------
    UnsupportedModelError
        If the student is not quantized.
    MemoryBudgetError
        If the budget is too small, with the smallest that would work.
    ResumeError
        If an interrupted run with the same `out` had other settings or inputs; the message says which.
    CheckpointError, CalibrationError, TargetsError, NonFiniteError, OutputError, ValueError
        If anything else is wrong with what was given; the message says what and where.

    Examples
    --------
    >>> import bitwright, tempfile
    >>> demo = bitwright.demo_folder()
    >>> text = demo / "calibration.txt"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bitwright.quantize(demo, f"{folder}/3bit", "rtn", bits=3, progress=False)
    ...     report = bitwright.dwq_quantize(
    ...         demo, f"{folder}/3bit", f"{folder}/dwq", text, length=64, tokens=5120, progress=False
    ...     )
    >>> report.kl_after < report.kl_before
    True
    """
    arguments = dict(locals())
    started = time.perf_counter()
    RunLimits(threads=threads).set_threads()
    _check_arguments(arguments)
    teacher_model = load_model(reference)
    student_made = model if callable(model) else load_model(model)
    ready = student_made if isinstance(student_made, Model) else None
    if ready is not None:
        check_pair(teacher_model, ready)
    loaded = _load(calibration, targets, teacher_model, length, bos)
    rows, held = loaded.tokens, None
    if validation is not None:
        held = _load(validation, None, teacher_model, rows.shape[1], bos).tokens
    plan = _plan(rows, held, validation_samples, tokens, batch_size * accumulate, seed)
    settings = _settings(arguments, len(plan.order) // (batch_size * accumulate))
    plan_training(
        teacher_model, len(rows), rows.shape[1], batch_size, memory, student=ready, zeros=zeros
    )
    given = None if targets is None else Path(targets)
    lesson = _Lesson(teacher_model, loaded, plan, _token_count(teacher_model, k, given), given)
    ranks, work = current(), WorkFolder(out)
    for each in filter(None, (teacher_model, ready)):
        work.inputs.watch_model(each.checkpoint)
    source = teacher_model.checkpoint.source
    writer = CheckpointWriter(out, overwrite, source=source, work=work)
    beside = PlotBeside(plot, work, overwrite)
    ranks.on_first(beside.check)
    lesson.check(work, temperature)
    identity = {**lesson.identity(), **asdict(settings)}
    if callable(model):
        identity["data"] = tokens_fingerprint(rows)
        identity |= {f"student's {name}": value for name, value in (made_with or {}).items()}
    identity = as_identity(identity)
    told = made_by(python_call(dwq_quantize, arguments))
    with one_budget(memory), told, in_phases(progress, *_phases(callable(model))), work:
        ranks.on_first(writer.check_place)
        try:
            resumed = resume and ranks.on_first(lambda: _is_begun(work.path))
            state = work.resume(identity, resumed) or {}
            learner, made = _learner(student_made, made_with, zeros, work, identity, state)
            if ready is None:
                check_pair(teacher_model, learner.model)
            known = lesson.teach(work, temperature, progress)
            run = _Run(learner, known, plan, settings, loss, work)
            run.resume()
            with run.shown(progress) as shown:
                stopped = run.go(shown, checkpoint_every or settings.validate_every)
            report = run.report(Path(out), stopped, time.perf_counter() - started, made)
            ranks.on_first(
                lambda: _write_all(teacher_model, learner, report, made, writer, beside, work)
            )
        except BaseException:
            work.keep = work.keep and _is_begun(work.path)
            raise
    return report


def _phases(makes: bool) -> list[tuple[str, float]]:
    """Return what is done, and what that usually takes."""
    making = [("quantizing", 2.0)] if makes else []
    return [*making, ("teaching", 1.0), ("distilling", 12.0)]


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ValueError unless choices and numbers are such as can be."""
    check_choice("schedule", given["schedule"], SCHEDULES)
    check_choice("zeros", given["zeros"], ZEROS)
    if isinstance(given["loss"], str):
        check_choice("loss", given["loss"], LOSSES)
    counts = ("batch_size", "accumulate", "validate_every", "checkpoint_every", "patience")
    for name in (*counts, "tokens", "validation_samples", "k", "seed"):
        number, least = given[name], 0 if name == "seed" else 1
        if number is not None and (not isinstance(number, int | np.integer) or number < least):
            raise ValueError(f"{name}: expected a whole number from {least} up, got {number}")
    rate = given["learning_rate"]
    if not (rate > 0 and math.isfinite(rate) and 0 <= given["warmup"] <= 1):
        raise ValueError("learning_rate and warmup: expected more than 0, and 0 to 1")
    if not 0 < given["temperature"] < math.inf:
        raise ValueError(
            f"temperature: expected more than 0 and finite, got {given['temperature']}"
        )


def _settings(given: Mapping[str, Any], steps: int) -> _Settings:
    """Return what decides the training beside its data."""
    same = ("learning_rate", "schedule", "warmup", "temperature", "batch_size", "accumulate")
    return _Settings(
        **{name: given[name] for name in (*same, "zeros", "patience")},
        loss=given["loss"] if isinstance(given["loss"], str) else "a function",
        steps=steps,
        validate_every=given["validate_every"] or max(1, steps // VALIDATIONS),
    )


@dataclass(frozen=True, eq=False)
class _Lesson:
    """What the teacher is asked: the k likeliest tokens of every position of some samples."""

    teacher: Model
    loaded: Samples
    plan: "_Plan"
    k: int
    targets: Path | None

    def check(self, work: WorkFolder, temperature: float) -> None:
        """Raise TargetsError if a folder of targets is there that holds others."""
        targets = self.targets
        if targets is None:
            return
        for taken in (work.out, work.path):
            check_apart(taken, targets, "targets")
        taught = Samples(_taught(self.plan, targets)[0], self.loaded.first)
        current().on_first(
            lambda: check_targets(self.teacher, taught, targets, self.k, temperature)
        )

    def identity(self) -> dict[str, object]:
        """Return what decides the targets, in words for whoever changes it between two runs."""
        checkpoint, samples = self.teacher.checkpoint, self.plan.samples
        return {
            "teacher": model_fingerprint(checkpoint),
            "tokenizer": tokenizer_fingerprint(checkpoint),
            "bos": self.loaded.bos,
            "tokens": tokens_fingerprint(samples[self.plan.order]),
            "validation": tokens_fingerprint(samples[self.plan.valid]),
            "k": self.k,
            "fixed_order": current().fixed_order,
        }

    def teach(self, work: WorkFolder, temperature: float, progress: Progressing) -> "_Known":
        """Ask the teacher, or open what it has said before."""
        with phase("teaching", progress) as shown:
            known = _teach(
                *(self.teacher, self.plan, self.loaded.first, self.targets, work.path),
                *(self.k, temperature, shown.update),
            )
        work.inputs.watch(known.files())
        return known


def _learner(
    student: Model | Callable[[Path], object],
    made_with: Mapping[str, object] | None,
    zeros: Zeros,
    work: WorkFolder,
    identity: Mapping[str, object],
    state: Mapping[str, Any],
) -> tuple[Student, QuantizationReport | None]:
    """Return the student, made first if it has to be, and the report of that."""
    model, made = _student(student, made_with is not None, work, identity, state)
    work.inputs.watch_model(model.checkpoint, recorded=False)  # unless it is given
    if not callable(student):
        check_apart(work.out, model.checkpoint.source, "student that is read")
    return Student(model, zeros), made


def _write_all(
    teacher: Model,
    learner: Student,
    report: DwqReport,
    made: QuantizationReport | None,
    writer: CheckpointWriter,
    beside: PlotBeside,
    work: WorkFolder,
) -> None:
    """Write the folder, and its plot before it."""
    tensors = {name: each.start for name, each in learner.tensors.items()}
    precisions = {name: (each.bits, each.group_size) for name, each in tensors.items()}
    kind = None if learner.model.format is None else type(learner.model.format)
    stored = dict.fromkeys(learner.model.linear_shapes()) | precisions
    remove_tree(work.path / UNFINISHED)  # of a run that was interrupted here
    draw = partial(plot_dwq, report)
    with completed(work.out, lambda folder: beside.write(draw)), writer:
        _write(writer, learner, report)
        card = model_card(
            teacher.checkpoint,
            work.out,
            kind,
            [report] if made is None else [made, report],
            precisions=list(precisions.values()),
            unfused=kind is not None and bool(unfused(kind, stored)),
        )
        writer.write_text(CARD_NAME, card)
        write_report(writer, report)


def _token_count(teacher: Model, k: int | None, targets: Path | None) -> int:
    """Return how many of the teacher's tokens the targets have per position."""
    vocabulary = teacher.config.vocab_size
    if k is None and targets is not None:
        stored = (read_manifest(targets) or {}).get("k")
        if type(stored) is int and 0 < stored <= vocabulary:
            return stored
    if k is not None and k > vocabulary:
        raise ValueError(f"k: expected 1 to {vocabulary}, the size of the vocabulary, got {k}")
    return min(DEFAULT_K, vocabulary) if k is None else int(k)


def _is_begun(work: Path) -> bool:
    """Tell whether a work folder holds results that took time to compute."""
    patterns = (TRAINING, STUDENT, f".{STUDENT}*", "*/targets-*.safetensors")
    return any(any(work.glob(pattern)) for pattern in patterns)


def _student(
    student: Model | Callable[[Path], object],
    reusable: bool,
    work: WorkFolder,
    identity: Mapping[str, object],
    state: Mapping[str, Any],
) -> tuple[Model, QuantizationReport | None]:
    """Return the student that is given or made, with the report of its quantization, and commit it.

    One that an interrupted run has made is used again if it is `reusable`."""
    ranks, folder = current(), work.path / STUDENT
    report = None
    if isinstance(student, Model):
        model = student
    elif reusable and "student" in state and ranks.on_first(folder.is_dir):
        work.require_seals(state["seals"], whole=True)
        model = load_model(folder)
        if state["report"] is not None:
            report = QuantizationReport.from_dict(state["report"])
    else:
        if not state:
            work.commit(identity, {})
        ranks.on_first(lambda: remove_tree(folder))  # of a run that had not come further
        said = student(folder)
        report = ranks.broadcast(said if isinstance(said, QuantizationReport) else None)
        model = load_model(folder)
    fingerprint = model_fingerprint(model.checkpoint)
    if "student" in state:
        check_identity(work.path, {"student": state["student"]}, {"student": fingerprint})
    made = None if report is None else report.as_dict()
    sealed = ranks.on_first(lambda: work.seals.of(files_of(folder)) if folder.is_dir() else {})
    work.commit(identity, {"student": fingerprint, "report": made, "seals": sealed})
    return model, report


@dataclass(frozen=True, eq=False)
class _Plan:
    """The samples of training and validation.

    ``rows`` are all samples of the data, ``used`` those of them that are, and ``held`` validation data of
    their own, after these; ``order`` and ``valid`` name some of the samples.
    """

    rows: NDArray[np.int32]
    used: NDArray[np.intp]
    held: NDArray[np.int32]
    order: NDArray[np.intp]
    valid: NDArray[np.intp]

    @property
    def samples(self) -> NDArray[np.int32]:
        """``[used + held, length]``."""
        return np.concatenate([self.rows[self.used], self.held])


@dataclass(frozen=True, eq=False)
class _Known:
    """The targets of a plan's samples: those at `places` of one folder, and then those of another
    where the validation data are of their own."""

    training: DwqTargets
    places: NDArray[np.intp]
    validation: DwqTargets | None

    def read(self, samples: NDArray[np.intp]) -> TopTokens:
        """Return it for samples that are all from one of them."""
        if self.validation is not None and samples[0] >= len(self.places):
            return self.validation.read(samples - len(self.places))
        return self.training.read(self.places[samples])

    def files(self) -> list[Path]:
        """Return the files that it is read from."""
        held = [] if self.validation is None else self.validation.files()
        return [*self.training.files(), *held]


@dataclass(eq=False)
class _Run:
    """A run from its first step, or from a checkpoint, to its last."""

    student: Student
    targets: _Known
    plan: _Plan
    settings: _Settings
    loss: str | LossFunction
    work: WorkFolder

    def __post_init__(self) -> None:
        self.samples = self.plan.samples
        self.ranks = current()
        self.checkpoint = self.work.path / TRAINING
        self.network = Network(self.student.model, self.student.weight, rows=self.student.rows)
        self.adam = Adam(self.student.parameters)
        self.state = _Progress()
        self.best = {name: array.copy() for name, array in self.student.parameters.items()}

    def shown(self, progress: Progressing) -> AbstractContextManager[Phase]:
        """Show how far the training is."""
        steps = self.settings.steps
        return phase("distilling", progress, steps, done=self.state.step, unit="steps")

    def go(self, shown: Phase, checkpoint_every: int) -> str | None:
        """Train to the end; return why it ended before, if it did."""
        settings, state = self.settings, self.state
        length = self.samples.shape[1]
        per_step = settings.batch_size * settings.accumulate
        if not state.validations:
            self._validate()
        while state.step < settings.steps:
            start = time.perf_counter()
            first = state.step * per_step
            loss = self._step(self.plan.order[first : first + per_step])
            if not math.isfinite(loss):
                return f"the loss is {loss} at step {state.step + 1} of {settings.steps}"
            state.step += 1
            state.losses.append(loss)
            last = state.step == settings.steps
            due = last or state.step % settings.validate_every == 0
            if due and not self._validate():
                return f"the validation KL is not finite after step {state.step}"
            state.seconds += time.perf_counter() - start
            speed = state.step * per_step * length / state.seconds
            shown.update(
                state.step,
                f"loss {loss:.4f}, KL {state.validations[0][1]:.4f} → "
                f"{state.validations[-1][1]:.4f}, {speed:,.0f} tokens/s",
            )
            since = sum(step > state.best_step for step, _ in state.validations)
            if settings.patience is not None and since >= settings.patience and not last:
                return f"no better validation KL since step {state.best_step}"
            if state.step % checkpoint_every == 0 and not last:
                self.work.check_inputs()
                self.ranks.on_first(self._save)
        return None

    def resume(self) -> None:
        """Resume from the checkpoint if there is one."""
        if not self.ranks.on_first(self.checkpoint.is_file):
            return
        again, damaged = again_message(self.checkpoint.parent), f"{self.checkpoint}: is damaged"
        with (
            malformed_as(ResumeError, damaged, f"; {again}", SafetensorError, OSError),
            safe_open(self.checkpoint, framework="numpy") as file,
        ):
            metadata = file.metadata() or {}
            known = int(metadata[CHECKSUM])
            state = _Progress.parse(metadata["state"], self.settings.steps)
            for group, arrays in self._arrays().items():
                for name, array in arrays.items():
                    stored = file.get_tensor(f"{group}.{name}")
                    alike = stored.dtype == array.dtype and stored.shape == array.shape
                    if not alike or not np.isfinite(stored).all():
                        raise ValueError(f"{group} of {name}")
                    array[...] = stored
            if known != self._checksum(metadata["state"]):
                raise ValueError("its checksum is another")
        self.state = state
        self.adam.steps = state.step

    def report(
        self,
        out: Path,
        stopped: str | None,
        seconds: float,
        student: QuantizationReport | None,
    ) -> DwqReport:
        """Set the student to its best parameters and summarize the run."""
        digest = hashlib.sha256(b"".join(array.tobytes() for array in self.best.values()))
        if len(set(self.ranks.gather(digest.hexdigest()))) > 1:
            raise RankError(
                "the MPI ranks have come to different scales; do all run the same bitwright on the same "
                "kind of processor?"
            )
        self.student.restore(self.best)
        state, settings = self.state, self.settings
        per_step = settings.batch_size * settings.accumulate * self.samples.shape[1]
        return DwqReport(
            out=out,
            loss=settings.loss,
            steps=state.step,
            tokens=state.step * per_step,
            losses=tuple(state.losses),
            validations=tuple(state.validations),
            best_step=state.best_step,
            stopped=stopped,
            seconds=seconds,
            tokens_per_second=state.step * per_step / state.seconds if state.seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes(),
            student=student,
        )

    def _step(self, samples: NDArray[np.intp]) -> float:
        """Change the parameters once; return the mean loss, after which they are as before if it is not
        finite."""
        settings, student = self.settings, self.student
        positions = int(len(samples) * self.samples.shape[1])
        losses = []
        parts: list[dict[str, Float32]] = []
        for batch in self._passes(samples):
            found = functools.partial(
                self.network.gradients,
                self.samples[batch],
                self._loss(batch, self.loss, 1 / positions),
                student.add_gradient,
                on_embedding=student.add_row_gradient,
                on_head=student.add_gradient,
            )
            losses.append(self._sum(found))
            if self.ranks.fixed_order:
                parts.append(student.gradients())
        mean = self.ranks.total(losses) / positions
        gradients = self._summed(parts)
        if math.isfinite(mean) and not all(np.isfinite(each).all() for each in gradients.values()):
            mean = math.nan
        if math.isfinite(mean):
            self.adam.step(gradients, settings.rate(self.state.step))
        return mean

    def _sum(self, losses: Callable[[], NDArray[np.float64]]) -> float:
        """Return the sum of losses; NaN where training has made rows of the embedding infinite, which is an
        error only of a student as it was given."""
        try:
            return float(losses().sum())
        except NonFiniteError:
            if not self.state.validations:
                raise
            return math.nan

    def _passes(self, samples: NDArray[np.intp]) -> Iterator[NDArray[np.intp]]:
        """Yield this rank's part of some samples, so many at a time: one by one where the order of sums
        must not depend on how many ranks there are."""
        share = self.ranks.share(len(samples))
        size = 1 if self.ranks.fixed_order else self.settings.batch_size
        for first in range(share.start, share.stop, size):
            yield samples[first : min(first + size, share.stop)]

    def _summed(self, parts: list[dict[str, Float32]]) -> dict[str, Float32]:
        """Return the gradients of all ranks together; where the order is fixed, added up pass by pass."""
        if not self.ranks.fixed_order:
            gradients = self.student.gradients()
            for gradient in gradients.values():
                self.ranks.sum(gradient)
            return gradients
        gradients = {name: np.zeros_like(each) for name, each in self.student.parameters.items()}
        for name, gradient in gradients.items():
            for others in self.ranks.gather([part[name] for part in parts]):
                for each in others:
                    gradient += each
        return gradients

    def _validate(self) -> bool:
        """Measure the KL on the validation samples, and remember the parameters if it is the least so far.
        Return whether it is finite."""
        valid, state = self.plan.valid, self.state
        losses = [
            self._sum(
                functools.partial(
                    self.network.losses, self.samples[batch], self._loss(batch, "kl", 1.0)
                )
            )
            for batch in self._passes(valid)
        ]
        value = self.ranks.total(losses) / (len(valid) * self.samples.shape[1])
        if not math.isfinite(value):
            if not state.validations:
                raise NonFiniteError(
                    f"{self.student.model.checkpoint.folder}: its KL to the teacher is {value}; check "
                    f"it with bitwright evaluate"
                )
            return False
        if not state.validations or value < state.best:
            state.best_step = state.step
            for name, array in self.student.parameters.items():
                self.best[name][...] = array
        state.validations.append((state.step, value))
        return True

    def _loss(
        self, samples: NDArray[np.intp], loss: str | LossFunction, factor: float
    ) -> DistillationLoss:
        known = self.targets.read(samples)
        following = next_tokens(self.samples[samples])
        return DistillationLoss(known.rows, following, loss, self.settings.temperature, factor)

    def _arrays(self) -> dict[str, Mapping[str, Float32]]:
        return {
            "parameters": self.student.parameters,
            "best": self.best,
            "first": self.adam.first,
            "second": self.adam.second,
        }

    def _save(self) -> None:
        arrays: dict[str, NDArray[Any]] = {
            f"{group}.{name}": array
            for group, named in self._arrays().items()
            for name, array in named.items()
        }
        state = json.dumps(asdict(self.state))
        metadata = {"state": state, CHECKSUM: str(self._checksum(state))}
        with replaced(self.checkpoint) as partial:
            write_safetensors(partial, arrays, metadata)

    def _checksum(self, state: str) -> int:
        arrays = (array for named in self._arrays().values() for array in named.values())
        return buffers_checksum([state.encode(), *(np.ascontiguousarray(each) for each in arrays)])


def check_pair(teacher: Model, student: Model) -> None:
    """Raise CheckpointError unless the student can be a quantized form of the teacher."""
    where = f"{student.checkpoint.folder}: is not made from {teacher.checkpoint.folder}"
    for key in SAME:
        values = getattr(teacher.config, key), getattr(student.config, key)
        if values[0] != values[1]:
            raise CheckpointError(f"{where}: its {key} is {values[1]}, not {values[0]}")
    if teacher.linear_shapes() != student.linear_shapes():
        raise CheckpointError(f"{where}: its layers have other shapes")
    vocabularies = [_vocabulary(model) for model in (teacher, student)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise CheckpointError(f"{where}: its tokenizer has another vocabulary")


def _vocabulary(model: Model) -> dict[str, int] | None:
    folder = model.checkpoint.folder
    known = is_own_file(folder / "tokenizer.json", folder)
    return load_tokenizer(folder).get_vocab() if known else None


def _load(
    source: TokenSource | None,
    targets: str | os.PathLike[str] | None,
    teacher: Model,
    length: int | None,
    bos: bool,
) -> Samples:
    if source is None and targets is not None:
        known = DwqTargets(targets)
        if length not in (None, known.length):
            raise CalibrationError(
                f"length: is {length}, but {targets} are targets of samples of {known.length} tokens; "
                f"leave it out, or give the data and other targets"
            )
        return Samples(known.tokens(), None if known.bos is None else tuple(known.bos))
    chosen = CalibrationOptions(source, length=length, seed=None, bos=bos)
    return chosen.load(teacher, most=None)


def check_training(
    teacher: Model,
    data: TokenSource,
    length: int | None,
    seed: int,
    bos: bool,
    memory: float | None = None,
) -> None:
    """Raise CalibrationError unless there are samples to train on, and to validate on; MemoryBudgetError
    if the budget is too small for that."""
    rows = _load(data, None, teacher, length, bos).tokens
    _plan(rows, None, None, None, 1, seed)
    plan_training(teacher, len(rows), rows.shape[1], BATCH_SIZE, memory)


def plan_training(
    model: Model,
    samples: int,
    length: int,
    batch_size: int,
    memory: float | None,
    student: Model | None = None,
    zeros: Zeros = "fixed",
) -> int:
    """Return what training a student of a model takes; MemoryBudgetError if the budget is too small."""
    config, budget = model.config, Budget.of(memory)
    rows = length * batch_size
    trained, gradients = trained_bytes(model, student, zeros)
    known = rows * min(DEFAULT_K, config.vocab_size) * TARGET_BYTES
    backward = (most for _, _, most in sub_block_bytes(model, length, rows))
    training = known + max(final_bytes(model, rows, 2), gradients, *backward)
    # The teacher says of many samples together what it knows of them.
    packed = min(DEFAULT_K, config.vocab_size) * (2 + (2 if config.vocab_size <= 1 << 16 else 4))
    per_sample = length * max(packed, 4 * config.hidden_size)
    together = length * min(samples, max(1, SHARD_BYTES // per_sample))
    taught = together * (2 * packed + 2 * 4 * config.hidden_size)
    logits = logits_bytes(model, together, 1) * 5 // 4  # and which of them are finite
    teaching = head_bytes(model, together) + logits + taught
    most = budget.base + backward_bytes() + trained + max(teaching, training)
    budget.require(most, model.checkpoint.folder)
    return most


def _plan(
    rows: NDArray[np.int32],
    held: NDArray[np.int32] | None,
    validation_samples: int | None,
    tokens: int | None,
    per_step: int,
    seed: int,
) -> _Plan:
    """Choose the samples to train and to validate on."""
    length, rng = rows.shape[1], np.random.default_rng(seed)
    shuffled = rng.permutation(len(rows))
    if held is None:
        held = rows[:0]
        count = validation_samples or min(VALIDATION_SAMPLES, max(1, len(rows) // 8))
        if count >= len(rows):
            raise CalibrationError(
                f"calibration: has {len(rows)} samples of {length} tokens, of which {count} are for "
                f"validation; give more data, shorter samples (length), or validation data of its own"
            )
        valid, left = shuffled[:count], shuffled[count:]
    else:
        held, left = held[:validation_samples], shuffled
        valid = shuffled[:0]
    wanted = (len(left) if tokens is None else tokens // length) // per_step * per_step
    wanted = max(wanted, per_step)
    left = left[:wanted]
    rounds = [rng.permutation(len(left)) for _ in range(-(-wanted // len(left)))]
    used = np.concatenate([left, valid])
    return _Plan(
        rows=rows,
        used=used,
        held=held,
        order=np.concatenate(rounds)[:wanted],
        valid=np.arange(len(left), len(used) + len(held)),
    )


def _taught(plan: _Plan, given: Path | None) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """Return the samples that targets are made of, or are there of, and where those of the plan are."""
    if given is not None:
        manifest = read_manifest(given) or {}
        if manifest.get("tokens") == tokens_fingerprint(plan.rows):
            return plan.rows, plan.used
    return plan.rows[plan.used], np.arange(len(plan.used))


def _teach(
    teacher: Model,
    plan: _Plan,
    first: tuple[int, ...] | None,
    given: Path | None,
    work: Path,
    k: int,
    temperature: float,
    on_progress: Callable[[float], None],
) -> _Known:
    """Return the targets of the plan's samples: those that are there of all rows, or such as are made of
    the samples that are used, which begin with `first`."""
    total = len(plan.used) + len(plan.held)

    def compute(samples: NDArray[np.int32], folder: Path, begin: int, end: int) -> DwqTargets:
        return write_targets(
            teacher,
            Samples(samples, first),
            folder,
            k,
            temperature,
            lambda share: on_progress((begin + (end - begin) * share) / total),
        )

    samples, places = _taught(plan, given)
    held = None
    if len(plan.held):
        held = compute(plan.held, work / "validation", 0, len(plan.held))
    training = compute(samples, given or work / "targets", len(plan.held), total)
    return _Known(training, places, held)


def _write(writer: CheckpointWriter, student: Student, report: DwqReport) -> None:
    """Write the student's checkpoint with its current scales, and biases or zeros."""
    checkpoint, changed = student.model.checkpoint, student.stored()
    kind = Format if student.model.format is None else type(student.model.format)
    if student.model.format is not None:
        writer.metadata["format"] = kind.metadata
        writer.container = kind.files(checkpoint)
    for name in checkpoint.names():
        array = changed[name] if name in changed else checkpoint.read(name)
        array = kind.array_written(name, array, student.model.config.family)
        writer.add(kind.name_written(name, student.model.nested), array)
    config = plainly_spelled(checkpoint.config)
    settings = config.get("quantization_config")
    moved = any(each.tensor().grid == "zero_point" for each in student.tensors.values())
    if isinstance(settings, dict) and settings.get("sym") and moved:
        # Engines do not read the zeros of grids that are declared symmetric.
        config = {**config, "quantization_config": {**settings, "sym": False}}
    writer.write_json("config.json", config)
    writer.write_json(REPORT_NAME, report.as_dict())
    copy_side_files(checkpoint, writer)
