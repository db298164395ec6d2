"""Where the data is that lies beside the project, not in it."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SHARED = TESTS.parents[1] / "shared"

TINY = sorted((TESTS / "data" / "tiny").iterdir())
# Families that are others in other words: whatever takes long is tried on those others.
KIN = [
    "arcee",
    "cwm",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "glm",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "mamba2",
    "falcon_h1-gated",
    "granitemoe",
    "granitemoeshared",
    "granitemoehybrid-experts",
    "helium",
    "internlm3",
    "lfm2_moe",
    "minimax_m2",
    "ministral",
    "olmo3",
    "olmoe",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
    "seed_oss",
    "solar_open",
    "stablelm",
    "stablelm-parallel",
    "cohere",
    "mistral3-mistral4",
    "bamba",
    "mistral3-ministral3",
    "hunyuan_v1_dense",
]
OWN = [folder for folder in TINY if folder.name not in KIN]
ARCH = sorted((SHARED / "models" / "arch").glob("*"))

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"{SHARED} with models and texts is not beside the project"
)
