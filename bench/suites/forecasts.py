"""Forecasts of memory next to the peaks of whole processes, by command and size of the vocabulary.

python bench/suites/forecasts.py [--family NAME …] [--vocabulary N …] [COMMAND …]

Without names, all commands but that of transformers, which needs a Python with torch. Models are random,
in bfloat16 (tests/support/sized_models.py), by default Llamas; a command runs in a process of its own, with
one thread, once without a budget and once with the smallest that it accepts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).parents[2] / "tests"
VOCABULARIES = (4_096, 32_000, 152_064)
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
}
# What other families need to be as large, or as many blocks as it takes to have each kind.
FAMILIES = {
    "llama-linear": {},
    "qwen3_moe": {"moe_intermediate_size": 256, "num_experts": 16, "num_local_experts": 16},
    "gpt_oss": {
        "intermediate_size": 256,
        "num_local_experts": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3_next": {
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 32,
        "num_experts": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 16, "mamba_d_head": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 768},
}

# What plans beside the budget, as (module, name, what it returns → bytes), and the call.
QUANTIZE = "quantization.run.plan_run", "found.memory_bytes"
HEAD = "embedding_bits=4, head_bits=4, memory=memory, progress=False"
COMMANDS = {
    "evaluate": (
        "evaluation.plan_evaluation",
        "found[1]",
        "bitwright.evaluate(q, ids, reference=model, memory=memory)",
    ),
    "sensitivities": (
        "precision.estimate.plan_estimate",
        "found.memory_bytes",
        "bitwright.estimate_sensitivities(model, ids, memory=memory, progress=False)",
    ),
    "dwq": (
        "distill.training.plan_training",
        "found",
        "bitwright.dwq_quantize(model, q, out, ids, tokens=4 * ids.size, validation_samples=2, "
        "memory=memory, progress=False)",
    ),
    "quantize rtn": (*QUANTIZE, f"bitwright.quantize(model, out, 'rtn', 4, {HEAD})"),
    "quantize gptq": (*QUANTIZE, f"bitwright.quantize(model, out, calibration=ids, {HEAD})"),
    "quantize awq": (*QUANTIZE, f"bitwright.quantize(model, out, 'awq', calibration=ids, {HEAD})"),
    "quantize salient": (
        *QUANTIZE,
        f"bitwright.quantize(model, out, 'salient', calibration=ids, {HEAD})",
    ),
    "quantize high": (
        *QUANTIZE,
        f"bitwright.quantize(model, out, calibration=ids, preset='high', {HEAD})",
    ),
    "refine": (
        *QUANTIZE,
        "bitwright.refine_model(model, q, out, ids, memory=memory, progress=False)",
    ),
    "convert to float": (None, None, "bitwright.convert(q, out, 'float', memory=memory)"),
    "convert to gptq": (None, None, "bitwright.convert(q, out, 'gptq', memory=memory)"),
    "convert to compressed-tensors": (
        *(None, None),
        "bitwright.convert(q, out, 'compressed-tensors', memory=memory)",
    ),
    "collect activations": (
        *(None, None),
        "bitwright.collect_activations(model, out, ids, memory=memory)",
    ),
    "collect statistics": (
        "tools.collect_statistics.plan_run",
        "found.memory_bytes",
        "bitwright.collect_statistics(model, out, ids, memory=memory, progress=False)",
    ),
    "merge statistics": (
        *(None, None),
        "bitwright.merge_statistics(parts, out, memory=memory)",
    ),
    "transformers": (
        *(None, None),
        "bitwright.quantize_with_transformers(model, out, calibration=ids, memory=memory, "
        "progress=False)",
    ),
}
WATCH = """
module = sys.modules["bitwright.{module}"]
plan = module.{name}
def planned(*arguments, **options):
    found = plan(*arguments, **options)
    plans.append({bytes})
    return found
module.{name} = planned
"""
PROGRAM = """
import json, sys
import numpy as np
import bitwright
from bitwright.errors import MemoryBudgetError
from bitwright.process.memory import peak_memory_bytes

model, q, out, least = sys.argv[1:5]
bitwright.set_num_threads(1)
from bitwright.runs.budget import Budget
plans = []
require = Budget.require
def required(budget, least, *others):
    plans.append(least)
    require(budget, least, *others)
Budget.require = required
{watch}
vocabulary = bitwright.load_model(model).config.vocab_size
ids = np.random.default_rng(0).integers(0, vocabulary, (8, 128))
from pathlib import Path
parts = [str(each) for each in sorted(Path(model).parent.glob("part*"))]
memory = None
if least == "least":
    memory = 1e-3
    for _ in range(3):  # the process grows a little meanwhile
        try:
            {call}
        except MemoryBudgetError as error:
            memory = error.least / 1e9 + 1e-3
        else:
            break
    plans.clear()
if memory is None:
    {call}
print(json.dumps([max(plans, default=0), peak_memory_bytes(), memory]))
"""


def main() -> None:
    """Print a row for each command and vocabulary."""
    import numpy as np

    import bitwright

    sys.path.insert(0, str(TESTS / "support"))
    from sized_models import make_sized

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="*")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=["llama-linear"])
    parser.add_argument("--vocabulary", nargs="+", type=int, default=VOCABULARIES)
    given = parser.parse_args()
    names = given.command or [each for each in COMMANDS if each != "transformers"]
    table = Table(
        "Family",
        "Command",
        "Vocabulary",
        "Forecast",
        "Peak",
        "Forecast / peak",
        "Least",
        "Peak / least",
    )
    for family, name in product(given.family, names):
        place, size, call = COMMANDS[name]
        watch = ""
        if place is not None:
            module, _, function = place.rpartition(".")
            watch = WATCH.format(module=module, name=function, bytes=size)
        program = PROGRAM.format(watch=watch, call=call)
        for vocabulary in given.vocabulary:
            with tempfile.TemporaryDirectory() as folder:
                changes = {**SHAPE, **FAMILIES[family], "vocab_size": vocabulary}
                model = make_sized(Path(folder, "model"), family, **changes)
                head = {"embedding_bits": 4} | (
                    {} if bitwright.load_model(model).tied else {"head_bits": 4}
                )
                quantized = Path(folder, "q")
                bitwright.quantize(model, quantized, "rtn", 4, 64, progress=False, **head)
                if name == "merge statistics":
                    for seed in range(2):
                        ids = np.random.default_rng(seed).integers(0, vocabulary, (2, 128))
                        part = Path(folder, f"part{seed}")
                        bitwright.collect_statistics(model, part, ids, progress=False)
                found = []
                for kind in ("whole", "least"):
                    out = Path(folder, kind)
                    done = subprocess.run(
                        [sys.executable, "-c", program, model, quantized, out, kind],
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                    if done.returncode:
                        sys.exit(done.stderr)
                    found.append(json.loads(done.stdout))
            (forecast, peak, _), (_, small, least) = found
            table.add_row(
                family,
                name,
                f"{vocabulary:,}",
                f"{forecast / 1e6:.0f} MB",
                f"{peak / 1e6:.0f} MB",
                f"{forecast / peak:.2f}",
                f"{least:.3f} GB",
                f"{small / 1e9 / least:.2f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
