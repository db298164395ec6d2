"""Checkpoint folders: safetensors shards, config.json, and how they are read and written."""

from bitwright.checkpoint.gguf import GgufCheckpoint
from bitwright.checkpoint.opening import open_checkpoint
from bitwright.checkpoint.reader import Checkpoint, CheckpointSlice
from bitwright.checkpoint.writer import (
    CheckpointWriter,
    SafetensorsFiles,
    WeightFiles,
    copy_side_files,
)
from bitwright.models.config import (
    ExpertsConfig,
    LatentConfig,
    LayerType,
    ModelConfig,
    RopeConfig,
    float_config,
    plainly_spelled,
)
from bitwright.models.keys import ConfigRules, Keys

__all__ = [
    "Checkpoint",
    "CheckpointSlice",
    "CheckpointWriter",
    "ConfigRules",
    "ExpertsConfig",
    "GgufCheckpoint",
    "Keys",
    "LatentConfig",
    "LayerType",
    "ModelConfig",
    "RopeConfig",
    "SafetensorsFiles",
    "WeightFiles",
    "copy_side_files",
    "float_config",
    "open_checkpoint",
    "plainly_spelled",
]
