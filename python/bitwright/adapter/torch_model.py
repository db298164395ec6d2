"""A decoder that transformers runs: its blocks, their linears by checkpoint name, and what these read.

torch and transformers are imported when a model is loaded, not before; their objects are `Any` here.
"""

import importlib
import inspect
import os
import re
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitwright.adapter.structure import decoder_blocks, outside, routers
from bitwright.arrays import require_finite
from bitwright.checkpoint import Checkpoint
from bitwright.checkpoint.reader import written_dtype
from bitwright.errors import BitwrightError, MissingExtraError, UnsupportedModelError, shown
from bitwright.files.inputs import note_model
from bitwright.formats import detect_format
from bitwright.loading.contents import (
    kinds_of,
    untied,
    warn_of_head,
    warn_of_unused,
    without_harmless,
)
from bitwright.methods.moments import LayerStatistics
from bitwright.models.architecture import Stack
from bitwright.models.config import MODEL_DTYPES
from bitwright.models.families import known_families
from bitwright.models.fold import FoldKind
from bitwright.models.layout import ExpertPlace, Role
from bitwright.warned import warn

Float32 = NDArray[np.float32]

OLDEST_TRANSFORMERS = 5
CHUNK_TOKENS = 1024  # that a block sees at a time, in whole samples
EXPERTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))  # as checkpoints name them
ROLES: tuple[Role, Role, Role] = ("gate", "up", "down")
EPSILONS = ("variance_epsilon", "eps", "epsilon")
EQUAL = 1e-4  # relative difference of two float32 computations of the same thing
SHOWN_NAMES = 3


class _Stop(Exception):  # noqa: N818  (it is no error)
    """Ends a forward pass that has shown what it was started for."""


@dataclass(eq=False)
class Linear:
    """A matrix of a block.

    Parameters
    ----------
    name
        In the checkpoint, without ``.weight``; empty where it is not there under a name that we know.
    weight
        ``[out, in]``, the very memory that torch computes with: writing to it changes the model.
    router
        Whether it chooses experts, and so stays in float.
    """

    name: str
    weight: Float32
    router: bool = False


@dataclass(eq=False)
class Norm:
    """A norm into which scales can be folded: its name in the checkpoint, its kind, its memory."""

    name: str
    kind: FoldKind
    weight: Float32
    bias: Float32 | None


@dataclass(eq=False)
class Input:
    """What one or several linears read, and what is known of it."""

    readers: list[Linear]
    statistics: LayerStatistics | None = None
    norm: Norm | None = None  # that computed it
    gram: Float32 | None = None
    mean_abs: NDArray[np.float64] | None = None
    can_scale: bool = False  # whether nothing but linears was seen to read what the norm computes


@dataclass(eq=False)
class TorchBlock:
    """A decoder block: what chooses its experts, and by module its linears, experts (gate, up and down of
    each) and norms."""

    index: int
    name: str
    module: Any
    routers: set[Any] = field(default_factory=set)
    linears: dict[Any, Linear] = field(default_factory=dict)
    experts: dict[Any, list[tuple[Linear, Linear, Linear]]] = field(default_factory=dict)
    norms: dict[Any, Norm] = field(default_factory=dict)

    def all_linears(self) -> list[Linear]:
        """Return the linears, those of the experts last."""
        return [
            *self.linears.values(),
            *(linear for each in self.experts.values() for trio in each for linear in trio),
        ]

    def arrays(self) -> list[Float32]:
        """Return what can change in a block: the memory of its linears and norms."""
        norms = [(norm.weight, norm.bias) for norm in self.norms.values()]
        return [
            *(linear.weight for linear in self.all_linears()),
            *(array for pair in norms for array in pair if array is not None),
        ]


def import_torch() -> tuple[Any, Any]:
    """Import torch and transformers; MissingExtraError if they are absent or too old."""
    try:
        torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    except ImportError as error:
        raise MissingExtraError(
            f"models outside bitwright's own list need torch and transformers, which are not installed "
            f'({error}): pip install "bitwright[transformers]"'
        ) from error
    # Older ones silently ignore what 5 writes into config.json, such as rope_parameters.
    version = str(transformers.__version__)
    if int(version.partition(".")[0]) < OLDEST_TRANSFORMERS:
        raise MissingExtraError(
            f"transformers {version} is too old, {OLDEST_TRANSFORMERS} is needed: "
            f'pip install "bitwright[transformers]"'
        )
    return torch, transformers


class TorchModel:
    """A model in float32 and in memory as a whole, next to the checkpoint that it comes from.

    Parameters
    ----------
    folder
        Checkpoint folder in float. Nothing is downloaded and no code from it is run.
    before
        Called with this model before its weights are read, when only the shapes of `module` are known.

    Raises
    ------
    MissingExtraError
        If torch or transformers is not installed.
    CheckpointError, UnsupportedModelError, NonFiniteError
        If the model cannot be loaded, its decoder blocks cannot be found, or a linear of a block is not
        stored in the checkpoint with the same values.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        before: "Callable[[TorchModel], None] | None" = None,
    ) -> None:
        self.torch, self.transformers = import_torch()
        self.checkpoint = Checkpoint(folder)
        note_model(self.checkpoint)
        self.folder: Path = self.checkpoint.folder
        declared = detect_format(self.checkpoint)
        if declared is not None:
            raise ValueError(
                f"{self.folder}: is quantized already ({declared.name}); start from the original"
            )
        config = self._config()
        self.module = self._without_weights(config)
        self.positions = _positions(self.module.config)
        self.vocab_size: int = self.module.get_input_embeddings().weight.shape[0]
        if before is not None:
            before(self)
        self.module, unexpected = self._load(config)
        self.prefix = f"{self.module.base_model_prefix}."
        self._settle_names()
        self._settle_head()
        self.unused = self._unused(unexpected)
        name, modules = self.find_blocks()
        self._warn_of_unused(f"{name}.{{}}", len(modules))
        self.blocks = [
            TorchBlock(index, f"{name}.{index}", module, routers(module, self.torch.nn))
            for index, module in enumerate(modules)
        ]
        self.experts: dict[str, ExpertPlace] = {}
        others: list[str] = []
        for block in self.blocks:
            others += self._describe(block)
        self._others = [name.removesuffix(".weight") for name in others]
        if not self.linears():
            raise self._unsupported("has no nn.Linear in its decoder blocks; nothing to quantize")
        if others:
            more = f" and {len(others) - SHOWN_NAMES} more" if len(others) > SHOWN_NAMES else ""
            warn(
                f"{self.folder}: {', '.join(others[:SHOWN_NAMES])}{more} stay in float: only nn.Linear "
                f"and experts are quantized"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that config.json declares, or else that of the first linear, as it is written."""
        config = self.checkpoint.config
        declared = MODEL_DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")))
        first = next(iter(self.linears().values()))
        return declared or written_dtype(self.checkpoint.dtype(f"{first.name}.weight"))

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        head, embedding = self.module.get_output_embeddings(), self.module.get_input_embeddings()
        return head is not None and head.weight.data_ptr() == embedding.weight.data_ptr()

    @property
    def family(self) -> str:
        """The model type of the text part."""
        return str(self.module.config.get_text_config().model_type)

    @property
    def block_prefix(self) -> str:
        """What the names of all layers begin with, up to the number of the block; empty if not all do."""
        prefix = self.blocks[0].name.removesuffix("0")
        return prefix if all(name.startswith(prefix) for name in self.linears()) else ""

    @property
    def nested(self) -> bool:
        """Whether the language model is part of a multimodal model."""
        return "language_model." in self.blocks[0].name

    def stack_size(self) -> int:
        """Return how many experts a layer has; ValueError where that differs from layer to layer."""
        counts = {len(trios) for block in self.blocks for trios in block.experts.values()}
        if len(counts) > 1:
            raise ValueError(
                f"{self.folder}: layers have {min(counts)} to {max(counts)} experts, which formats that "
                f"store all experts of a layer in one tensor are not written with; choose another format"
            )
        return next(iter(counts), 0)

    def linears(self) -> dict[str, Linear]:
        """Return the linears of the blocks that can be quantized, by name."""
        return {
            linear.name: linear
            for block in self.blocks
            for linear in block.all_linears()
            if not linear.router
        }

    def routers(self) -> list[str]:
        """Return the names of what chooses experts: linears for some readers, not for all."""
        modules = {module: name for name, module in self.module.named_modules()}
        found = [
            self._stored_name(modules[module])
            for block in self.blocks
            for module in block.module.modules()
            if module in block.routers
        ]
        return [name for name in found if name]

    def never_quantized(self) -> list[str]:
        """Return the names of the matrices that stay in float whatever is asked for, embedding and head
        aside: in the blocks, and outside of them."""
        blocks = [block.module for block in self.blocks]
        apart = outside(self.module, blocks, self.torch.nn)
        outer = sorted(self._stored_name(each) or each for each in apart)
        return [*self.routers(), *self._others, *outer]

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.folder}: {what}")

    def _config(self) -> Any:
        """Return what config.json says, as transformers understands it."""
        with self._loading():
            config = self.transformers.AutoConfig.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False
            )
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # of what is in float all the same
            return config

    def _without_weights(self, config: Any) -> Any:
        """Return the model's modules, of which only the shapes are known."""
        with self._loading(), self.torch.device("meta"):
            return self._kind(config).from_config(
                deepcopy(config),
                dtype=self.torch.float32,
                trust_remote_code=False,
                attn_implementation="eager",
            )

    def _kind(self, config: Any) -> Any:
        """Return transformers' class for the model: for text or, if it has none, for images and text."""
        kinds = (
            self.transformers.AutoModelForCausalLM,
            self.transformers.AutoModelForImageTextToText,
        )
        known = (each for each in kinds if type(config) in each._model_mapping)
        return next(known, kinds[0])

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Refuse what transformers cannot load."""
        try:
            yield
        except Exception as error:  # whatever a library makes of a stranger's files
            raise self._unsupported(
                f"transformers {self.transformers.__version__} cannot load this model: "
                f"{shown(str(error))}"
            ) from error

    def _load(self, config: Any) -> tuple[Any, list[str]]:
        """Return the model, and what transformers has found no use for."""
        logging = self.transformers.utils.logging
        shows_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        with ExitStack() as stack:
            stack.enter_context(self._loading())
            if shows_bars:
                stack.callback(logging.enable_progress_bar)
            model, report = self._kind(config).from_pretrained(
                str(self.folder),
                config=config,
                dtype=self.torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation="eager",  # the others need not call every layer as a module
                output_loading_info=True,
            )
        absent = sorted(map(str, report["missing_keys"]))
        if absent:
            raise self._unsupported(
                f"transformers finds no weights for {shown(absent[0])} and would make them up; is this "
                f"a complete language model?"
            )
        return model.eval().requires_grad_(False), sorted(map(str, report["unexpected_keys"]))

    def _settle_names(self) -> None:
        """Know tensors that were saved from the base model alone by their names in the whole."""
        known = self.module.state_dict().keys()
        renamed = {*self._renamed.values()}  # which is done whenever they are loaded
        bare = [
            name
            for name in self.checkpoint.names()
            if name not in known and self.prefix + name in known and name not in renamed
        ]
        roots = tuple({f"{name.partition('.')[0]}." for name in bare})
        self.checkpoint.rename(
            {name: self.prefix + name for name in self.checkpoint.names() if name.startswith(roots)}
        )

    def _settle_head(self) -> None:
        """Say in config.json that embedding and head are two matrices where transformers has kept both."""
        head, text = self.module.get_output_embeddings(), self.module.config.get_text_config()
        said = getattr(text, "tie_word_embeddings", False)
        if head is not None and said and not self.tied:
            names = {module: name for name, module in self.module.named_modules()}
            warn_of_head(self.checkpoint, names[head])
            self.checkpoint.config = untied(self.checkpoint.config)

    def _unused(self, unexpected: list[str]) -> list[str]:
        """Return the tensors that transformers has no use for, those that it is told to pass over
        included."""
        ignored = getattr(self.module, "_keys_to_ignore_on_load_unexpected", None) or ()
        known = self.module.state_dict().keys()
        return [
            name
            for name in self.checkpoint.names()
            if name in unexpected
            or name.removeprefix(self.prefix) in unexpected
            or (name not in known and any(re.search(each, name) for each in ignored))
        ]

    def _warn_of_unused(self, block: str, count: int) -> None:
        names = without_harmless(self.checkpoint, self.unused)
        warn_of_unused(self.checkpoint, names, kinds_of(names, block, count))

    def find_blocks(self) -> tuple[str, list[Any]]:
        """Return the blocks of the text decoder, and the name of their list."""
        found = decoder_blocks(self.module, self.torch.nn)
        if found is None:
            raise self._unsupported(
                f"{type(self.module).__name__} has no list of decoder blocks with nn.Linear layers, so "
                f"it cannot be quantized"
            )
        name, blocks = found
        if len({id(each) for each in blocks}) < len(blocks):
            raise self._unsupported(
                f"the blocks {name} share their weights, which is not supported"
            )
        return found

    def _describe(self, block: TorchBlock) -> list[str]:
        """Fill in what a block consists of; return the names of matrices that are no linears."""
        nn = self.torch.nn
        others = []
        for name, module in block.module.named_modules(prefix=block.name):
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, nn.Linear):
                block.linears[module] = self._linear(name, module, module in block.routers)
            elif all(n in own and own[n].ndim == 3 for n in ("gate_up_proj", "down_proj")):
                block.experts[module] = self._experts(block, name, module)
            elif "weight" in own and own["weight"].ndim == 1 and not list(module.children()):
                norm = self._norm(name, module)
                if norm is not None:
                    block.norms[module] = norm
            elif not isinstance(module, nn.Embedding) and module not in block.routers:
                others += [
                    f"{name}.{each}"
                    for each, parameter in own.items()
                    if parameter.ndim == 3 or (parameter.ndim == 2 and each == "weight")
                ]
        return others

    def _stored_name(self, name: str) -> str:
        """Return the checkpoint's name of a module: its own, or with or without the base model's prefix;
        empty where there is none."""
        candidates = (name, name.removeprefix(self.prefix), self.prefix + name)
        direct = (each for each in candidates if f"{each}.weight" in self.checkpoint)
        renamed = (self._renamed.get(f"{each}.weight") for each in candidates)
        found = next(filter(None, renamed), "").removesuffix(".weight")
        return next(direct, found)

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """The checkpoint's names of the tensors that transformers calls something else."""
        try:
            mapping = importlib.import_module("transformers.conversion_mapping")
            rules = mapping.get_model_conversion_mapping(self.module)
        except (ImportError, AttributeError):  # of earlier versions
            return {}
        found: dict[str, str] = {}
        for stored in self.checkpoint.names():
            name = stored
            for rule in rules:
                if not hasattr(rule, "operations"):  # which would merge or split it
                    name = rule.rename_source_key(name)[0]
            if name != stored:
                found[name] = stored
        return found

    def _linear(self, name: str, module: Any, router: bool) -> Linear:
        weight = module.weight.detach().numpy()
        stored = self._stored_name(name)
        if not router:
            if not stored:
                raise self._unsupported(
                    f"the weights of layer {name} are not stored under that name; transformers renames "
                    f"or merges them, which is not supported"
                )
            self._check_values(stored, weight)
        return Linear(stored, weight, router)

    def _check_values(self, name: str, weight: Float32) -> None:
        """Raise unless tensor `name` holds just these weights."""
        array = self.checkpoint.read(f"{name}.weight")
        if array.dtype.kind in "fV":
            require_finite(array, f"{self.checkpoint.file(f'{name}.weight')}: tensor {name}.weight")
        if array.shape != weight.shape or not (array.astype(np.float32) == weight).all():
            raise self._unsupported(
                f"tensor {name}.weight is not what transformers computes with; it is transformed when it "
                f"is loaded, which is not supported"
            )

    def _experts(
        self, block: TorchBlock, name: str, module: Any
    ) -> list[tuple[Linear, Linear, Linear]]:
        """Return the linears of a module that holds all experts in two arrays, by checkpoint name."""
        gate_up = module.gate_up_proj.detach().numpy()
        down = module.down_proj.detach().numpy()
        inner = gate_up.shape[1] // 2
        if (
            len(gate_up) != len(down)
            or gate_up.shape[1:] != (2 * inner, down.shape[1])
            or down.shape[2] != inner
            or not hasattr(module, "act_fn")
        ):
            raise self._unsupported(
                f"the experts {name} are laid out as {list(gate_up.shape)} and {list(down.shape)}; only "
                f"[experts, 2 * inner, hidden] and [experts, hidden, inner] are supported"
            )
        stem, parts = self._expert_names(block, name)
        stacked = self._stacked(block, stem)
        stack = Stack(f"{stem}.gate_up_proj", f"{stem}.down_proj")
        found = []
        for number in range(len(gate_up)):
            arrays = gate_up[number, :inner], gate_up[number, inner:], down[number]
            linears = [
                Linear(f"{stem}.{number}.{part}", array)
                for part, array in zip(parts, arrays, strict=True)
            ]
            for linear in linears:
                if f"{linear.name}.weight" not in self.checkpoint:
                    raise self._unsupported(f"expert {linear.name} is not stored")
                self._check_values(linear.name, linear.weight)
            for linear, role in zip(linears, ROLES, strict=True):
                self.experts[linear.name] = ExpertPlace(
                    stem, stacked, stack, number, role, inner, down.shape[1]
                )
            found.append((linears[0], linears[1], linears[2]))
        return found

    def _stacked(self, block: TorchBlock, stem: str) -> str:
        """Return what mlx-lm calls all experts of a layer: as of families that are known, or switch_mlp."""
        family = known_families().get(self.family)
        if family is not None and family.experts is not None:
            start = stem[: stem.index(block.name.removeprefix(self.prefix))]
            return f"{start}{block.name.removeprefix(self.prefix)}.{family.experts.stacked}"
        return f"{stem.removesuffix('experts')}switch_mlp"

    def _expert_names(self, block: TorchBlock, name: str) -> tuple[str, tuple[str, str, str]]:
        """Return what precedes an expert's number in the checkpoint, and the names of its three parts."""
        roots = {
            block.name,
            block.name.removeprefix(self.prefix),
            self.prefix + block.name,
        }
        pattern = re.compile(
            rf"((?:{'|'.join(map(re.escape, sorted(roots)))})\.(?:.*\.)?experts)\.0\.(\w+)\.weight"
        )
        parts: dict[str, set[str]] = {}
        for match in filter(None, map(pattern.fullmatch, self.checkpoint.names())):
            parts.setdefault(match[1], set()).add(match[2])
        for stem in sorted(
            parts, key=lambda each: each not in (name, name.removeprefix(self.prefix))
        ):
            for trio in EXPERTS:
                if parts[stem] == set(trio):
                    return stem, trio
        raise self._unsupported(
            f"the experts {name} are not stored one by one under names that are known "
            f"({name}.0.{EXPERTS[0][0]}.weight and the like), which is not supported"
        )

    def _norm(self, name: str, module: Any) -> Norm | None:
        """Return a norm that scales can be folded into; None if it is none, or nobody knows its formula."""
        kind, stored = self._norm_kind(module), self._stored_name(name)
        if kind is None or not stored:
            return None
        bias = getattr(module, "bias", None)
        norm = Norm(
            stored,
            kind,
            module.weight.detach().numpy(),
            None if bias is None else bias.detach().numpy(),
        )
        for part, values in (("weight", norm.weight), ("bias", norm.bias)):
            if values is None:
                continue
            tensor = f"{stored}.{part}"
            if tensor not in self.checkpoint or not np.array_equal(
                self.checkpoint.read(tensor).astype(np.float32), values
            ):
                return None
        return norm

    def _norm_kind(self, module: Any) -> FoldKind | None:
        """Find out which formula a module computes, from what it makes of random numbers."""
        torch = self.torch
        if {name for name, _ in module.named_parameters()} - {"weight", "bias"}:
            return None
        weight = module.weight.detach()
        bias = getattr(module, "bias", None)
        values = (getattr(module, name, None) for name in EPSILONS)
        epsilon = next((float(each) for each in values if isinstance(each, int | float)), 1e-6)
        rng = np.random.default_rng(0)
        states = torch.from_numpy(
            rng.standard_normal((1, 4, len(weight)), np.float32) + np.float32(0.5)
        )
        try:
            with torch.no_grad():
                output = module(states.clone())
        except Exception:  # a module that wants other arguments is not a plain norm
            return None
        if not isinstance(output, torch.Tensor) or output.shape != states.shape:
            return None
        rms = states * (states.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        centred = states - states.mean(-1, keepdim=True)
        normal = centred * (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        formulas: list[tuple[FoldKind, Any]] = [("layer_norm", weight * normal)]
        if bias is None:
            formulas += [("rms_norm", weight * rms), ("offset_rms_norm", (1 + weight) * rms)]
        else:
            formulas[0] = ("layer_norm", weight * normal + bias)
        largest = float(output.abs().max())
        for kind, expected in formulas:
            if float((output - expected).abs().max()) <= EQUAL * largest and largest > 0:
                return kind
        return None


class Watch:
    """Hooks on a block while it runs: which linears read the same array, which norm computed it, and
    second moments of what those in `wanted` read.

    Parameters
    ----------
    model, block
        Whose modules are watched.
    wanted
        Names of the linears that statistics are gathered for.
    magnitudes
        Gather mean magnitudes too.
    """

    def __init__(
        self,
        model: TorchModel,
        block: TorchBlock,
        wanted: Container[str] = (),
        magnitudes: bool = False,
    ) -> None:
        self.inputs: list[Input] = []  # in the order in which they are first read
        self._read_by_experts: set[Norm] = set()
        self._model = model
        self._block = block
        self._wanted = wanted
        self._magnitudes = magnitudes
        self._of: dict[Linear, Input] = {}
        self._of_experts: dict[Any, list[tuple[Input, Input]]] = {}
        self._expected: dict[Any, Any] = {}  # outputs of experts as we understand them
        self._checked: set[Any] = set()
        self._handles: list[Any] = []
        # By memory address, within a chunk; `_alive` keeps that memory from being used again.
        self._live: dict[Any, Input] = {}
        self._computed: dict[Any, Norm] = {}
        self._added: set[tuple[Any, Input]] = set()
        self._alive: list[Any] = []

    def __enter__(self) -> "Watch":
        add = self._handles.append
        for module in self._block.linears:
            add(module.register_forward_pre_hook(self._before_linear, with_kwargs=True))
        for module in self._block.norms:
            add(module.register_forward_hook(self._after_norm))
        for module in self._block.experts:
            add(module.register_forward_pre_hook(self._before_experts, with_kwargs=True))
            add(module.register_forward_hook(self._after_experts))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.next_chunk()

    def next_chunk(self) -> None:
        """Forget which arrays are which; their memory may be used for others from now on."""
        self._live.clear()
        self._computed.clear()
        self._added.clear()
        self._alive.clear()

    def finish(self) -> list[Input]:
        """Return the inputs with their grams; linears that never ran have one without."""
        for linear in self._block.all_linears():
            if linear not in self._of:
                self.inputs.append(Input([linear]))
        for each in self.inputs:
            if each.statistics is not None and each.statistics.tokens:
                moments = each.statistics.gather()
                each.mean_abs, each.gram = moments.mean_abs, moments.gram
            each.statistics = None
            each.can_scale = self.can_scale(each)
        return self.inputs

    def can_scale(self, read: Input) -> bool:
        """Tell whether a norm computes an input for linears, and for nothing else that was seen."""
        return (
            read.norm is not None
            and read.norm not in self._read_by_experts
            and all(linear.name for linear in read.readers)
        )

    def _key(self, tensor: Any) -> Any:
        """Return what tells an array from another one, however it is folded into axes."""
        self._alive.append(tensor)
        strides = None if tensor.is_contiguous() else tensor.stride()
        return tensor.data_ptr(), tensor.numel(), tensor.shape[-1], strides, tensor._version

    def _before_linear(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        linear = self._block.linears[module]
        states = args[0] if args else kwargs["input"]
        key = self._key(states)
        known = self._of.get(linear)
        if known is None:
            known = self._live.get(key)
            if known is None:
                known = Input([])
                self.inputs.append(known)
            known.readers.append(linear)
            self._of[linear] = known
        known.norm = known.norm or self._computed.get(key)
        self._live.setdefault(key, known)
        if linear.name in self._wanted and (key, known) not in self._added:
            self._added.add((key, known))
            self._gather(known, states)

    def _gather(self, known: Input, states: Any) -> None:
        array = np.ascontiguousarray(
            states.detach().float().reshape(-1, states.shape[-1]).numpy(), np.float32
        )
        if known.statistics is None:
            known.statistics = LayerStatistics(array.shape[1], self._magnitudes)
        known.statistics.add(array)

    def _after_norm(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._computed[self._key(output)] = self._block.norms[module]

    def _before_experts(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        torch = self._model.torch
        bound = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
        if len(bound) != 3 or bound[1].dtype.is_floating_point:
            raise self._misunderstood(module)
        states, chosen, shares = bound
        norm = self._computed.get(self._key(states))
        if norm is not None:
            self._read_by_experts.add(norm)
        rows = states.reshape(-1, states.shape[-1])
        chosen, shares = (each.reshape(len(rows), -1) for each in (chosen, shares))
        inputs = self._inputs_of_experts(module)
        check = module not in self._checked
        expected = torch.zeros_like(rows)
        for number, (first, last) in enumerate(inputs):
            tokens, places = torch.where(chosen == number)
            wanted = [
                any(linear.name in self._wanted for linear in each.readers)
                for each in (first, last)
            ]
            if not len(tokens) or not (any(wanted) or check):
                continue
            here = rows[tokens]
            if wanted[0]:
                self._gather(first, here)
            if not (wanted[1] or check):
                continue
            linear = torch.nn.functional.linear
            product = _gated(module, linear(here, module.gate_up_proj[number]))
            if wanted[1]:
                self._gather(last, product)
            if check:
                output = linear(product, module.down_proj[number])
                expected.index_add_(0, tokens, output * shares[tokens, places, None])
        if check:
            self._expected[module] = expected

    def _after_experts(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Compare what experts computed with our understanding of them, once per block."""
        expected = self._expected.pop(module, None)
        if expected is None:
            return
        output = _first(output).reshape(expected.shape)
        # NaN is what the statistics are checked for, with a better message.
        if float((output - expected).norm()) > 10 * EQUAL * float(expected.norm()):
            raise self._misunderstood(module)
        self._checked.add(module)

    def _inputs_of_experts(self, module: Any) -> list[tuple[Input, Input]]:
        if module not in self._of_experts:
            self._of_experts[module] = []
            for gate, up, down in self._block.experts[module]:
                pair = Input([gate, up]), Input([down])
                self._of_experts[module].append(pair)
                self.inputs.extend(pair)
                self._of.update({gate: pair[0], up: pair[0], down: pair[1]})
        return self._of_experts[module]

    def _misunderstood(self, module: Any) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._model.folder}: block {self._block.index}: {type(module).__name__} does not compute "
            f"down(act(gate x) * up x), weighted and added up, so its experts are not supported"
        )


@dataclass(frozen=True)
class _Call:
    """What a block is called with, its hidden states aside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool  # how the hidden states are passed

    def run(self, module: Any, hidden: Any) -> Any:
        if self.by_name:
            return _first(module(*self.args, **{**self.kwargs, "hidden_states": hidden}))
        return _first(module(hidden, *self.args, **self.kwargs))


class Stream:
    """The hidden states of all samples on their way through the blocks.

    What else a block is called with (masks, positions) may differ from block to block, but not with the
    tokens; and nothing may happen to the hidden states between two blocks. Both is checked on one chunk.

    Parameters
    ----------
    model
        In float, as yet.
    tokens
        ``[samples, length]`` int32.

    Raises
    ------
    UnsupportedModelError
        If the model does not consist of blocks in a row.
    """

    def __init__(self, model: TorchModel, tokens: NDArray[np.int32]) -> None:
        self.model = model
        rows = max(1, CHUNK_TOKENS // tokens.shape[1])
        self.chunks = [tokens[first : first + rows] for first in range(0, len(tokens), rows)]
        self.scale_groups = 0  # norms that scales can be folded into
        self._calls: dict[int, list[_Call]] = {}
        for chunk in self.chunks:
            if len(chunk) not in self._calls:
                self._calls[len(chunk)] = self._record(chunk)
        self._hidden = [self._embed(chunk) for chunk in self.chunks]

    def first_chunks(self, tokens: int) -> int:
        """Return how many chunks it takes for so many tokens."""
        return min(len(self.chunks), -(-tokens // self.chunks[0].size))

    def before(self, number: int) -> Any:
        """Return the hidden states of a chunk before the next block."""
        return self._hidden[number]

    def run(self, block: TorchBlock, number: int) -> Any:
        """Return what a block makes of a chunk."""
        call = self._calls[len(self.chunks[number])][block.index]
        with self.model.torch.no_grad():
            # A copy, since some models add to their argument in place.
            return call.run(block.module, self._hidden[number].clone())

    def advance(self, block: TorchBlock) -> None:
        """Move all chunks past a block."""
        for number in range(len(self.chunks)):
            self._hidden[number] = self.run(block, number)

    def replace(self, hidden: list[Any]) -> None:
        """Take the hidden states of all chunks from elsewhere."""
        self._hidden = hidden

    def observe(
        self, block: TorchBlock, wanted: Container[str], magnitudes: bool = False, kept: int = 0
    ) -> tuple[Watch, list[Any]]:
        """Run a block over all chunks; return what was seen, and the outputs of the first `kept` chunks."""
        outputs = []
        with Watch(self.model, block, wanted, magnitudes) as watch:
            for number in range(len(self.chunks)):
                output = self.run(block, number)
                if number < kept:
                    outputs.append(output)
                watch.next_chunk()
        return watch, outputs

    def _run_model(self, chunk: NDArray[np.int32]) -> None:
        torch = self.model.torch
        with torch.no_grad():
            try:
                self.model.module(
                    input_ids=torch.from_numpy(chunk.astype(np.int64)), use_cache=False
                )
            except _Stop:
                return
            except BitwrightError:
                raise
            except Exception as error:  # of a library that reads a stranger's config.json
                raise UnsupportedModelError(
                    f"{self.model.folder}: transformers cannot run this model: {shown(str(error))}"
                ) from error
        raise self._not_in_a_row("not all of them run")

    def _record(self, chunk: NDArray[np.int32]) -> list[_Call]:
        """Run the float model; return what each block is called with."""
        calls, groups = self._calls_with(chunk)
        others, _ = self._calls_with((chunk + 1) % self.model.vocab_size)
        for block, call, other in zip(self.model.blocks, calls, others, strict=True):
            if not _alike((call.args, call.kwargs), (other.args, other.kwargs)):
                raise self._not_in_a_row(
                    f"{block.name} is called with more than hidden states that depends on the tokens"
                )
        self.scale_groups = groups
        return calls

    def _calls_with(self, chunk: NDArray[np.int32]) -> tuple[list[_Call], int]:
        blocks = self.model.blocks
        torch = self.model.torch
        calls: list[_Call] = []
        watches = [Watch(self.model, block) for block in blocks]
        previous: Any = None

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = len(calls)
            hidden = args[0] if args else kwargs.get("hidden_states")
            if index == len(blocks) or module is not blocks[index].module or hidden is None:
                raise self._not_in_a_row("they do not run one after the other")
            if index and not (
                hidden.shape == previous.shape
                and torch.allclose(hidden, previous, rtol=0, atol=0, equal_nan=True)
            ):
                raise self._not_in_a_row(
                    f"the hidden states are changed before {blocks[index].name}"
                )
            rest = {
                name: value for name, value in kwargs.items() if args or name != "hidden_states"
            }
            calls.append(_Call(args[1:], rest, not args))

        def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
            nonlocal previous
            previous = _first(output)
            watches[len(calls) - 1].next_chunk()
            if len(calls) == len(blocks):
                raise _Stop

        with ExitStack() as stack:
            for block, watch in zip(blocks, watches, strict=True):
                stack.enter_context(watch)
                handle = block.module.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(block.module.register_forward_hook(after).remove)
            self._run_model(chunk)
        return calls, sum(watch.can_scale(each) for watch in watches for each in watch.inputs)

    def _embed(self, chunk: NDArray[np.int32]) -> Any:
        """Return the hidden states that the first block is given."""
        found: list[Any] = []

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        handle = self.model.blocks[0].module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            self._run_model(chunk)
        finally:
            handle.remove()
        return found[0]

    def _not_in_a_row(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.model.folder}: the decoder blocks of {type(self.model.module).__name__} cannot be "
            f"walked one by one: {why}. This architecture is not supported with calibration data"
        )


def _positions(config: Any) -> int | None:
    """Return how many positions a model has learned, or reaches with its RoPE scaling; None if unknown."""
    text = config.get_text_config()
    declared = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    if not isinstance(declared, int):
        return None
    original = rope.get("original_max_position_embeddings") or declared
    return max(declared, int(original * (rope.get("factor") or 1)))


def _first(output: Any) -> Any:
    """Return the hidden states of what a module returned."""
    return output[0] if isinstance(output, tuple | list) else output


def _gated(module: Any, gate_up: Any) -> Any:
    if hasattr(module, "_apply_gate"):  # some experts clamp, or mix the halves otherwise
        return module._apply_gate(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _alike(one: Any, other: Any) -> bool:
    """Tell whether two nested structures hold the same numbers; objects of other kinds need only be of one
    type."""
    if type(one) is not type(other):
        return False
    if hasattr(one, "data_ptr"):
        return one.shape == other.shape and bool(((one == other) | (one != one)).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return not isinstance(one, int | float | str) or one == other
