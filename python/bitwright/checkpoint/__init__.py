"""Checkpoint folders: safetensors shards, config.json, and how they are read and written."""

from bitwright.checkpoint.config import ModelConfig, RopeConfig
from bitwright.checkpoint.reader import Checkpoint
from bitwright.checkpoint.writer import CheckpointWriter, copy_side_files

__all__ = ["Checkpoint", "CheckpointWriter", "ModelConfig", "RopeConfig", "copy_side_files"]
