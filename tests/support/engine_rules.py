"""How engines find out from config.json what a layer is: their rules, told again, as vLLM is not run here.

Sources are in docs/engines.md. A rule takes ``quantization_config`` and a module, and returns the layer's
``(bits, group_size)``, None for float; `RefusedError` is what an engine raises.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

Found = tuple[int, int] | None
Settings = Mapping[str, Any]
QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
GATE_UP = {"gate_up_proj": ["gate_proj", "up_proj"]}
LATENT = {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}
# By the start of a name: vLLM's hf_to_vllm_mapper of Gemma 3, LLaVA and Mistral 3, and that of Qwen's.
RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
}


class RefusedError(Exception):
    """Loading stops."""


@dataclass(frozen=True)
class Module:
    """A module of an engine, and the layers of the files that it is made of."""

    name: str
    parts: tuple[str, ...]
    experts: bool = False


@dataclass(frozen=True)
class Vllm:
    """A model as vLLM builds it.

    Parameters
    ----------
    packed
        The modules that it fuses, by their last names.
    renamed
        What names in config.json begin with, and what with then; nothing for a text model.
    """

    packed: Mapping[str, Sequence[str]]
    renamed: Mapping[str, str]

    def modules(self, layers: Iterable[str], spelled: Mapping[str, str]) -> list[Module]:
        """Return its modules for layers of the files, spelled in its way."""
        parts: dict[tuple[str, bool], list[str]] = {}
        for layer in layers:
            name = spelled[layer]
            expert = re.fullmatch(r"(.*\.experts)\.\d+\.\w+", name)
            parent, last = name.rsplit(".", 1) if "." in name else ("", name)
            whole = next((w for w, shards in self.packed.items() if last in shards), None)
            if expert:
                parts.setdefault((expert[1], True), []).append(layer)
            elif whole and all(
                f"{parent}.{shard}" in spelled.values() for shard in self.packed[whole]
            ):
                parts.setdefault((f"{parent}.{whole}", False), []).append(layer)
            else:
                parts.setdefault((name, False), []).append(layer)
        return [Module(name, tuple(each), experts) for (name, experts), each in parts.items()]

    def shards(self, name: str) -> list[str]:
        """Return the names of what a module is made of; of most, their own."""
        last = name.split(".")[-1]
        return [name.replace(last, shard) for shard in self.packed.get(last, [last])]

    def mapped(self, names: Iterable[str]) -> list[str]:
        """Return names as its mapper renames them."""
        found = []
        for name in names:
            for before, after in self.renamed.items():
                if name.startswith(before):
                    name = after + name[len(before) :]
                    break
            found.append(name)
        return found

    def compressed_tensors(self, settings: Settings, module: Module) -> Found:
        """compressed_tensors.py: ignore, then targets; of experts three names that need not exist."""
        ignore = self.mapped(settings["ignore"])
        schemes: dict[str, Found] = {}
        for group in settings["config_groups"].values():
            weights = group["weights"]
            scheme = weights["num_bits"], weights["group_size"] or -1
            schemes |= dict.fromkeys(self.mapped(group["targets"]), scheme)

        def scheme_of(name: str) -> Found:
            if name in ignore:
                return None
            verdicts = {matches(shard, ignore) for shard in self.shards(name)}
            if len(verdicts) > 1:
                raise RefusedError(f"{name}: different schemes")
            if verdicts == {True}:
                return None
            for target, scheme in schemes.items():
                if matches(name, [target]):
                    return scheme
            if "Linear" in schemes:  # a part of the class's name, or what stands for the experts
                return schemes["Linear"]
            found = [next((t for t in schemes if matches(s, [t])), None) for s in self.shards(name)]
            if None in found:
                raise RefusedError(f"{name}: no target")
            return schemes[str(found[0])]

        if not module.experts:
            return scheme_of(module.name)
        found = {
            scheme_of(f"{module.name}.0.{each}") for each in ("gate_proj", "up_proj", "down_proj")
        }
        if len(found) > 1:
            raise RefusedError(f"{module.name}: different schemes")
        return found.pop()

    def gptq(self, settings: Settings, module: Module, stored: Sequence[str]) -> Found:
        """gptq_utils.py: the first rule that matches the name; without a list, what is `stored` packed."""
        lists = settings.get("modules_in_block_to_quantize")
        listed = self.mapped(chain.from_iterable(lists) if lists else stored)
        if not module.experts:
            verdicts = {any(each in shard for each in listed) for shard in self.shards(module.name)}
            if len(verdicts) > 1:
                raise RefusedError(f"{module.name}: some but not all shards")
            if verdicts == {False}:
                return None
        found = settings["bits"], settings["group_size"]
        for rule, changes in settings.get("dynamic", {}).items():
            if re.match(rule[2:], module.name):
                if rule.startswith("-:"):
                    return None
                return changes.get("bits", found[0]), changes.get("group_size", found[1])
        return found

    def awq(self, settings: Settings, module: Module) -> Found:
        """awq_marlin.py: parts of names."""
        left = self.mapped(settings["modules_to_not_convert"] or [])
        names = [module.name] if module.experts else self.shards(module.name)
        verdicts = {any(each in name for each in left) for name in names}
        if len(verdicts) > 1:
            raise RefusedError(f"{module.name}: some but not all shards")
        return None if verdicts == {True} else (settings["bits"], settings["group_size"])


def matches(name: str, targets: Iterable[str]) -> bool:
    """compressed-tensors and vLLM: the whole name, or a pattern at its start."""
    return any(
        bool(re.match(target[3:], name)) if target.startswith("re:") else target == name
        for target in targets
    )


def compressed_tensors(settings: Settings, name: str) -> Found:
    """match.py of compressed-tensors; all modules that are asked for are Linear."""
    if matches(name, settings["ignore"]):
        return None
    found = [
        (group["weights"]["num_bits"], group["weights"]["group_size"] or -1)
        for group in settings["config_groups"].values()
        if group["targets"] == ["Linear"] or matches(name, group["targets"])
    ]
    if len(found) != 1:
        raise RefusedError(f"{name}: {len(found)} groups")
    return found[0]


def gptqmodel(settings: Settings, name: str) -> Found:
    """GPTQModel's config.py: a negative rule wins wherever it stands, then the first positive one."""
    found = settings["bits"], settings["group_size"]
    rules = settings.get("dynamic", {})
    if any(re.match(rule[2:], name) for rule in rules if rule.startswith("-:")):
        return None
    for rule, changes in rules.items():
        if re.match(rule.removeprefix("+:"), name):
            return changes.get("bits", found[0]), changes.get("group_size", found[1])
    return found


def optimum(settings: Settings, name: str) -> bool:
    """quantizer.py of optimum, for transformers: the ends of the names of modules in blocks."""
    lists = settings.get("modules_in_block_to_quantize")
    return lists is None or any(name.endswith(each) for each in chain.from_iterable(lists))


def transformers_awq(settings: Settings, name: str) -> Found:
    """quantizers_utils.py of transformers: a pattern up to a dot or the end, or the end of a name."""
    for each in settings["modules_to_not_convert"] or []:
        if re.match(rf"(?:{each})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(each):
            return None
    return settings["bits"], settings["group_size"]
