"""The quantization that config.json declares, in any of its spellings, and the keys that it may have."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitwright.checkpoint import Checkpoint
from bitwright.errors import CheckpointError, UnsupportedModelError, shown
from bitwright.warned import warn

# The layout: the method and, for GPTQ, whether zeros are stored less one (v1) or as they are (v2).
_PACKINGS = {
    "auto_round:auto_gptq": ("gptq", "gptq"),
    "auto_round:gptq": ("gptq", "gptq"),
    "auto_gptq": ("gptq", "gptq"),
    "auto_round:gptqmodel": ("gptq", "gptq_v2"),
    "auto_round": ("gptq", "gptq_v2"),
    "auto_round:auto_awq": ("awq", None),
    "auto_round:awq": ("awq", None),
    "auto_awq": ("awq", None),
}
# Tools that name no method are recognized by keys of their own.
_SIGNS = {
    "config_groups": "compressed-tensors",
    "zero_point": "awq",
    "w_bit": "awq",
    "is_marlin_format": "gptq",
    "checkpoint_format": "gptq",
    "desc_act": "gptq",
    "damp_percent": "gptq",
}


@dataclass(frozen=True)
class Declared:
    """A quantization as config.json declares it: the method in plain words, and its settings.

    ``where`` begins messages about a key.
    """

    method: str | None
    settings: Mapping[str, Any]
    where: str

    def named(self, key: str) -> str:
        """Return a key with its place and value, for messages."""
        return f'{self.where}.{key}" is {shown(self.settings.get(key))}'

    def layout(self, *keys: str) -> tuple[str, str | None]:
        """Return the key that distinguishes layouts, and its value in lower case."""
        key = next((each for each in keys if self.settings.get(each) is not None), keys[0])
        said = self.settings.get(key)
        return key, said.lower() if isinstance(said, str) else said


@dataclass(frozen=True)
class Settings:
    """Which keys a quantization config may have: those that are read, those that change nothing about
    how weights are read, and those that pass with values that change nothing."""

    read: str
    harmless: str = ""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def keys(self) -> set[str]:
        """Return all of them."""
        return {*self.read.split(), *self.harmless.split(), *self.neutral}

    def check(
        self, said: Mapping[str, Any], where: str, overlooked: Collection[str] | None = None
    ) -> None:
        """Raise UnsupportedModelError if a key asks for something that is not computed.

        Keys that are not known, beside those in `overlooked`, are named in a warning.
        """
        for key, value in said.items():
            if key in self.neutral and value is not None and value not in self.neutral[key]:
                raise UnsupportedModelError(
                    f'{where}.{key}" is {shown(value)}, which is not computed. Start from the original '
                    f"model"
                )
        unknown = sorted({*said} - self.keys() - {*(overlooked or ())})
        if unknown:
            warn(f'{where}" has keys of which it is not known what they change: {shown(unknown)}')


def declaration(checkpoint: Checkpoint) -> Declared | None:
    """Return the quantization that config.json declares, None if there is none.

    Looked for are ``quantization_config``, as well as ``compression_config``, which compressed-tensors
    wrote once, at the top and in the text part of multimodal models.
    """
    config = checkpoint.config
    text = config.get("text_config")
    for part, name in ((config, ""), (text if isinstance(text, dict) else {}, "text_config.")):
        for key in ("quantization_config", "compression_config"):
            settings = part.get(key)
            if not settings or not isinstance(settings, dict):
                continue
            where = f'{checkpoint.folder / "config.json"}: "{name}{key}'
            said = settings.get("quant_method") or settings.get("method")
            if said is None:
                signs = [method for sign, method in _SIGNS.items() if sign in settings]
                method = signs[0] if signs else None
            elif isinstance(said, str):
                method = said.lower().replace("_", "-").removeprefix("intel/")
            else:
                raise CheckpointError(
                    f'{where}.quant_method" is {shown(said)}, but must be a string'
                )
            found = Declared(method, settings, where)
            return _of_auto_round(found) if method in ("auto-round", "inc") else found
    return None


AUTO_ROUND = Settings(
    read="quant_method packing_format bits group_size sym extra_config block_name_to_quantize",
    harmless="backend",
    neutral={
        "data_type": ("int", "int_sym", "int_asym"),
        "act_bits": (16, 32),
        "super_bits": (0,),
        "rotation_config": ({},),
        "hadamard_config": ({},),
    },
)


def _of_auto_round(found: Declared) -> Declared:
    """auto-round packs as other tools do, and lists what it was trained with."""
    AUTO_ROUND.check(found.settings, found.where, found.settings)
    packing = str(found.settings.get("packing_format") or "auto_round:gptq").lower()
    if packing not in _PACKINGS:
        raise UnsupportedModelError(
            f"{found.named('packing_format')}; supported are: {', '.join(_PACKINGS)}"
        )
    method, version = _PACKINGS[packing]
    keys = ("bits", "group_size", "sym", "zero_point")
    settings = {key: found.settings[key] for key in keys if key in found.settings}
    settings |= {"quant_method": method, "checkpoint_format": version}
    return Declared(method, {k: v for k, v in settings.items() if v is not None}, found.where)
