"""What tells one decoder family from another, as data."""

from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.checkpoint import ModelConfig


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

    def has_bias(self, linear: str, config: ModelConfig) -> bool:
        """Tell whether a linear of a block has a bias."""
        if linear in (self.gate, self.up, self.down):
            return config.mlp_bias
        return config.attention_bias
