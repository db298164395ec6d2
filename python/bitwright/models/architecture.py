"""What tells one decoder family from another, as data."""

from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.checkpoint import ModelConfig
from bitwright.models.fold import FoldKind


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that share an input and what computes it, between which AWQ can move a scale.

    Parameters
    ----------
    previous
        The norm or linear that the scale is folded into.
    kind
        What it is.
    layers
        The linears that are scaled.
    sub_block
        Whether the block objective judges what the layers' sub-block (attention, MLP) adds to the hidden
        states, instead of the layers' own outputs.
    """

    previous: str
    kind: FoldKind
    layers: tuple[str, ...]
    sub_block: bool = False


@dataclass(frozen=True)
class Architecture:
    """Names of a family's tensors.

    Names of a block are relative to ``block`` with its index; linears and norms are named without
    ``.weight``.
    """

    model_type: str
    embedding: str
    block: str
    attention_norm: str
    query: str
    key: str
    value: str
    attention_output: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    final_norm: str
    head: str
    norm_kind: FoldKind = "rms_norm"

    def linear_shapes(self, config: ModelConfig) -> Mapping[str, tuple[int, int]]:
        """Return ``(out, in)`` of every linear of a block, in the order of the computation."""
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        return {
            self.query: (queries, hidden),
            self.key: (keys, hidden),
            self.value: (keys, hidden),
            self.attention_output: (hidden, queries),
            self.gate: (inner, hidden),
            self.up: (inner, hidden),
            self.down: (hidden, inner),
        }

    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """Return the scale groups of a block, one for each of its inputs.

        Attention mixes tokens but not channels, and the gate only multiplies: a scale passes through
        both. Where several query heads share a value head they share its scales.
        """
        queries = (self.query, self.key, self.value)
        return (
            ScaleGroup(self.attention_norm, self.norm_kind, queries, sub_block=True),
            ScaleGroup(self.value, "linear", (self.attention_output,)),
            ScaleGroup(self.mlp_norm, self.norm_kind, (self.gate, self.up), sub_block=True),
            ScaleGroup(self.up, "linear", (self.down,)),
        )

    def never_clipped(self) -> tuple[str, ...]:
        """Return the linears that AWQ does not clip: the scores are a product of two of them, whose
        errors the clipping search of one does not see."""
        return (self.query, self.key)

    def has_bias(self, linear: str, config: ModelConfig) -> bool:
        """Tell whether a linear of a block has a bias."""
        if linear in (self.gate, self.up, self.down):
            return config.mlp_bias
        return config.attention_bias
