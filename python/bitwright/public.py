"""What is public, by its names in `bitwright`, which imports this when it is first asked for one."""

from importlib.metadata import version

from bitwright.adapter.quantize import collect_grams, quantize_with_transformers
from bitwright.build import BuildInfo, build_info, set_num_threads
from bitwright.checkpoint import Checkpoint
from bitwright.compat.arrays import (
    AWQResult,
    awq_dequantize,
    awq_quantize,
    compute_salient_scaling,
    pack_awq_weights,
    unpack_awq_weights,
)
from bitwright.compat.model import awq_quantize_model
from bitwright.demo import demo_folder
from bitwright.distill.targets import DwqTargets, compute_dwq_targets
from bitwright.distill.training import dwq_quantize
from bitwright.errors import (
    BitwrightError,
    CalibrationError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    HubError,
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
from bitwright.evaluation import Evaluation, evaluate
from bitwright.files.links import follow_links
from bitwright.grids.choice import GridChoice
from bitwright.grids.tensor import QuantizedTensor, dequantize, pack, unpack
from bitwright.loading.model import Model, load_model
from bitwright.methods.awq import (
    ScaleSearch,
    awq_scale,
    gram_loss,
    quantize_clipped,
    search_scale,
    token_loss,
)
from bitwright.methods.gptq import GptqTensor, GramFactor, factor_gram, quantize_gptq
from bitwright.methods.moments import LayerStatistics, Moments, gram
from bitwright.methods.refine import refine
from bitwright.methods.rtn import quantize_rtn
from bitwright.methods.salient import compute_activation_stats, find_salient_weights
from bitwright.methods.two_sided import refine_two_sided
from bitwright.models.fold import fold_scale
from bitwright.precision.allocation import allocate, estimate_threshold
from bitwright.precision.choices import choose_precisions
from bitwright.precision.estimate import estimate_sensitivities
from bitwright.precision.plot import plot_sensitivities
from bitwright.precision.recipe import Recipe
from bitwright.precision.schemes import SCHEMES
from bitwright.precision.sensitivities import Sensitivities
from bitwright.presets.best import quantize_best
from bitwright.presets.dynamic import DynamicReport, dynamic_quantize
from bitwright.presets.quantize import quantize
from bitwright.ranks import spread_over
from bitwright.records.page import report_page
from bitwright.records.plots import plot_dwq
from bitwright.records.reports import (
    BlockReport,
    ConversionReport,
    ConvertedLayer,
    DwqReport,
    LayerReport,
    QuantizationReport,
)
from bitwright.runs.progress import Progress
from bitwright.statistics.folder import Statistics
from bitwright.statistics.merging import merge_statistics
from bitwright.text.builtin import calibration_text
from bitwright.text.samples import load_tokens
from bitwright.text.text_files import TextFiles
from bitwright.tools.collect_activations import collect_activations
from bitwright.tools.collect_statistics import collect_statistics
from bitwright.tools.convert import convert
from bitwright.tools.export_imatrix import export_imatrix
from bitwright.tools.inspect import Inspection, LayerKind, inspect_model
from bitwright.tools.refine import refine_model
from bitwright.tools.upload import upload
from bitwright.warned import BitwrightWarning

__version__ = version("bitwright")

__all__ = [
    "SCHEMES",
    "AWQResult",
    "BitwrightError",
    "BitwrightWarning",
    "BlockReport",
    "BuildInfo",
    "CalibrationError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "ConversionReport",
    "ConvertedLayer",
    "DwqReport",
    "DwqTargets",
    "DynamicReport",
    "Evaluation",
    "GptqTensor",
    "GramFactor",
    "GridChoice",
    "HubError",
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
    "Progress",
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
    "TextFiles",
    "UnsupportedModelError",
    "allocate",
    "awq_dequantize",
    "awq_quantize",
    "awq_quantize_model",
    "awq_scale",
    "build_info",
    "calibration_text",
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
    "export_imatrix",
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
    "refine_two_sided",
    "report_page",
    "search_scale",
    "set_num_threads",
    "spread_over",
    "token_loss",
    "unpack",
    "unpack_awq_weights",
    "upload",
]
