"""bitwright quantizes language models on any CPU."""

from importlib.metadata import version as _version

from bitwright.build import BuildInfo, build_info, set_num_threads
from bitwright.calibration import load_tokens
from bitwright.checkpoint import Checkpoint
from bitwright.demo import demo_folder
from bitwright.errors import (
    BitwrightError,
    CalibrationError,
    CheckpointError,
    CheckpointNotFoundError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    UnsupportedModelError,
)
from bitwright.evaluate import Evaluation, evaluate
from bitwright.methods.gptq import GptqTensor, GramFactor, factor_gram, quantize_gptq
from bitwright.methods.rtn import quantize_rtn
from bitwright.models.model import Model, load_model
from bitwright.pipeline import quantize
from bitwright.report import LayerReport, QuantizationReport
from bitwright.statistics import LayerStatistics, gram
from bitwright.tensor import QuantizedTensor, dequantize, pack, unpack

__version__ = _version("bitwright")

__all__ = [
    "BitwrightError",
    "BuildInfo",
    "CalibrationError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointNotFoundError",
    "Evaluation",
    "GptqTensor",
    "GramFactor",
    "LayerReport",
    "LayerStatistics",
    "Model",
    "NonFiniteError",
    "OutputError",
    "OutputExistsError",
    "QuantizationReport",
    "QuantizedTensor",
    "UnsupportedModelError",
    "build_info",
    "demo_folder",
    "dequantize",
    "evaluate",
    "factor_gram",
    "gram",
    "load_model",
    "load_tokens",
    "pack",
    "quantize",
    "quantize_gptq",
    "quantize_rtn",
    "set_num_threads",
    "unpack",
]
