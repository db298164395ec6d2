"""A decoder family as data. The defaults are Llama's pattern, which most families follow, so each states
only where it differs."""

from dataclasses import dataclass, field

from bitwright.models.fold import FoldKind
from bitwright.models.keys import ConfigRules


@dataclass(frozen=True)
class Names:
    """Names of the tensors around the blocks, without ``.weight``; ``block`` takes the index."""

    embedding: str = "model.embed_tokens"
    block: str = "model.layers.{}"
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class Attention:
    """Linears of attention with a query, key and value per head; names within the block.

    Where ``fused`` is set, it holds the rows of all three, queries first, and stands for them.
    ``query_norm`` and ``key_norm`` are norms before the rotation, over each head or over ``whole`` rows.
    """

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    fused: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    whole: bool = False


@dataclass(frozen=True)
class LatentAttention:
    """Linears of latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1); names within the block.

    Queries come from ``query`` or, where there is a query rank, from ``query_down``, its norm and
    ``query_up``. MLX stores ``key_value_up`` in two stacks with a matrix per head: ``absorbed_key``,
    transposed, and ``absorbed_value``.
    """

    query: str = "self_attn.q_proj"
    query_down: str = "self_attn.q_a_proj"
    query_norm: str = "self_attn.q_a_layernorm"
    query_up: str = "self_attn.q_b_proj"
    key_value_down: str = "self_attn.kv_a_proj_with_mqa"
    key_value_norm: str = "self_attn.kv_a_layernorm"
    key_value_up: str = "self_attn.kv_b_proj"
    absorbed_key: str = "self_attn.embed_q"
    absorbed_value: str = "self_attn.unembed_out"
    output: str = "self_attn.o_proj"


@dataclass(frozen=True)
class Mlp:
    """Linears of an MLP. Without a ``gate`` it is activation(up), otherwise activation(gate) · up. Where
    ``fused`` is set, it holds the rows of both, the gate's first, and stands for them."""

    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    fused: str | None = None


@dataclass(frozen=True)
class Experts:
    """Tensors of a mixture of experts; names within the block.

    Parameters
    ----------
    router
        The linear whose outputs rank the experts.
    correction
        Bias added to the scores for choosing experts, not for weighing them, if any.
    prefix
        Prefix of an expert's names, up to its index.
    mlp
        Linears of one expert, named within it.
    shared, shared_gate
        The shared expert, which every token passes, and the linear of its gate, if there are any.
    stacked
        Prefix of gate_proj, up_proj and down_proj where MLX stores all experts in one tensor.
    """

    router: str = "mlp.gate"
    correction: str | None = None
    prefix: str = "mlp.experts"
    mlp: Mlp = field(default_factory=lambda: Mlp("gate_proj", "up_proj", "down_proj"))
    shared: Mlp | None = None
    shared_gate: str | None = None
    stacked: str = "mlp.switch_mlp"


@dataclass(frozen=True)
class Architecture:
    """One decoder family.

    Parameters
    ----------
    model_types
        Its values of ``model_type`` in config.json.
    rules
        How to read its config.json.
    names
        Of its tensors; the first are those that engines expect and that are written. They are found under
        other prefixes, too.
    attention, mlp, experts
        The parts of its blocks; ``rules`` says which layers have experts.
    attention_norm, mlp_norm
        Norms before attention and MLP, None where they read the hidden states as they are.
    attention_post_norm, mlp_post_norm
        Norms of the outputs of attention and MLP, before they are added to the hidden states, if any.
    norm_kind
        Of all norms.
    """

    model_types: tuple[str, ...]
    rules: ConfigRules = field(default_factory=ConfigRules)
    names: tuple[Names, ...] = (Names(),)
    attention: Attention | LatentAttention = field(default_factory=Attention)
    mlp: Mlp = field(default_factory=Mlp)
    experts: Experts | None = None
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    norm_kind: FoldKind = "rms_norm"
