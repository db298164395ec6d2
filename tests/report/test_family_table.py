"""The table of families in the documentation is the one that the code makes."""

from pathlib import Path

from bitwright.models import ARCHITECTURES
from bitwright.report.family_table import IN_MLX_LM, NOT_IN_TRANSFORMERS, family_table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_is_that_of_the_code() -> None:
    text = (DOCS / "architectures.md").read_text()
    assert text.split("<!-- table -->\n")[1].split("<!-- end -->")[0] == family_table()


def test_every_family_has_a_row() -> None:
    rows = [line.split("|")[1].strip(" `") for line in family_table().splitlines()[2:]]
    assert rows == sorted({name.partition("/")[0] for name in ARCHITECTURES})
    assert {*IN_MLX_LM, *NOT_IN_TRANSFORMERS} <= {*rows}


def test_parts_are_named() -> None:
    rows = {line.split("|")[1].strip(" `"): line for line in family_table().splitlines()[2:]}
    assert "attention (normed, gated), gated delta-net" in rows["qwen3_next"]
    assert "latent attention" in rows["deepseek_v3"]
    assert "with sinks" in rows["gpt_oss"]
    assert "short convolution" in rows["lfm2"]
    assert "`mistral`, `ministral3`, `mistral4`" in rows["mistral3"]
    assert "| all |" in rows["llama"]
    assert "all but gguf" in rows["qwen3_next"]
    assert "llama.cpp" not in rows["qwen3_next"]
