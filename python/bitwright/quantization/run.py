"""Quantizes a model and writes it, block by block."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.blocks.loop import through_blocks
from bitwright.blocks.output_metrics import OutputMetrics
from bitwright.blocks.scaling import AwqOptions
from bitwright.checkpoint import CheckpointWriter, copy_side_files
from bitwright.checkpoint.fingerprint import digest, model_fingerprint
from bitwright.checkpoint.front_matter import CARD_NAME
from bitwright.checkpoint.work_folder import WorkFolder
from bitwright.evaluation import parameter_count
from bitwright.formats.engine_names import unfused
from bitwright.grids.tables import vectors_of
from bitwright.loading.model import Model
from bitwright.methods.method import MethodOptions
from bitwright.precision.target import Target
from bitwright.products import taken_products
from bitwright.quantization.layers import Layers
from bitwright.quantization.output import Output, block_error
from bitwright.quantization.plan import RunPlan, Work, plan_run, tell
from bitwright.quantization.small_weights import warn_of_small_weights
from bitwright.quantization.source import StatisticsSource
from bitwright.ranks import current
from bitwright.records.card import model_card
from bitwright.records.described import write_report
from bitwright.records.reports import QuantizationReport
from bitwright.runs.journal import Journal, kept_when_interrupted
from bitwright.runs.limits import RunLimits
from bitwright.runs.states import States
from bitwright.statistics.imatrix import ModelImportance
from bitwright.warned import warn

only_checking: ContextVar[bool] = ContextVar("only_checking", default=False)


class AllIsWell(Exception):  # noqa: N818 - it is no error
    """Ends a run that was only to be checked."""


@dataclass(eq=False)
class Run:
    """One pass over a model; it holds the weights and statistics of a few layers at a time.

    Parameters
    ----------
    model
        What is quantized.
    target
        What its layers are stored in.
    options, awq
        How they are quantized.
    source
        What their inputs are known from.
    limits
        What the run may take.
    quantized
        A quantized form of the model whose layers are taken as they are, in place of a method's.
    metrics
        Of the layers' outputs, in which they are refined, too.
    two_sided
        Whether there will be metrics, for those who only check.
    importance
        Of the inputs of layers of which nothing else is known.
    """

    model: Model
    target: Target
    options: MethodOptions
    awq: AwqOptions
    source: StatisticsSource
    limits: RunLimits
    quantized: Model | None = None
    metrics: OutputMetrics | None = None
    two_sided: bool = False
    importance: ModelImportance | None = None

    def __post_init__(self) -> None:
        self.ranks = current()
        self.output: Output
        self.writer: CheckpointWriter | None = None
        self._layers: Layers
        self._resident: int | None = None
        self._prefixes = tuple(
            map(self.model.block_prefix, range(self.model.config.num_hidden_layers))
        )
        self._packed = self.model.packed_tensors()
        self._stacked = self.model.stacked_tensors()
        self._left_out = self.model.left_out(self.target.format)

    def write(
        self,
        out: str | os.PathLike[str],
        start: float,
        facts: Mapping[str, object],
        identity: Mapping[str, object],
    ) -> QuantizationReport:
        """Write the folder.

        `start` is when the process began, `facts` are for the model card, and `identity` is what decides
        the result beside what the run knows itself."""
        config = self.target.config(self.model)
        work = WorkFolder(out)
        self._watch(work)
        writer = self._new_writer(out, work)
        self.ranks.on_first(writer.check_place)
        self.source.check(self.model, self.target)
        planned = self._planned(Path(out))
        if only_checking.get():
            raise AllIsWell
        self._resident = planned.resident
        self._warn_of_vectors()
        self.writer = writer if self.ranks.is_first else None
        with work, kept_when_interrupted(work):
            journal = Journal(work, self._identity(identity), start)
            state = journal.begin(self.limits.resume)
            with nullcontext() if self.writer is None else self.writer:
                self._open_output()
                blocks = len(self._prefixes)
                through_blocks(self, journal, state, blocks, "quantizing", self.limits.progress)
                self._write_the_rest()
                self.source.end()
                report = self._finish(out, config, journal, facts)
        self.output.verify(out)
        return replace(self.ranks.broadcast(report), seconds=journal.seconds())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the output back to a state of the journal."""
        self.output.restore(state["output"])
        if self.writer is not None:
            self.writer.restore(state["writer"])

    def begin(self, journal: Journal, state: Mapping[str, Any] | None) -> None:
        """Quantize the embedding if it is planned, and prepare the source."""
        name, table = self.model.names.embedding, None
        if state is None and self._layers.is_planned(name):
            layers = self._layers
            own = layers.known_solver(name, None) or layers.weighted(name)
            own = own or self.source.tied_solver(layers, name) or layers.rounding()
            table = self._layers.quantize_matrix(name, self.model.embedding_name, own)
        self.source.begin(self._layers, journal, state, table, self._resident)

    def run_block(self, index: int) -> str:
        """Quantize and write block `index`; return its error."""
        reported = len(self.output.layers)
        prefix = self._prefixes[index]
        block = self._layers.equalized(self.model.block(index), prefix)
        self.source.quantize_block(self._layers, index, block)
        self._carry(name for name in self.model.checkpoint.names() if name.startswith(prefix))
        return block_error(self.output.layers[reported:])

    def kept(self, index: int) -> Mapping[str, States | None]:
        """Return the states that a run needs to resume after block `index`."""
        return self.source.kept(self._layers, index)

    def _new_writer(self, out: str | os.PathLike[str], work: WorkFolder) -> CheckpointWriter:
        kind, checkpoint = self.target.format, self.model.checkpoint
        return CheckpointWriter(
            out,
            self.limits.overwrite,
            metadata={"format": kind.metadata},
            source=checkpoint.source,
            container=kind.files(checkpoint, self.target.file),
            work=work,
        )

    def _open_output(self) -> None:
        model, kind = self.model, self.target.format
        experts = model.experts if kind.stacks_experts else None
        stack_size = model.config.experts.count if model.config.experts else 0
        self.output = Output(
            self.writer, kind, experts, stack_size, model.nested, model.config.family
        )
        self._layers = Layers(
            model,
            self.target,
            self.options,
            self.awq,
            self.output,
            self.quantized,
            self.metrics,
            self.importance,
        )

    def _planned(self, out: Path) -> RunPlan:
        """Plan memory, disk and, if it is shown, time."""
        samples, length = self.source.moved
        work = Work(
            self.model,
            self.target.plan,
            self.options,
            self.source.propagates,
            samples * length,
            length,
            self.target.scale_dtype,
            format=self.target.format,
            known=self.source.is_known,
            seen_bytes=self.source.largest_bytes,
            two_sided=self.two_sided,
            products=taken_products(),
        )
        limits = self.limits
        return tell(plan_run(work, limits.memory, out, timed=bool(limits.progress)), limits)

    def _warn_of_vectors(self) -> None:
        """Say which layers get no more from output metrics than from the default preset."""
        planned = [each for each in self.target.plan.values() if each is not None]
        vectors = [each for each in planned if vectors_of(each.grid) is not None]
        if self.metrics is not None and vectors:
            warn(
                f"preset: {len(vectors)} of {len(planned)} layers have codes of several weights "
                f"({', '.join(sorted({each.grid for each in vectors}))}); these are refined as by the "
                f"default preset"
            )

    def _identity(self, identity: Mapping[str, object]) -> dict[str, object]:
        """Return what decides the result, in words for whoever changes it between two runs."""
        layers = {
            name: precision and asdict(precision) for name, precision in self.target.plan.items()
        }
        awq = self.awq if self.options.method.scales_first else AwqOptions()
        return {
            "version of bitwright": version("bitwright"),
            "model": model_fingerprint(self.model.checkpoint),
            "quantized model": self.quantized and model_fingerprint(self.quantized.checkpoint),
            **dict.fromkeys(("calibration", "activations", "statistics")),
            **self.source.identity(),
            "importance matrix": self.importance and self.importance.matrix.fingerprint(),
            "output metrics": self.metrics and self.metrics.fingerprint(),
            "format": self.target.format.name,
            **self.options.identity(),
            **{name: _named(value) for name, value in asdict(awq).items()},
            "scale_dtype": self.target.scale_dtype.name,
            "propagate": self.source.propagates,
            "fixed_order": self.ranks.fixed_order,
            **identity,
            "precision of layers": digest(json.dumps(layers, sort_keys=True).encode()),
        }

    def _watch(self, work: WorkFolder) -> None:
        """Note the files that nobody may change meanwhile, but for statistics and activations, which are
        checked when they are read."""
        work.inputs.watch_model(self.model.checkpoint)
        if self.quantized is not None:
            work.inputs.watch_model(self.quantized.checkpoint)

    def _write_the_rest(self) -> None:
        """Quantize the head, and write what is in no block."""
        model = self.model
        self._quantize_head()
        self._carry(
            name for name in model.checkpoint.names() if not name.startswith(self._prefixes)
        )
        for name, shape in model.quantized_layers().items():
            target = model.names.embedding if name == model.embedding_name else name
            if self._layers.is_planned(target):
                continue
            weight = np.empty(shape, model.dtype)
            if name in (model.embedding_name, model.head_name):
                for rows, piece in model.rows(name).pieces(np.dtype(np.float32)):
                    weight[rows] = piece
            else:
                weight[...] = model.weight(name, shape)
            self.output.add(f"{target}.weight", weight)

    def _quantize_head(self) -> None:
        name = self.model.names.head
        if not self._layers.is_planned(name):
            return
        power = self._layers.equalized_head(name)
        scale = np.full(self.model.config.hidden_size, 2.0**power, np.float32)
        own = self.source.head_solver(self._layers, name, scale)
        self._layers.quantize_matrix(name, self.model.head_name, own, power)

    def _finish(
        self,
        out: str | os.PathLike[str],
        config: Mapping[str, Any],
        journal: Journal,
        facts: Mapping[str, object],
    ) -> QuantizationReport:
        """Report the run, and write what a folder has beside weights."""
        model, kind = self.model, self.target.format
        warn_of_small_weights(model.checkpoint.folder, kind, self.output)
        report = self.output.report(
            Path(out),
            self.options.method.name if self.quantized is None else "refine",
            model.checkpoint,
            parameter_count(model, self._left_out),
            self.source.tokens,
            journal.seconds(),
        )
        report = replace(report, products=taken_products())
        if self.writer is not None:
            self.writer.write_json("config.json", config)
            copy_side_files(model.checkpoint, self.writer)
            differ = bool(unfused(kind, self.target.plan))
            card = model_card(
                model.checkpoint,
                out,
                kind,
                [report],
                facts=facts,
                unfused=differ,
                file=self.target.file,
            )
            self.writer.write_text(CARD_NAME, card)
            write_report(self.writer, report)
        return report

    def _carry(self, names: Iterable[str]) -> None:
        """Write the tensors that stay as they are; a tied matrix once, under the embedding's name."""
        model, changed = self.model, self._layers.changed
        for name in names:
            target = model.written_name(name)
            if name in self._packed or name in self._left_out or target is None:
                continue
            layers = self._stacked.get(name, [target.removesuffix(".weight")])
            if all(map(self._layers.is_planned, layers)):
                continue
            if name in self._stacked and (
                self.target.format.own_container  # which has stacks of another kind
                or any(
                    self._layers.is_planned(layer) or f"{layer}.weight" in changed
                    for layer in layers
                )
            ):
                for layer in layers:
                    if not self._layers.is_planned(layer):
                        self._carry_expert(layer, model.stored_dtype(name))
                continue
            self.output.carry(model.checkpoint, name, changed, target)

    def _carry_expert(self, layer: str, dtype: np.dtype[Any]) -> None:
        """Write one expert of a stack by itself, in float."""
        tensor, changed = f"{layer}.weight", self._layers.changed
        if tensor in changed:
            array = changed.pop(tensor)
        else:
            array = self.model.weight(layer, self.model.linear_shapes()[layer])
        self.output.add(tensor, array.astype(dtype))


def _named(value: object) -> object:
    """Return what stands for an option in an identity: a function's name."""
    return getattr(value, "__qualname__", repr(value)) if callable(value) else value
