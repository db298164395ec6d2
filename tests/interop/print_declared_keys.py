"""Print, as JSON, the keys that configuration classes declare. Usage: MODEL_TYPE ..."""

import dataclasses
import inspect
import json
import sys
from importlib.metadata import version
from typing import Any

import gguf
import gptqmodel.quantization.config as gptqmodel
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils.quantization_config import (
    AutoRoundConfig,
    AwqConfig,
    CompressedTensorsConfig,
    GPTQConfig,
)


def of_model(kind: str) -> list[str]:
    """The fields of a model's configuration class, other names of them, and what it sets itself."""
    cls = CONFIG_MAPPING[kind]
    config = cls()
    fields = {each.name for each in dataclasses.fields(cls)} | {*vars(config), *cls.attribute_map}
    if "text_config" in fields:
        fields |= {*of_model(config.text_config.model_type)}
    return sorted(key for key in fields if not key.startswith("_"))


def of_function(cls: type, made: Any) -> list[str]:
    """The parameters of a class, and what it saves."""
    named = {each for each in inspect.signature(cls.__init__).parameters}
    saved = made.to_dict() if hasattr(made, "to_dict") else {}
    return sorted(named - {"self", "kwargs"} | {*saved})


def of_gguf() -> list[str]:
    """What GGUF says of an architecture."""
    found = []
    kinds = [gguf.constants.Keys]
    while kinds:
        for value in vars(kinds.pop()).values():
            if isinstance(value, type):
                kinds.append(value)
            elif isinstance(value, str) and value.startswith("{arch}."):
                found.append(value.removeprefix("{arch}."))
    return sorted(found)


declared = {
    "versions": {"transformers": version("transformers")},
    "models": {kind: of_model(kind) for kind in sys.argv[1:] if kind in CONFIG_MAPPING},
    "rope": sorted(RopeParameters.__annotations__),
    "gptq": of_function(GPTQConfig, GPTQConfig(4)),
    "gptqmodel": sorted(gptqmodel.QuantizeConfig().to_dict()),
    "awq": of_function(AwqConfig, AwqConfig()),
    "auto-round": of_function(AutoRoundConfig, AutoRoundConfig()),
    "compressed-tensors": sorted(
        {*of_function(CompressedTensorsConfig, None), *QuantizationConfig.model_fields}
    ),
    "scheme": sorted(QuantizationScheme.model_fields),
    "weights": sorted(QuantizationArgs.model_fields),
    "gguf": of_gguf(),
}
print("DECLARED", json.dumps(declared), sep="\n")
