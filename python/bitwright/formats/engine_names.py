"""Engines' names for the layers of a model, and the layers that they fuse into one module.

A checkpoint names a layer ``model.layers.0.self_attn.q_proj``. transformers calls it the same, vLLM
computes it in ``model.layers.0.self_attn.qkv_proj``, and where the language model is a part of a multimodal
one, there are three names: ``language_model.model.layers…`` in older files, in vLLM and in mlx-lm,
``model.language_model.layers…`` in transformers since 4.52 and in what it saves, ``model.layers…`` in files
of Qwen's. See docs/engines.md.
"""

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping

from bitwright.formats.format import Format, Precision

# The layers that vLLM fuses, by its name for the fused module.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
EXPERTS = "experts"  # and all experts of a layer, w1, w2 and w3 included
_WHOLE = {part: whole for whole, parts in FUSED.items() for part in parts}
_EXPERT = re.compile(rf"(.+\.{EXPERTS})\.\d+\.")
_NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.+)")
_HOPS = re.compile(r"(?:(?:language_)?model\.)+")
_ANY_HOPS = r"((language_)?model\.)*"
_LANGUAGE = ("layers.", "embed_tokens", "norm.", "lm_head")
# Parts beside the language model whose presence means that it is nested.
TOWERS = ("vision_tower", "vision_model", "visual", "audio_tower", "multi_modal_projector")


def fused_groups(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return layers in groups that an engine fuses, by the name of the fused module.

    Most are alone, under their own name; so is a part whose fellows the model does not have, such as a
    query projection beside latent keys and values.

    Examples
    --------
    >>> fused_groups(["0.attn.q_proj", "0.attn.k_proj", "0.attn.o_proj", "1.experts.0.w1"])
    {'0.attn.qkv_proj': ('0.attn.q_proj', '0.attn.k_proj'), '0.attn.o_proj': ('0.attn.o_proj',), \
'1.experts': ('1.experts.0.w1',)}
    """
    groups: dict[str, list[str]] = {}
    for name in layers:
        parent, dot, last = name.rpartition(".")
        whole = f"{parent}{dot}{_WHOLE.get(last, last)}"
        expert = _EXPERT.match(name)
        groups.setdefault(expert[1] if expert else whole, []).append(name)
    return {
        whole if len(parts) > 1 or _is_experts(whole) else parts[0]: tuple(parts)
        for whole, parts in groups.items()
    }


def unfused(
    format: type[Format], layers: Mapping[str, Hashable | None]
) -> dict[str, tuple[str, ...]]:
    """Return the modules of vLLM whose parts differ in what they are stored as, None for float, with these
    parts; nothing for a format that vLLM does not load."""
    if not format.fuses_shared_inputs:
        return {}
    # With one precision for all layers, another is refused elsewhere.
    kinds = {name: kind and (format.one_precision or kind) for name, kind in layers.items()}
    return {
        whole: parts
        for whole, parts in fused_groups(layers).items()
        if any(kinds[part] != kinds[parts[0]] for part in parts)
    }


def check_fused(
    format: type[Format],
    layers: Mapping[str, Precision | None],
    advice: str = "Treat them alike",
) -> None:
    """Raise ValueError if layers that the engines of a format fuse differ in precision.

    Parameters
    ----------
    format
        What is written.
    layers
        The precision of every layer, None in float.
    advice
        What leads to the patterns that would do.
    """
    broken = unfused(format, layers)
    if not broken:
        return
    whole, parts = next(iter(broken.items()))
    alike: dict[Precision | None, list[str]] = {}
    for part in parts:
        alike.setdefault(layers[part], []).append(part)
    said = [_said(names, kind, whole) for kind, names in alike.items()]
    others = len(broken) - 1
    more = f" (and {others} more modules like it)" if others else ""
    raise ValueError(
        f"{whole}: vLLM computes {_listed(_short(whole, parts))} as one module, and refuses it where its "
        f"parts differ, but {'; '.join(said)}{more}. {advice}: {' '.join(_patterns(broken, layers))}, or "
        f"allow it for engines that fuse nothing: allow_unfused (--allow-unfused)"
    )


def _short(whole: str, parts: Iterable[str]) -> list[str]:
    parent = whole.rpartition(".")[0]
    return [part.removeprefix(f"{parent}.") for part in parts]


def _listed(names: list[str]) -> str:
    if len(names) > 4:
        return f"{names[0]} … {names[-1]} ({len(names)} layers)"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _said(names: list[str], kind: Precision | None, whole: str) -> str:
    listed, verb = _listed(_short(whole, names)), "is" if len(names) == 1 else "are"
    return f"{listed} {verb} in {'float' if kind is None else kind.words()}"


def _patterns(
    broken: Mapping[str, tuple[str, ...]], layers: Mapping[str, Precision | None]
) -> list[str]:
    """Return the options that give all parts of these modules the finest of their precisions."""
    alike: dict[tuple[str, str], list[str]] = {}
    for whole in broken:
        parent, _, last = whole.rpartition(".")
        alike.setdefault((parent.rpartition(".")[2], last), []).append(whole)
    options: list[str] = []
    for (holder, last), wholes in alike.items():
        parent = wholes[0].rpartition(".")[0] if len(wholes) == 1 else f"*.{holder}"
        parts = dict.fromkeys(p.rpartition(".")[2] for whole in wholes for p in broken[whole])
        kinds = {layers[part] for whole in wholes for part in broken[whole]}
        planned = [kind for kind in kinds if kind is not None]
        finest = max(planned, key=lambda kind: (kind.bits, 1 / (kind.group_size or 1e9)))
        for end in (f"{last}.*",) if last == EXPERTS else parts:
            if None in kinds:
                options.append(f"--exclude '{parent}.{end}'")
            else:
                size = finest.group_size or -1
                options.append(f"--override '{parent}.{end}=bits:{finest.bits},group_size:{size}'")
    return options


def mlx_name(name: str) -> str:
    """Return mlx-lm's name for a layer or tensor of a multimodal model that transformers has saved.

    Examples
    --------
    >>> mlx_name("model.language_model.layers.0.mlp.up_proj"), mlx_name("model.layers.0.mlp.up_proj")
    ('language_model.model.layers.0.mlp.up_proj', 'model.layers.0.mlp.up_proj')
    """
    inner = name.removeprefix("model.language_model.")
    if inner != name:
        return f"language_model.model.{inner}"
    if name.partition(".")[0] == "lm_head":
        return f"language_model.{name}"
    if name.startswith("model.visual."):  # as mlx-vlm names it; mlx-lm knows both
        return f"vision_tower.{name.removeprefix('model.visual.')}"
    tower = name.removeprefix("model.")
    return tower if tower.startswith(tuple(f"{each}." for each in TOWERS)) else name


def transformers_name(name: str) -> str:
    """Return the name in transformers 4.52 or later of a layer of a multimodal model, as GPTQModel wants
    it in files, too.

    Examples
    --------
    >>> transformers_name("language_model.model.layers.0.mlp.up_proj")
    'model.language_model.layers.0.mlp.up_proj'
    >>> transformers_name("vision_tower.encoder.layers.0.mlp.fc1"), transformers_name("lm_head")
    ('model.vision_tower.encoder.layers.0.mlp.fc1', 'lm_head')
    """
    if name.startswith("language_model."):
        inner = name.removeprefix("language_model.")
        return (
            f"model.language_model.{inner.removeprefix('model.')}"
            if inner.startswith("model.")
            else inner
        )
    return f"model.{name}" if _root(name) in TOWERS else name


class EngineNames:
    """The names that engines have for the layers of one model.

    Parameters
    ----------
    layers
        All layers of the model, as its files name them, those included that are never quantized.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        names = list(layers)
        self.groups = fused_groups(names)
        self.nested = any(
            name.startswith(("language_model.", "model.language_model."))
            or _root(_inner(name)) in TOWERS
            for name in names
        )

    def patterns(self, chosen: Iterable[str]) -> list[str]:
        """Return regular expressions that match, as a whole, what engines call some of the layers.

        Where all parts of a fused module are chosen, they match its name, too; of a vision tower and the
        like, which is chosen as a whole, all that is in it. Layers that differ in a number share one.

        Examples
        --------
        >>> layers = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up")]
        >>> print(*EngineNames(layers).patterns(layers))
        model\\.layers\\.(0|1)\\.mlp\\.(gate_proj|up_proj|gate_up_proj)
        """
        numbers: dict[tuple[str, str], list[str]] = {}
        patterns: dict[str, None] = {}
        for module, _ in self._modules(chosen):
            place, end = module, ""
            if _is_experts(module):
                end = r"(\..+)?"
            elif shards := _fused_shards(module):
                place = module.rpartition(".")[0]
                names = [each.rpartition(".")[2] for each in (*shards, module)]
                end = rf"\.({'|'.join(map(re.escape, names))})"
            lead = ""
            if self.nested:
                lead, place = _ANY_HOPS, _inner(place)
                if not _is_language(place):
                    patterns[rf"{lead}{re.escape(_root(place))}(\..+)?"] = None
                    continue
            numbered = _NUMBERED.fullmatch(place)
            if numbered is None:
                patterns[lead + re.escape(place) + end] = None
                continue
            before, number, after = numbered.groups()
            key = (lead + re.escape(before), re.escape(after) + end)
            numbers.setdefault(key, []).append(number)
        for (before, after), found in numbers.items():
            number = found[0] if len(found) == 1 else f"({'|'.join(found)})"
            patterns[rf"{before}\.{number}\.{after}"] = None
        return list(patterns)

    def targets(self, chosen: Iterable[str]) -> list[str]:
        """Return compressed-tensors' targets for some layers: names, and patterns where engines differ."""
        if self.nested:
            return [f"re:^{pattern}$" for pattern in self.patterns(chosen)]
        found: list[str] = []
        for module, parts in self._modules(chosen):
            # vLLM looks for the first expert's gate_proj, up_proj and down_proj, by these names.
            found += [rf"re:^{re.escape(module)}(\..+)?$"] if _is_experts(module) else parts
        return found

    def beginnings(self, chosen: Iterable[str]) -> list[str]:
        """Return names that the engines' names of some layers are or begin with, one for each spelling:
        transformers takes them for patterns, but vLLM for parts of names."""
        found: dict[str, None] = {}
        for module, parts in self._modules(chosen):
            for name in (module,) if _is_experts(module) else parts:
                if self.nested and not _is_language(_inner(name)):
                    root = _root(_inner(name))
                    found |= {f"model.{root}": None, root: None}
                    continue
                for each in (name, *_fused_shards(name)):
                    found[self.in_transformers(each)] = None
                    if self.nested:
                        found[f"language_model.model.{_inner(each)}"] = None
        return list(found)

    @property
    def has_fused_layers(self) -> bool:
        """Whether the files hold a layer that vLLM treats as several, such as GLM 4's gate_up_proj."""
        return any(_fused_shards(parts[0]) for parts in self.groups.values())

    def listed(self, chosen: Iterable[str]) -> list[str]:
        """Return what transformers calls some layers and, after one that vLLM takes for several, what these
        would be called."""
        names = (each for name in chosen for each in (name, *_fused_shards(name)))
        return list(map(self.in_transformers, names))

    def in_transformers(self, layer: str) -> str:
        """Return the name of a layer in transformers since 4.52."""
        inner = _inner(layer)
        if not self.nested:
            return layer
        if inner == "lm_head":
            return inner
        return f"model.language_model.{inner}" if _is_language(inner) else f"model.{inner}"

    def _modules(self, chosen: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield fused modules with their parts where all parts are chosen, and otherwise single parts."""
        picked = set(chosen)
        for module, parts in self.groups.items():
            if picked.issuperset(parts):
                yield module, parts
            else:
                yield from ((part, (part,)) for part in parts if part in picked)


def _fused_shards(module: str) -> tuple[str, ...]:
    """Return the layers that vLLM sees in a module, by its name; for most, none."""
    parent, _, last = module.rpartition(".")
    return tuple(f"{parent}.{part}" for part in FUSED.get(last, ()))


def _is_experts(module: str) -> bool:
    return module.endswith(f".{EXPERTS}")


def _inner(name: str) -> str:
    """Return a name without the modules that hold the language model."""
    hops = _HOPS.match(name)
    return name[hops.end() :] if hops else name


def _is_language(inner: str) -> bool:
    return inner.startswith(_LANGUAGE)


def _root(inner: str) -> str:
    return inner.partition(".")[0]
