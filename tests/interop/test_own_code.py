"""Models with code, tokenizers and templates of their own load in transformers as the originals do."""

import json
import shutil
from pathlib import Path

import pytest
from chat_samples import SAMPLES
from clients import run_client
from shared_data import TESTS

import bitwright

pytestmark = pytest.mark.slow

START = """from transformers import MistralConfig, MistralForCausalLM
class OwnConfig(MistralConfig):
    pass
"""
MODEL = """from transformers import MistralForCausalLM
from .configuration_own import OwnConfig
from .numbers_own import own
class OwnForCausalLM(MistralForCausalLM):
    config_class = OwnConfig
    own = own()
"""
TOKENIZER = """from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
CODE = {
    "one file": {
        "modeling_own.py": START + MODEL.split("\n", 3)[3].replace("own()", "1"),
    },
    "files that import each other": {
        "configuration_own.py": START,
        "modeling_own.py": MODEL,
        "numbers_own.py": "from .more_numbers_own import two\ndef own():\n    return two\n",
        "more_numbers_own.py": "two = 2\n",
    },
    "a folder beside the files": {
        "configuration_own.py": START,
        "modeling_own.py": MODEL,
        "numbers_own.py": "def own():\n    return 3\n",
        "own_training/__init__.py": "",
        "own_training/losses.py": "from ..modeling_own import OwnForCausalLM\n",
    },
}


def model_with(code: dict[str, str], folder: Path) -> Path:
    shutil.copytree(TESTS / "data" / "tiny" / "mistral", folder)
    SAMPLES["additional templates"].write(folder)
    for path, content in {**code, "tokenization_own.py": TOKENIZER}.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content)
    own = "configuration_own" if "configuration_own.py" in code else "modeling_own"
    said = {
        "config.json": {
            "auto_map": {
                "AutoConfig": f"{own}.OwnConfig",
                "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
            }
        },
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        },
    }
    for name, more in said.items():
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(known | more))
    return folder


def test_own_code_in_transformers(tmp_path: Path) -> None:
    places = []
    for number, code in enumerate(CODE.values(), start=1):
        # transformers takes folders of one name for one package, even if they lie in different places.
        made = [tmp_path / f"{name}_{number}" for name in ("model", "quantized", "converted")]
        model, quantized, converted = made
        model_with(code, model)
        bitwright.quantize(model, quantized, "rtn", 4, 32, "compressed-tensors", progress=False)
        bitwright.convert(quantized, converted, "float", progress=False)
        places += made
    printed = run_client("gptqmodel", "load_own_code.py", *places)
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(found) == len(places)
    for place, each in zip(places, found, strict=True):
        assert (each["model"], each["tokenizer"]) == ("OwnForCausalLM", "OwnTokenizer")
        assert each["own"] == int(place.name.rpartition("_")[2])
        assert (each["chat"], each["tools"][:1], each["finite"]) == ("da", "t", True)
