"""bitwright quantizes language models on any CPU."""

from bitwright import startup as _startup  # noqa: F401, before all that takes time

# isort: split
from importlib.metadata import version as _version

from bitwright.activations import collect_activations
from bitwright.adapter import collect_grams, quantize_with_transformers
from bitwright.best import quantize_best
from bitwright.build import BuildInfo, build_info, set_num_threads
from bitwright.calibration import load_tokens
from bitwright.checkpoint import Checkpoint
from bitwright.collecting import collect_statistics
from bitwright.convert import convert
from bitwright.demo import demo_folder
from bitwright.distributed import spread_over
from bitwright.dwq import dwq_quantize
from bitwright.dynamic import DynamicReport, choose_precisions, dynamic_quantize
from bitwright.errors import (
    BitwrightError,
    CalibrationError,
    CheckpointError,
    CheckpointNotFoundError,
    MemoryBudgetError,
    MissingExtraError,
    NonFiniteError,
    OutputError,
    OutputExistsError,
    RankError,
    RecipeError,
    ResumeError,
    SensitivityError,
    StatisticsError,
    TargetsError,
    UnsupportedModelError,
)
from bitwright.evaluate import Evaluation, evaluate
from bitwright.inspection import Inspection, LayerKind, inspect_model
from bitwright.links import follow_links
from bitwright.merging import merge_statistics
from bitwright.methods.awq import (
    ScaleSearch,
    awq_scale,
    gram_loss,
    quantize_clipped,
    search_scale,
    token_loss,
)
from bitwright.methods.dynamic import allocate, estimate_threshold
from bitwright.methods.gptq import GptqTensor, GramFactor, factor_gram, quantize_gptq
from bitwright.methods.grid import GridChoice
from bitwright.methods.refine import refine
from bitwright.methods.rtn import quantize_rtn
from bitwright.methods.salient import (
    AWQResult,
    awq_dequantize,
    awq_quantize,
    compute_activation_stats,
    compute_salient_scaling,
    find_salient_weights,
    pack_awq_weights,
    unpack_awq_weights,
)
from bitwright.models.fold import fold_scale
from bitwright.models.model import Model, load_model
from bitwright.pipeline import quantize
from bitwright.plots import plot_dwq, plot_sensitivities
from bitwright.recipe import Recipe
from bitwright.refinement import refine_model
from bitwright.report import (
    BlockReport,
    ConversionReport,
    ConvertedLayer,
    DwqReport,
    LayerReport,
    QuantizationReport,
)
from bitwright.salient_model import awq_quantize_model
from bitwright.sensitivity import Sensitivities, estimate_sensitivities
from bitwright.statistics import LayerStatistics, Moments, gram
from bitwright.statistics_files import Statistics
from bitwright.targets import DwqTargets, compute_dwq_targets
from bitwright.tensor import QuantizedTensor, dequantize, pack, unpack
from bitwright.warned import BitwrightWarning

__version__ = _version("bitwright")

__all__ = [
    "AWQResult",
    "BitwrightError",
    "BitwrightWarning",
    "BlockReport",
    "BuildInfo",
    "CalibrationError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConversionReport",
    "ConvertedLayer",
    "DwqReport",
    "DwqTargets",
    "DynamicReport",
    "Evaluation",
    "GptqTensor",
    "GramFactor",
    "GridChoice",
    "Inspection",
    "LayerKind",
    "LayerReport",
    "LayerStatistics",
    "MemoryBudgetError",
    "MissingExtraError",
    "Model",
    "Moments",
    "NonFiniteError",
    "OutputError",
    "OutputExistsError",
    "QuantizationReport",
    "QuantizedTensor",
    "RankError",
    "Recipe",
    "RecipeError",
    "ResumeError",
    "ScaleSearch",
    "Sensitivities",
    "SensitivityError",
    "Statistics",
    "StatisticsError",
    "TargetsError",
    "UnsupportedModelError",
    "allocate",
    "awq_dequantize",
    "awq_quantize",
    "awq_quantize_model",
    "awq_scale",
    "build_info",
    "choose_precisions",
    "collect_activations",
    "collect_grams",
    "collect_statistics",
    "compute_activation_stats",
    "compute_dwq_targets",
    "compute_salient_scaling",
    "convert",
    "demo_folder",
    "dequantize",
    "dwq_quantize",
    "dynamic_quantize",
    "estimate_sensitivities",
    "estimate_threshold",
    "evaluate",
    "factor_gram",
    "find_salient_weights",
    "fold_scale",
    "follow_links",
    "gram",
    "gram_loss",
    "inspect_model",
    "load_model",
    "load_tokens",
    "merge_statistics",
    "pack",
    "pack_awq_weights",
    "plot_dwq",
    "plot_sensitivities",
    "quantize",
    "quantize_best",
    "quantize_clipped",
    "quantize_gptq",
    "quantize_rtn",
    "quantize_with_transformers",
    "refine",
    "refine_model",
    "search_scale",
    "set_num_threads",
    "spread_over",
    "token_loss",
    "unpack",
    "unpack_awq_weights",
]
