"""llama.cpp's named mixtures of tensor types: which type each tensor of a model gets by a name like Q4_K_M.

The rules are llama-quantize's (llama.cpp of llama-cpp-python 0.3.36): by the role of a tensor, the place of
its layer, and the model's heads and experts. tests/data/llama_quantize_types.json has what it really does.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bitwright.checkpoint.gguf_file import (
    BLOCKS,
    FILE_TYPE_ALIASES,
    FILE_TYPES,
    weights_per_block,
)
from bitwright.errors import shown

FLOATS = ("F32", "F16", "BF16")
_BASES = {  # the type of most tensors, where that is not the name itself
    **{"Q2_K_S": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K"},
    **{"Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S"},
    **{"IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S", "MXFP4_MOE": "MXFP4"},
}
# What a tensor gets whose rows are no whole blocks.
_FALLBACKS = {
    **dict.fromkeys(
        "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS".split(),  # noqa: SIM905
        "IQ4_NL",
    ),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}
_OF_ONE_BIT, _OF_TWO_BITS = ("IQ1_S", "IQ1_M"), ("IQ2_XXS", "IQ2_XS")
_WITH_THREES = ("IQ2_S", "IQ2_M")  # and IQ3_S where more is needed
_FEW_BITS = (*_OF_ONE_BIT, *_OF_TWO_BITS, *_WITH_THREES)
_ROLES = (  # the first that is in a tensor's name
    *(("attn_qkv.weight", "value"), ("attn_kv_b.weight", "value"), ("attn_v.weight", "value")),
    *(("attn_k.weight", "key"), ("attn_q.weight", "query"), ("attn_output.weight", "attention")),
    *(("ffn_up", "up"), ("ffn_gate", "gate"), ("ffn_down", "down")),
)
_EIGHT_EXPERTS_Q5 = (  # mixtures whose attention output has 5 bits where there are 8 experts
    *("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S"),
    *("IQ3_M", "IQ4_XS"),
)


@dataclass(frozen=True)
class MixModel:
    """What a mixture looks at in a model: llama.cpp's name of its family, its numbers of blocks, heads,
    heads of keys, and experts."""

    architecture: str
    blocks: int
    heads: int
    key_heads: int
    experts: int = 0

    @property
    def grouped(self) -> bool:
        """Whether at least four heads share one key."""
        return self.heads // self.key_heads >= 4

    @property
    def is_large(self) -> bool:
        """Whether llama.cpp takes it for one of 70 billion parameters."""
        apart = self.heads != self.key_heads or self.architecture == "qwen2"
        return self.architecture in ("llama", "qwen2") and self.blocks == 80 and apart


@dataclass(frozen=True)
class Mix:
    """A mixture that is asked for.

    Parameters
    ----------
    name
        Such as ``"Q4_K_M"``, in any case, see `FILE_TYPES`.
    pure
        Whether all tensors get the type of most.
    tensor_types
        Types of the tensors in whose names a regular expression is found; the first that is counts.
    embedding, output
        Types of embedding and head.
    has_imatrix
        Whether there is an importance matrix, which changes some choices.

    Raises
    ------
    ValueError
        If there is no such mixture or type, with the near ones.
    """

    name: str
    pure: bool = False
    tensor_types: Sequence[tuple[str, str]] = ()
    embedding: str | None = None
    output: str | None = None
    has_imatrix: bool = False

    def __post_init__(self) -> None:
        name = self.name.upper()
        known = (*FILE_TYPES, *FILE_TYPE_ALIASES)
        object.__setattr__(self, "name", FILE_TYPE_ALIASES.get(name, _one_of("type", name, known)))
        pairs = [
            (_pattern(pattern), _one_of(f"tensor type of {pattern!r}", kind.upper(), BLOCKS))
            for pattern, kind in self.tensor_types
        ]
        object.__setattr__(self, "tensor_types", tuple(pairs))
        for part in ("embedding", "output"):
            if (kind := getattr(self, part)) is not None:
                object.__setattr__(self, part, _one_of(f"{part} type", kind.upper(), BLOCKS))

    @property
    def base(self) -> str:
        """The type of most tensors."""
        return _BASES.get(self.name, self.name)


@dataclass(frozen=True)
class Chosen:
    """The type of a tensor, and the one that it would have if its rows were whole blocks."""

    type: str
    wanted: str


def types_of(mix: Mix, shapes: Mapping[str, tuple[int, ...]], model: MixModel) -> dict[str, Chosen]:
    """Return the types of a model's tensors.

    Parameters
    ----------
    mix
        What is asked for.
    shapes
        Of all matrices, and stacks of them, by their names in GGUF files; the last axis is that of inputs.
        Those that are never quantized, such as routers, are left out of the result.
    model
        What the mixture looks at.

    Raises
    ------
    ValueError
        If a pattern of `mix` matches no tensor.
    """
    for pattern, _ in mix.tensor_types:
        if not any(re.search(pattern, name) for name in shapes):
            raise ValueError(
                f"tensor type: {pattern!r} is in no tensor's name; names are like {next(iter(shapes))}"
            )
    values = sum(_role(name) == "value" for name in shapes)
    choices = _Choices(mix, model, "output.weight" not in shapes, values)
    return {name: choices.of(name, shapes[name]) for name in _in_order(shapes) if _is_mixed(name)}


def whole_blocks(wanted: str, columns: int) -> str:
    """Return a type, or what takes its place where rows are no whole blocks of it."""
    found = wanted if columns % _block(wanted) == 0 else _FALLBACKS.get(wanted, wanted)
    return found if columns % _block(found) == 0 else "F16"


def _in_order(names: Iterable[str]) -> list[str]:
    def place(name: str) -> tuple[int, str]:
        match = re.match(r"blk\.(\d+)\.", name)
        return int(match[1]) if match else -1, name

    return sorted(names, key=place)


def _is_mixed(name: str) -> bool:
    return name.endswith("weight") and "_norm.weight" not in name and "ffn_gate_inp" not in name


@dataclass(eq=False)
class _Choices:
    """Chooses tensor by tensor, in llama.cpp's order: some choices count the tensors before."""

    mix: Mix
    model: MixModel
    tied: bool
    values: int  # how many tensors have that role
    seen: Counter[str] = field(default_factory=Counter)

    def of(self, name: str, shape: tuple[int, ...]) -> Chosen:
        mix, columns = self.mix, shape[-1]
        if name == "token_embd.weight" and mix.embedding is not None:
            return Chosen(mix.embedding, mix.embedding)
        if name == "output.weight" and mix.output is not None:
            return Chosen(mix.output, mix.output)
        base = mix.base
        if base in FLOATS:
            return Chosen(base, base)
        named = [kind for pattern, kind in mix.tensor_types if re.search(pattern, name)]
        wanted = named[0] if named else base if mix.pure else self._by_role(name, shape) or base
        return Chosen(whole_blocks(wanted, columns), wanted)

    def _by_role(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Return what a mixture has for a tensor, None for the type of most."""
        mix = self.mix.name
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return self._output(shape[-1])
        if mix == "MXFP4_MOE":
            return "MXFP4" if len(shape) == 3 and shape[0] > 1 else "Q8_0"
        if name == "token_embd.weight":
            return self._embedding()
        role = _role(name)
        layer = self._layer(name, role)
        if mix in _FEW_BITS:
            found = self._of_few_bits(role, layer)
        elif role == "value":
            found = self._value(layer)
        elif role == "down":
            found = self._down(layer)
        elif role == "attention":
            found = self._attention()
        else:
            found = self._others(role, layer)
        self.seen[role] += 1
        return found

    def _layer(self, name: str, role: str) -> int:
        """Return the place of a tensor among those of its role: with experts its block's, but that values,
        and in mixtures of few bits all, are counted."""
        counted = role == "value" or self.mix.name in _FEW_BITS
        if self.model.experts > 1 and not counted and role:
            return int(name.split(".")[1])
        return self.seen[role]

    def _first(self, layer: int, part: int = 8) -> bool:
        """Whether a block is in the first eighth, or another part, of the model."""
        return layer < self.model.blocks // part

    def _gets_more(self, layer: int, count: int) -> bool:
        """Whether a block gets more bits: the first and last eighth, and every third between them."""
        first = count // 8
        return layer < first or layer >= 7 * count // 8 or (layer - first) % 3 == 2

    def _output(self, columns: int) -> str | None:
        if self.mix.output is not None:  # of a head that is the embedding
            return self.mix.output
        if self.mix.name == "MXFP4_MOE" or columns % _block(self.mix.base):
            return "Q8_0"
        if self.mix.name in (*_FEW_BITS, "IQ3_XXS"):
            return "Q5_K"
        return None if self.mix.base == "Q8_0" else "Q6_K"

    def _embedding(self) -> str | None:
        return {
            **dict.fromkeys((*_OF_ONE_BIT, *_OF_TWO_BITS), "Q2_K"),
            **dict.fromkeys((*_WITH_THREES, "IQ3_XXS"), "IQ3_S"),
            **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
        }.get(self.mix.name)

    def _of_few_bits(self, role: str, layer: int) -> str | None:
        experts, with_threes = self.model.experts, self.mix.name in _WITH_THREES
        more = "IQ3_S" if with_threes else "Q2_K"
        if role == "value":
            return "Q4_K" if self.model.grouped or experts >= 4 else more
        if role == "key" and experts == 8:
            return "Q4_K"
        if role == "down":
            return more if self._first(layer) else None
        if role == "attention":
            if experts == 8:
                return "Q5_K"
            return "IQ2_XXS" if self.mix.name in _OF_ONE_BIT else "IQ3_S" if with_threes else None
        return None

    def _value(self, layer: int) -> str | None:
        mix, grouped = self.mix.name, self.model.grouped
        found: str | None = None
        if mix == "Q2_K":
            found = "Q4_K" if grouped else "Q3_K"
        elif mix in ("Q2_K_S", "IQ3_XS", "IQ3_S") and grouped:
            found = "Q4_K"
        elif mix == "IQ3_XXS":
            found = "Q4_K" if grouped else "IQ3_XXS" if self.mix.has_imatrix else "IQ3_S"
        elif mix == "IQ3_M":
            found = "Q4_K"
        elif mix == "Q3_K_M":
            found = "Q5_K" if layer < 2 else "Q4_K"
        elif mix == "Q3_K_L" or (mix in ("IQ4_NL", "IQ4_XS") and grouped):
            found = "Q5_K"
        elif mix in ("Q4_K_M", "Q5_K_M") and self._gets_more(layer, self.values):
            found = "Q6_K"
        elif mix == "Q4_K_S" and layer < 4:
            found = "Q5_K"
        if self.model.is_large and (found or self.mix.base) in ("Q3_K", "Q4_K"):
            found = "Q5_K"
        return "Q8_0" if self.model.experts == 8 else found

    def _down(self, layer: int) -> str | None:
        mix, first = self.mix.name, self._first(layer)
        more = self._gets_more(layer, self.model.blocks)
        known: dict[str, str | None] = {
            "Q2_K": "Q3_K",
            "Q2_K_S": "Q4_K" if first else None,
            "Q3_K_M": "Q5_K" if self._first(layer, 16) else "Q4_K",
            "IQ3_M": "Q4_K" if first or (self.model.experts == 8 and more) else None,
            "Q3_K_L": "Q5_K",
            "Q4_K_M": "Q6_K" if more else None,
            "Q5_K_M": "Q6_K" if more else None,
            "Q4_K_S": "Q5_K" if first else None,
        }
        if self.mix.has_imatrix:
            known |= {"Q4_0": "Q4_1", "Q5_0": "Q5_1"} if first else {}
        else:
            known["IQ3_XXS"] = "Q4_K" if first else "Q3_K"
            known |= {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"} if first else {}
        return known.get(mix)

    def _attention(self) -> str | None:
        mix = self.mix.name
        if self.model.experts == 8:
            return "Q5_K" if mix in _EIGHT_EXPERTS_Q5 else None
        return {
            **{"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K"},
            **{"Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"},
        }.get(mix)

    def _others(self, role: str, layer: int) -> str | None:
        mix, count = self.mix.name, self.model.blocks
        if role == "key" and self.model.experts == 8:
            return "Q8_0"
        if role in ("key", "query"):
            return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix)
        if role in ("gate", "up") and mix == "IQ3_XS":
            return "IQ3_XXS" if count // 8 <= layer < 7 * count // 8 else None
        return None


def _role(name: str) -> str:
    return next((role for part, role in _ROLES if part in name), "")


def _block(kind: str) -> int:
    return weights_per_block(BLOCKS[kind])


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"tensor type: {text!r} is no regular expression: {error}") from error
    return text


def _one_of(what: str, name: str, known: Iterable[str]) -> str:
    names = list(known)
    if name in names:
        return name
    near = difflib.get_close_matches(name[:20], names, n=4, cutoff=0.5)
    hint = f"; near are {', '.join(near)}" if near else f"; there are {', '.join(names)}"
    raise ValueError(f"{what}: there is no {shown(name)}{hint}")
