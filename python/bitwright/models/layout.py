"""The stages, tensors and scale groups of one decoder block, from an `Architecture` and a config."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from bitwright.models.architecture import (
    Architecture,
    Attention,
    Experts,
    GatedDelta,
    LatentAttention,
    Mamba,
    Mlp,
    ShortConvolution,
    Stack,
)
from bitwright.models.config import ModelConfig
from bitwright.models.fold import FoldKind

StageKind = Literal[
    "attention",  # queries, keys and values, and attention itself
    "latent",  # down to the latents, and queries where those have none
    "latent_query",
    "latent_attention",  # keys and values from their latent, and attention itself
    "delta",  # a gated delta-net up to its output
    "convolution",  # a short convolution between its gates
    "mamba",  # a Mamba-2 mixer up to its output
    "attention_output",
    "mixer_output",  # of a mixer beside attention
    "mlp",
    "beside",  # an MLP with a norm of its own that reads what attention reads
    "mlp_output",
    "router",  # no linear that is quantized; all experts read its input
    "shared",
    "shared_output",
    "expert",
    "expert_output",
]
Role = Literal["gate", "up", "down"]
SUB_BLOCK_STARTS = (
    "attention",
    "latent",
    "delta",
    "convolution",
    "mamba",
    "mlp",
    "beside",
    "router",
)
# The stages that read the hidden states.


@dataclass(frozen=True)
class Stage:
    """Linears that share one input, and what is computed from their outputs.

    A stage reads the hidden states, through `norm` if it has one, or the output of an earlier stage;
    see `DecoderBlock`. `mlp` names the linears of an MLP or expert, `expert` is the expert's index.
    """

    kind: StageKind
    linears: tuple[str, ...]
    norm: str | None = None
    mlp: Mlp | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        """The name of its input: that of its first linear, or of its norm if it has no linear."""
        return (*self.linears, self.norm or "")[0]

    @property
    def has_own_input(self) -> bool:
        """Whether no earlier stage has the same input: a shared expert reads what the router reads."""
        return self.kind != "shared"

    @property
    def adds_to_states(self) -> bool:
        """Whether its outputs are added to the hidden states, weighted by no router."""
        return self.kind in ("attention_output", "mixer_output", "mlp_output")

    @property
    def reads_routed(self) -> bool:
        """Whether it reads the router's input, for all or some of the tokens."""
        return self.kind in ("shared", "expert")


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that share an input, and the norm or linear before them, between which AWQ moves a scale.

    Parameters
    ----------
    previous
        The norm or linear that the scale is folded into.
    kind
        What it is.
    layers
        The linears that are scaled.
    floats
        Others with the same input that are never quantized, such as a router; they are scaled, too.
    outputs
        Which rows of the previous linear compute the input; None for all.
    sub_block
        Whether the block objective judges what the layers' sub-block (attention, MLP) adds to the hidden
        states, instead of the layers' own outputs.
    """

    previous: str
    kind: FoldKind
    layers: tuple[str, ...]
    floats: tuple[str, ...] = ()
    outputs: range | tuple[int, ...] | None = None
    sub_block: bool = False


@dataclass(frozen=True)
class ExpertPlace:
    """The expert that a linear belongs to, and its role there."""

    prefix: str  # of the names, up to the expert's index
    stacked: str  # prefix of the role where MLX stores all experts in one tensor
    stack: Stack  # of the family's own files
    index: int
    role: Role
    size: int  # channels between up and down
    hidden: int
    part: str | None = None  # what the role is called in MLX's stacks

    @property
    def stacked_name(self) -> str:
        """The tensor of all experts, without ``.weight``."""
        return f"{self.stacked}.{self.part or f'{self.role}_proj'}"


@dataclass(frozen=True)
class BlockLayout:
    """Stages, tensors and scale groups of one block; names are relative to it.

    ``linears`` and ``floats`` map names without ``.weight`` to shapes, in the order of the computation:
    those that may be quantized, and those that never are. ``vectors`` maps full names of all other tensors.
    """

    stages: tuple[Stage, ...]
    linears: Mapping[str, tuple[int, int]]
    floats: Mapping[str, tuple[int, int]]
    vectors: Mapping[str, tuple[int, ...]]
    groups: tuple[ScaleGroup, ...]
    never_clipped: tuple[str, ...]
    experts: Mapping[str, ExpertPlace]

    @property
    def sub_blocks(self) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
        """The stages of attention, and those of the MLP or experts: none where both are parallel."""
        starts = (
            number
            for number, stage in enumerate(self.stages)
            if stage.kind in SUB_BLOCK_STARTS and stage.kind != "beside" and number > 0
        )
        first = next(starts, len(self.stages))
        return self.stages[:first], self.stages[first:]

    def channels(self, stage: Stage) -> int:
        """Return how many channels a stage reads; a router's are those of the first of the floats."""
        shapes, names = (
            (self.linears, stage.linears) if stage.linears else (self.floats, (*self.floats,))
        )
        return shapes[names[0]][1]


def block_layout(architecture: Architecture, config: ModelConfig, index: int) -> BlockLayout:
    """Return the layout of block `index`."""
    builder = _Builder(architecture, config.at(index))
    kind = config.layer_types[index]
    mixer, alone = architecture.mixers.get(kind), architecture.rules.alone
    if kind in ("mlp", "moe"):
        pass
    elif isinstance(mixer, GatedDelta):
        builder.add_delta(mixer)
    elif isinstance(mixer, ShortConvolution):
        builder.add_convolution(mixer)
    elif isinstance(mixer, Mamba):
        builder.add_mamba(mixer)
    elif isinstance(architecture.attention, LatentAttention):
        builder.add_latent_attention(architecture.attention)
        if config.indexes and config.indexes[index]:
            builder.add_indexer(architecture.attention)
    else:
        builder.add_attention(architecture.attention)
        if architecture.beside is not None:
            builder.add_mixer_beside(architecture.beside)
    if alone and kind not in ("mlp", "moe"):
        pass
    elif config.parallel:
        builder.add_parallel_mlp(architecture.mlp)
    elif config.is_sparse[index] and architecture.experts is not None:
        builder.add_experts(architecture.experts)
    else:
        builder.add_mlp(architecture.mlp)
    if architecture.layer_scale is not None:
        builder.vectors[architecture.layer_scale] = (1,)
    return builder.layout()


class _Builder:
    def __init__(self, architecture: Architecture, config: ModelConfig) -> None:
        self.architecture = architecture
        self.config = config
        self.stages: list[Stage] = []
        self.linears: dict[str, tuple[int, int]] = {}
        self.floats: dict[str, tuple[int, int]] = {}
        self.vectors: dict[str, tuple[int, ...]] = {}
        self.groups: list[ScaleGroup] = []
        self.never_clipped: tuple[str, ...] = ()
        self.experts: dict[str, ExpertPlace] = {}

    def layout(self) -> BlockLayout:
        return BlockLayout(
            stages=tuple(self.stages),
            linears=self.linears,
            floats=self.floats,
            vectors=self.vectors,
            groups=tuple(self.groups),
            never_clipped=self.never_clipped,
            experts=self.experts,
        )

    def add_attention(self, names: Attention) -> None:
        config, hidden = self.config, self.config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        outputs: range | tuple[int, ...] | None = None
        if names.fused is None:
            linears: tuple[str, ...] = (names.query, names.key, names.value)
            if config.keys_are_values:
                linears = linears[:2]
            wide = 2 * queries if names.gated else queries
            for name, width in zip(linears, (wide, keys, keys)[: len(linears)], strict=True):
                self._linear(name, (width, hidden), config.query_bias)
            value, self.never_clipped = names.value, (names.query, names.key)
        else:
            linears = (names.fused,)
            self._linear(names.fused, (queries + 2 * keys, hidden), config.query_bias)
            value, self.never_clipped = names.fused, (names.fused,)
            outputs = range(queries + keys, queries + 2 * keys)
            if names.by_head:
                outputs = _last_of(3 * config.head_dim, config.head_dim, queries + 2 * keys)
        for norm, width in ((names.query_norm, queries), (names.key_norm, keys)):
            if norm is not None and config.head_norms:
                self.vectors[f"{norm}.weight"] = (width if names.whole else config.head_dim,)
        if names.sinks is not None:
            self.vectors[names.sinks] = (config.num_attention_heads,)
        self._linear(names.output, (hidden, queries), config.output_bias)
        norm = self._norm(self.architecture.attention_norm)
        self._norm(self.architecture.attention_post_norm)
        self.stages += [
            Stage("attention", linears, norm),
            Stage("attention_output", (names.output,)),
        ]
        self._norm_group(norm, linears)
        # Attention mixes tokens but not channels: a scale passes through it, but through no norm.
        if not names.value_norm:
            self.groups.append(ScaleGroup(value, "linear", (names.output,), outputs=outputs))

    def add_latent_attention(self, names: LatentAttention) -> None:
        config, hidden, latent = self.config, self.config.hidden_size, self.config.latent
        if latent is None:
            raise ValueError("latent attention: the config has no sizes for it")
        heads, bias = config.num_attention_heads, config.query_bias
        queries = heads * config.head_dim
        norm = self._norm(self.architecture.attention_norm)
        first = names.query if latent.query_rank is None else names.query_down
        linears = (first, names.key_value_down)
        self.stages.append(Stage("latent", linears, norm))
        self._norm_group(norm, linears)
        if latent.query_rank is None:
            self._linear(names.query, (queries, hidden), False)
        else:
            self._linear(names.query_down, (latent.query_rank, hidden), bias)
        down = (latent.key_value_rank + latent.rotary_dim, hidden)
        self._linear(names.key_value_down, down, bias)
        if latent.query_rank is not None:
            self.vectors[f"{names.query_norm}.weight"] = (latent.query_rank,)
            self._linear(names.query_up, (queries, latent.query_rank), False)
            self.stages.append(Stage("latent_query", (names.query_up,)))
            self._norm_group(names.query_norm, (names.query_up,))
        self.vectors[f"{names.key_value_norm}.weight"] = (latent.key_value_rank,)
        head = latent.plain_dim + latent.value_dim
        self._linear(names.key_value_up, (heads * head, latent.key_value_rank), False)
        self._linear(names.output, (hidden, heads * latent.value_dim), config.output_bias)
        self.stages += [
            Stage("latent_attention", (names.key_value_up,)),
            Stage("attention_output", (names.output,)),
        ]
        self._norm_group(names.key_value_norm, (names.key_value_up,))
        values = _last_of(head, latent.value_dim, heads * head)
        group = ScaleGroup(names.key_value_up, "linear", (names.output,), outputs=values)
        self.groups.append(group)
        self.never_clipped = (*linears, names.query_up)
        self._norm(self.architecture.attention_post_norm)

    def add_indexer(self, names: LatentAttention) -> None:
        """Add what chooses tokens to what reads attention's inputs, so that scales are folded into it."""
        latent, hidden, prefix = self.config.latent, self.config.hidden_size, names.indexer
        if latent is None or latent.query_rank is None:
            raise ValueError("indexer: the config has no latent of queries")
        self.floats[f"{prefix}.wk"] = (latent.index_dim, hidden)
        self.floats[f"{prefix}.weights_proj"] = (latent.index_heads, hidden)
        self.floats[f"{prefix}.wq_b"] = (latent.index_heads * latent.index_dim, latent.query_rank)
        for part in ("weight", "bias"):
            self.vectors[f"{prefix}.k_norm.{part}"] = (latent.index_dim,)
        readers = {
            self.architecture.attention_norm: (f"{prefix}.wk", f"{prefix}.weights_proj"),
            names.query_norm: (f"{prefix}.wq_b",),
        }
        self.groups = [
            replace(group, floats=(*group.floats, *readers.get(group.previous, ())))
            for group in self.groups
        ]

    def add_delta(self, names: GatedDelta) -> None:
        sizes, hidden = self.config.recurrence, self.config.hidden_size
        if sizes is None:
            raise ValueError("gated delta-net: the config has no sizes for it")
        keys, values = sizes.key_heads * sizes.key_dim, sizes.heads * sizes.value_dim
        widths = [2 * keys + values, values]
        for name, width in zip(
            names.inputs, widths if len(names.inputs) > 1 else [sum(widths)], strict=True
        ):
            self._linear(name, (width, hidden), False)
        for name in names.controls:
            self.floats[name] = (2 * sizes.heads // len(names.controls), hidden)
        self.vectors[f"{names.convolution}.weight"] = (2 * keys + values, 1, sizes.taps)
        self.vectors[names.decay] = self.vectors[names.step] = (sizes.heads,)
        self.vectors[f"{names.norm}.weight"] = (sizes.value_dim,)
        self._linear(names.output, (hidden, values), False)
        self._mixer_stages("delta", names.inputs, names.output, names.controls)

    def add_convolution(self, names: ShortConvolution) -> None:
        config, hidden = self.config, self.config.hidden_size
        self._linear(names.inputs, (3 * hidden, hidden), config.projection_bias)
        self.vectors[f"{names.convolution}.weight"] = (hidden, 1, config.convolved)
        if config.convolution_bias:
            self.vectors[f"{names.convolution}.bias"] = (hidden,)
        self._linear(names.output, (hidden, hidden), config.projection_bias)
        self._mixer_stages("convolution", (names.inputs,), names.output)
        # The output is the second part, times what the others are convolved to.
        rows = range(hidden, 2 * hidden)
        self.groups.append(ScaleGroup(names.inputs, "linear", (names.output,), outputs=rows))

    def add_mamba(self, names: Mamba) -> None:
        self._mamba(names)
        self._mixer_stages("mamba", (names.inputs,), names.output)
        self._mamba_group(names)

    def add_mixer_beside(self, names: Mamba) -> None:
        """Add a mixer whose first linear reads what attention reads: it is one of its stage's."""
        self._mamba(names)
        stages, group = self.stages, self.groups[0]
        stages[0] = replace(stages[0], linears=(*stages[0].linears, names.inputs))
        stages.append(Stage("mixer_output", (names.output,)))
        self.groups[0] = replace(group, layers=(*group.layers, names.inputs))
        self._mamba_group(names)

    def _mamba_group(self, names: Mamba) -> None:
        if self.config.gated_norm:
            self.groups.append(ScaleGroup(names.norm, "rms_norm", (names.output,)))

    def _mamba(self, names: Mamba) -> None:
        sizes, config = self.config.recurrence, self.config
        if sizes is None:
            raise ValueError("Mamba: the config has no sizes for it")
        values = sizes.heads * sizes.value_dim
        mixed = values + 2 * sizes.key_heads * sizes.key_dim
        width = values + mixed + sizes.heads
        self._linear(names.inputs, (width, config.hidden_size), config.projection_bias)
        self.vectors[f"{names.convolution}.weight"] = (mixed, 1, sizes.taps)
        if config.convolution_bias:
            self.vectors[f"{names.convolution}.bias"] = (mixed,)
        for name in (names.decay, names.step, names.skip):
            self.vectors[name] = (sizes.heads,)
        if config.gated_norm:
            self.vectors[f"{names.norm}.weight"] = (values,)
        self._linear(names.output, (config.hidden_size, values), config.projection_bias)

    def _mixer_stages(
        self, kind: StageKind, inputs: tuple[str, ...], output: str, floats: tuple[str, ...] = ()
    ) -> None:
        norm = self._norm(self.architecture.attention_norm)
        self._norm(self.architecture.attention_post_norm)
        self.stages += [Stage(kind, inputs, norm), Stage("attention_output", (output,))]
        self._norm_group(norm, inputs, floats)

    def add_mlp(self, names: Mlp) -> None:
        norm = self._norm(self.architecture.mlp_norm)
        self._norm(self.architecture.mlp_post_norm)
        linears = self._mlp(names, self.config.intermediate_size)
        self.stages += [
            Stage("mlp", linears, norm, names),
            Stage("mlp_output", (names.down,), mlp=names),
        ]
        self._norm_group(norm, linears)
        self._down_group(names, self.config.intermediate_size)

    def add_parallel_mlp(self, names: Mlp) -> None:
        """Add an MLP whose first linears read what attention reads: they are linears of its stage, unless
        they have a norm of their own."""
        if self.architecture.rules.two_norms:
            self.add_mlp(names)
            self.stages[-2] = replace(self.stages[-2], kind="beside")
            return
        linears = self._mlp(names, self.config.intermediate_size)
        stages = self.stages
        stages[0] = replace(stages[0], linears=(*stages[0].linears, *linears), mlp=names)
        stages.append(Stage("mlp_output", (names.down,), mlp=names))
        group = self.groups[0]
        self.groups[0] = replace(group, layers=(*group.layers, *linears))
        self._down_group(names, self.config.intermediate_size)

    def add_experts(self, names: Experts) -> None:
        config = self.config.experts
        norm = self._norm(self.architecture.mlp_norm)
        if config is None or norm is None or self.architecture.mlp_post_norm is not None:
            raise ValueError("experts: the config has no sizes for them, or the norms do not fit")
        self.stages.append(Stage("router", (), norm))
        self.floats[names.router] = (config.count, self.config.hidden_size)
        if names.router_bias:
            self.vectors[f"{names.router}.bias"] = (config.count,)
        floats = [names.router]
        readers: list[str] = []
        if names.correction is not None:
            self.vectors[names.correction] = (*names.correction_axes, config.count)
        mlps: list[tuple[int | None, Mlp, int]] = []
        if names.shared is not None and config.shared_size:
            mlps.append((None, names.shared, config.shared_size))
            if names.shared_gate is not None:
                self.floats[names.shared_gate] = (1, self.config.hidden_size)
                floats.append(names.shared_gate)
        for expert in range(config.count):
            prefix = f"{names.prefix}.{expert}."
            roles: dict[Role, str] = {"up": prefix + names.mlp.up, "down": prefix + names.mlp.down}
            if names.mlp.gate is not None:
                roles = {"gate": prefix + names.mlp.gate, **roles}
            for role, name in roles.items():
                self.experts[name] = ExpertPlace(
                    names.prefix,
                    names.stacked,
                    names.own_stack,
                    expert,
                    role,
                    config.intermediate_size,
                    self.config.hidden_size,
                    names.in_stacks.get(role),
                )
            own = Mlp(roles.get("gate"), roles["up"], roles["down"])
            mlps.append((expert, own, config.intermediate_size))
        down_groups = []
        for index, mlp, size in mlps:
            linears = self._mlp(mlp, size)
            readers += linears
            kind: StageKind = "shared" if index is None else "expert"
            output: StageKind = "shared_output" if index is None else "expert_output"
            self.stages += [
                Stage(kind, linears, None, mlp, index),
                Stage(output, (mlp.down,), None, mlp, index),
            ]
            down_groups.append((mlp, size))
        self._norm_group(norm, tuple(readers), tuple(floats))
        for mlp, size in down_groups:
            self._down_group(mlp, size)

    def _mlp(self, names: Mlp, size: int) -> tuple[str, ...]:
        """Add the linears of an MLP; return those that read its input."""
        hidden, bias = self.config.hidden_size, self.config.mlp_bias
        if names.fused is not None:
            linears: tuple[str, ...] = (names.fused,)
            self._linear(names.fused, (2 * size, hidden), bias)
        else:
            linears = (names.up,) if names.gate is None else (names.gate, names.up)
            for name in linears:
                self._linear(name, (size, hidden), bias)
        self._linear(names.down, (hidden, size), bias)
        return linears

    def _down_group(self, names: Mlp, size: int) -> None:
        """The gate only multiplies, so a scale commutes with it; no scale commutes with an activation."""
        if names.fused is not None:
            rows = range(size, 2 * size)
            self.groups.append(ScaleGroup(names.fused, "linear", (names.down,), outputs=rows))
        elif names.gate is not None and not self.config.swiglu_limit:
            self.groups.append(ScaleGroup(names.up, "linear", (names.down,)))

    def _norm_group(
        self, norm: str | None, layers: tuple[str, ...], floats: tuple[str, ...] = ()
    ) -> None:
        if norm is None:
            return
        kind = self.architecture.norm_kind
        whole = norm in (self.architecture.attention_norm, self.architecture.mlp_norm)
        self.groups.append(ScaleGroup(norm, kind, layers, floats, sub_block=whole))

    def _norm(self, name: str | None) -> str | None:
        if name is not None:
            self.vectors[f"{name}.weight"] = (self.config.hidden_size,)
            if self.architecture.norm_kind == "layer_norm":
                self.vectors[f"{name}.bias"] = (self.config.hidden_size,)
        return name

    def _linear(self, name: str, shape: tuple[int, int], bias: bool) -> None:
        self.linears[name] = shape
        if bias:
            self.vectors[f"{name}.bias"] = shape[:1]


def _last_of(piece: int, width: int, rows: int) -> tuple[int, ...]:
    """Return the last so many rows of every piece."""
    ends = range(piece, rows + 1, piece)
    return tuple(row for end in ends for row in range(end - width, end))
