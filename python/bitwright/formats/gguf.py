"""GGUF: blocks of 32 weights with a scale, and superblocks of 256 with quantized scales (llama.cpp)."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bitwright import _kernels
from bitwright.checkpoint import Checkpoint, CheckpointSlice
from bitwright.checkpoint.gguf import GgufCheckpoint
from bitwright.checkpoint.gguf_file import BLOCKS, TYPE_NAMES
from bitwright.checkpoint.gguf_names import GgufNames
from bitwright.checkpoint.gguf_writer import GgufFiles
from bitwright.checkpoint.writer import FileOptions
from bitwright.errors import CheckpointError
from bitwright.formats.format import Format, Precision, read_scales
from bitwright.formats.gguf_mix import FLOATS, Mix, MixModel, types_of, whole_blocks
from bitwright.formats.globs import as_globs
from bitwright.formats.loading_code import PROMPT, Code, shell_word
from bitwright.grids.tables import TABLES, has_superblocks
from bitwright.grids.tensor import K_GRIDS, SUPERBLOCK, Grid, QuantizedTensor, SuperBlocks
from bitwright.warned import warn

BLOCK = 32
HALF = np.dtype(np.float16)
TYPES: dict[tuple[Grid, int], str] = {
    ("symmetric", 4): "Q4_0",
    ("affine", 4): "Q4_1",
    ("symmetric", 5): "Q5_0",
    ("affine", 5): "Q5_1",
    ("symmetric", 8): "Q8_0",
    **{("k", bits): f"Q{bits}_K" for bits in K_GRIDS},
    ("iq4_nl", 4): "IQ4_NL",
    ("iq4_xs", 4): "IQ4_XS",
    ("mxfp4", 4): "MXFP4",
    ("nvfp4", 4): "NVFP4",
}
FLOAT_GRIDS: tuple[Grid, ...] = ("mxfp4", "nvfp4")
GRIDS_OF_TYPES = {name: key for key, name in TYPES.items()}
Blocks = NDArray[Any]


class GgufFormat(Format):
    """Reads and writes one file with weights, configuration and tokenizer."""

    name = "gguf"
    bits = (2, 3, 4, 5, 6, 8)
    group_sizes = (16, 32)
    whole_row = False
    grids = ("k", "affine", "symmetric", "iq4_nl", "iq4_xs", *FLOAT_GRIDS)
    scale_dtypes = (HALF,)
    embeddings = True
    stacks_experts = True
    refuses_unknown = True
    own_container = True
    parts = ("weight",)
    engines = "llama.cpp"
    library = "llama.cpp"
    metadata = "gguf"

    @classmethod
    def loading(
        cls, folder: str, mixed: bool, unfused: bool, file: FileOptions | None = None
    ) -> list[Code]:
        stem, several = (file.stem, file.part_bytes) if file else ("model", None)
        weights = shell_word(os.path.join(folder, f"{stem}.gguf"))
        if several:  # how many, is not known before the last is written
            weights = f"{shell_word(os.path.join(folder, stem))}-00001-of-*.gguf"
        return [Code("sh", f'llama-cli -m {weights} -p "{PROMPT}"')]

    @classmethod
    def detect(cls, checkpoint: Checkpoint) -> Self | None:
        return cls() if isinstance(checkpoint, GgufCheckpoint) else None

    @classmethod
    def files(cls, checkpoint: Checkpoint, options: FileOptions | None = None) -> GgufFiles:
        known = checkpoint.metadata if isinstance(checkpoint, GgufCheckpoint) else None
        return GgufFiles(checkpoint.config, checkpoint.folder, known, options)

    @classmethod
    def mixed(
        cls, checkpoint: Checkpoint, mix: Mix, matrices: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Precision | None]:
        """As `Format.mixed`; where rows are no whole blocks, the type that takes the place is told."""
        names = GgufNames(checkpoint.config, checkpoint.folder / "config.json")
        stored = {names.gguf_name(f"{name}.weight"): name for name in matrices}
        shapes = {each: matrices[name] for each, name in stored.items()}
        model = names.config
        facts = MixModel(
            names.architecture,
            model.num_hidden_layers,
            model.num_attention_heads,
            model.num_key_value_heads,
            0 if model.experts is None else model.experts.count,
        )
        chosen = types_of(mix, shapes, facts)
        for name, each in chosen.items():
            cls._check_written(mix, each.type, name)
        told: dict[tuple[str, str, int], list[str]] = {}
        for name, each in chosen.items():
            if each.type != each.wanted:
                told.setdefault((each.wanted, each.type, shapes[name][-1]), []).append(name)
        for (wanted, found, columns), moved in told.items():
            kept = "stay in float" if found in FLOATS else f"become {found}"
            warn(
                f"{checkpoint.folder}: rows of {columns} weights are no whole blocks of {wanted}, so these "
                f"tensors {kept}: {', '.join(as_globs(moved, chosen))}"
            )
        return {stored[name]: cls.of_type(each.type) for name, each in chosen.items()}

    @classmethod
    def _check_written(cls, mix: Mix, kind: str, name: str) -> None:
        if kind not in GRIDS_OF_TYPES and kind not in FLOATS:
            raise ValueError(
                f"type: {mix.name} has {name} of the type {kind}, which is read but not written; written "
                f"are {', '.join(GRIDS_OF_TYPES)}"
            )

    @classmethod
    def default_of(cls, mix: Mix) -> Precision:
        cls._check_written(mix, mix.base, "most tensors")
        found = cls.of_type(mix.base)
        assert found is not None  # or there were nothing to quantize
        return found

    @classmethod
    def of_type(cls, name: str) -> Precision | None:
        """Return the precision of a type of tensors, None for one of floats."""
        if name in FLOATS:
            return None
        grid, bits = GRIDS_OF_TYPES[name]
        return Precision(bits, cls.default_group_size(bits, grid), grid)

    @classmethod
    def default_grid(cls, bits: int, channels: Iterable[int]) -> Grid:
        """Return the k grid where rows have whole superblocks, otherwise a grid that has these bits."""
        if bits in K_GRIDS and not any(each % SUPERBLOCK for each in channels):
            return "k"
        return "affine" if ("affine", bits) in TYPES else "symmetric"

    @classmethod
    def default_group_size(cls, bits: int, grid: Grid) -> int:
        if grid in TABLES:
            return super().default_group_size(bits, grid)
        return K_GRIDS[bits].group_size if grid == "k" and bits in K_GRIDS else BLOCK

    @classmethod
    def ends(
        cls, model_type: str, default: Precision, channels: int
    ) -> tuple[Precision | None, Precision | None]:
        """As llama-quantize has the head: Q6_K or more, Q5_K beside 2 bits."""
        bits = 5 if default.bits == 2 else 6
        if default.bits >= bits and cls.fits(channels, default):
            return default, default
        found = cls.of_type(whole_blocks(f"Q{bits}_K", channels))
        return found, found

    @classmethod
    def precisions(cls) -> list[Precision]:
        return [Precision(bits, cls.default_group_size(bits, grid), grid) for grid, bits in TYPES]

    @classmethod
    def with_bits(cls, default: Precision, bits: int) -> Precision:
        """Every type has its own group size, and not every grid all bits."""
        grid: Grid = default.grid
        if (grid, bits) not in TYPES:
            grid = "k" if bits in K_GRIDS else "symmetric"
        return Precision(bits, cls.default_group_size(bits, grid), grid)

    @classmethod
    def fits(cls, channels: int, precision: Precision) -> bool:
        return channels % _block(precision.grid) == 0

    @classmethod
    def group_words(cls, precision: Precision, channels: int) -> str:
        block = _block(precision.grid)
        return (
            f"{TYPES.get((precision.grid, precision.bits), precision.words())}'s blocks of {block}"
        )

    @classmethod
    def change_that_fits(cls, channels: int, precision: Precision) -> dict[str, int]:
        """The type of 8 bits has no superblocks: llama.cpp falls back to it, too."""
        return {"bits": 8} if has_superblocks(precision.grid) and channels % BLOCK == 0 else {}

    @classmethod
    def check(cls, name: str, shape: tuple[int, int], precision: Precision) -> None:
        bits, grid = precision.bits, precision.grid
        if (grid, bits) not in TYPES:
            known = ", ".join(f"{b} bits {g}" for g, b in sorted(TYPES, key=lambda key: key[1]))
            raise ValueError(
                f"{name}: the gguf format stores no {bits} bits with {grid} grids, but {known}"
            )
        size = cls.default_group_size(bits, grid)
        if precision.group_for(shape[1]) != size:
            raise ValueError(
                f"{name}: {TYPES[grid, bits]} has groups of {size}, not {precision.group_for(shape[1])}"
            )
        if not cls.fits(shape[1], precision):
            block = _block(grid)
            raise ValueError(
                f"{name}: {TYPES[grid, bits]} stores rows of multiples of {block} weights, not "
                f"{shape[1]}"
                + ("; grids affine and symmetric need 32" if has_superblocks(grid) else "")
            )

    @classmethod
    def pack(cls, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        grid = tensor.stored_grid
        kind = TYPES.get((grid, tensor.bits))
        if kind is None or tensor.group_index is not None or tensor.group_size % 16:
            raise ValueError(
                f"{name}: the gguf format stores no {tensor.bits} bits with {grid} grids in groups of "
                f"{tensor.group_size}"
            )
        if grid in FLOAT_GRIDS:
            return {f"{name}.weight": _pack_floats(kind, tensor)}
        return {
            f"{name}.weight": _pack_superblocks(kind, tensor, tensor.superblocks)
            if tensor.superblocks is not None
            else _pack_blocks(kind, name, tensor)
        }

    def pack_grid(self, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        return self.pack(name, tensor)  # codes and grids are in one tensor

    @classmethod
    def config(
        cls, default: Precision, layers: Mapping[str, Precision | None], block_prefix: str
    ) -> dict[str, Any]:
        return {}  # each tensor of the file has its type

    def read(
        self, checkpoint: Checkpoint | CheckpointSlice, name: str, channels: int | None = None
    ) -> QuantizedTensor | None:
        tensor = f"{name}.weight"
        if tensor not in checkpoint:
            return None
        if (parts := checkpoint.dtype(tensor).names) is None:
            return None
        blocks = checkpoint.read(tensor)
        if blocks.ndim != 2:
            raise CheckpointError(
                f"{checkpoint.file(tensor)}: tensor {tensor} has {blocks.ndim} axes, expected 2"
            )
        for field in {"d", "dmin", "m"} & set(parts):
            if not np.isfinite(blocks[field]).all():
                raise CheckpointError(
                    f"{checkpoint.file(tensor)}: tensor {tensor} has scales that are NaN or infinite. "
                    f"The file is damaged: fetch or make it again"
                )
        scales: NDArray[Any]
        grid, bits = GRIDS_OF_TYPES[TYPE_NAMES[blocks.dtype]]
        if grid in FLOAT_GRIDS:
            return _unpacked_floats(blocks, grid, f"{checkpoint.file(tensor)}: tensor {tensor}")
        packed = np.ascontiguousarray(blocks).view(np.uint8)
        fields: dict[str, Any] = {"superblocks": None, "biases": None}
        if has_superblocks(grid):
            codes, d, scale_codes, dmin, min_codes = _kernels.unpack_superblocks(
                packed, bits, grid in TABLES
            )
            superblocks = SuperBlocks(d, scale_codes, dmin, min_codes)
            scales, grid = superblocks.scales(), K_GRIDS[bits].grid if grid == "k" else grid
            fields = {"superblocks": superblocks, "biases": superblocks.biases()}
        else:
            codes, scales, fields["biases"] = _kernels.unpack_blocks(packed, bits, grid == "affine")
        zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8) if grid == "symmetric" else None
        return QuantizedTensor(
            codes=codes,
            scales=scales,
            zeros=zeros,
            bits=bits,
            group_size=codes.shape[1] // scales.shape[1],
            grid=grid,
            **fields,
        )


def _pack_blocks(kind: str, name: str, tensor: QuantizedTensor) -> Blocks:
    """Return ``[out, in / 32]`` blocks; larger groups are stored as several of 32 with one scale."""
    repeats = 0 if tensor.group_size % BLOCK else tensor.group_size // BLOCK

    def halves(values: NDArray[Any]) -> NDArray[np.float16]:
        with np.errstate(over="ignore"):
            stored = values.astype(HALF)
        if not repeats or (stored.astype(np.float32) != values.astype(np.float32)).any():
            raise ValueError(
                f"{name}: the gguf format stores scales and biases of multiples of {BLOCK} weights in "
                f"float16; these are of {tensor.group_size}, and not all such numbers"
            )
        return np.repeat(stored, repeats, axis=1)

    packed = _kernels.pack_blocks(
        np.ascontiguousarray(tensor.codes),
        halves(tensor.scales),
        None if tensor.biases is None else halves(tensor.biases),
        tensor.bits,
    )
    return packed.view(BLOCKS[kind])


def _block(grid: Grid) -> int:
    """Return the weights of a block."""
    return SUPERBLOCK if has_superblocks(grid) else 2 * BLOCK if grid == "nvfp4" else BLOCK


def _pack_floats(kind: str, tensor: QuantizedTensor) -> Blocks:
    """Return blocks of floats: of each group the first half in lower nibbles, the other in upper ones."""
    count = tensor.shape[1] // _block(tensor.grid)
    blocks = np.empty((len(tensor.codes), count), BLOCKS[kind])
    floats = TABLES[tensor.grid].floats[tensor.codes]
    halves = floats.reshape(*blocks.shape, -1, 2, tensor.group_size // 2)
    blocks["e"] = tensor.scales.view(np.uint8).reshape(blocks["e"].shape)
    blocks["qs"] = (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(blocks["qs"].shape)
    return blocks


def _unpacked_floats(blocks: Blocks, grid: Grid, where: str) -> QuantizedTensor:
    table, rows = TABLES[grid], len(blocks)
    scales = np.ascontiguousarray(blocks["e"]).reshape(rows, -1)
    if grid == "nvfp4":
        scales &= 0x7F  # other readers do not look at signs
    pairs = blocks["qs"].reshape(*scales.shape, -1)
    floats = np.concatenate([pairs & 15, pairs >> 4], axis=-1).reshape(rows, -1)
    return QuantizedTensor(
        codes=table.codes_of_floats[floats],
        scales=read_scales(scales, table, where),
        biases=None,
        zeros=None,
        bits=table.bits,
        group_size=floats.shape[1] // scales.shape[1],
        grid=grid,
    )


def _pack_superblocks(kind: str, tensor: QuantizedTensor, grid: SuperBlocks) -> Blocks:
    packed = _kernels.pack_superblocks(
        np.ascontiguousarray(tensor.codes),
        grid.d,
        grid.scale_codes,
        grid.dmin,
        grid.min_codes,
        tensor.bits,
        tensor.table is not None,
    )
    return packed.view(BLOCKS[kind])


FORMATS = (GgufFormat,)
