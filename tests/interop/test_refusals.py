"""What a refusal says to run makes what was refused readable."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from clients import client_python, run_client
from safetensors import safe_open

import bitwright
from bitwright.errors import UnsupportedModelError

pytestmark = pytest.mark.slow


def test_pickles_become_safetensors_as_the_refusal_says(tmp_path: Path) -> None:
    folder = tmp_path / "old model"
    shutil.copytree(bitwright.demo_folder(), folder)
    weights = folder / "model.safetensors"
    run_client("gptqmodel", "make_pickle.py", weights, folder / "pytorch_model.bin")
    original = bitwright.load_model(bitwright.demo_folder()).logits([[1, 2, 3]])
    weights.unlink()
    with pytest.raises(UnsupportedModelError) as caught:
        bitwright.load_model(folder)
    command = shlex.split(str(caught.value).partition("&& python ")[2])
    subprocess.run(
        [client_python("gptqmodel"), *command], cwd=tmp_path, check=True, capture_output=True
    )
    made = tmp_path / "old model-safetensors"
    with safe_open(made / "model.safetensors", "numpy") as file:
        assert list(file.keys())
    assert (bitwright.load_model(made).logits([[1, 2, 3]]) == original).all()
