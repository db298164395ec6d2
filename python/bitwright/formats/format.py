"""The base of the formats: what they hold, packing, unpacking, and their settings in config.json."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bitwright.checkpoint import Checkpoint, CheckpointSlice, SafetensorsFiles, WeightFiles
from bitwright.checkpoint.writer import FileOptions
from bitwright.errors import CheckpointError
from bitwright.formats.gguf_mix import Mix
from bitwright.formats.loading_code import Code, transformers_code, vllm_command
from bitwright.grids.tables import TABLES, TableGrid
from bitwright.grids.tensor import Grid, QuantizedTensor

FormatName = str  # of one of FORMATS
GroupSize = (
    int | Literal["auto"] | None
)  # -1 and None are the whole row, "auto" the format's default
INT32 = (np.dtype(np.int32),)


@dataclass(frozen=True)
class Precision:
    """The precision of a stored layer: bits, input channels per group (None: whole row), grid."""

    bits: int
    group_size: int | None
    grid: Grid

    def group_for(self, channels: int) -> int:
        """Return the group size of a layer with so many input channels."""
        return self.group_size or channels

    def words(self) -> str:
        """Return it in words, for messages."""
        size = "whole rows" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.bits} bits in {size} ({self.grid})"


class Format:
    """Base of the formats."""

    name: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]
    group_sizes: ClassVar[tuple[int, ...]]
    whole_row: ClassVar[bool]
    grids: ClassVar[tuple[Grid, ...]]  # the first is the default
    scale_dtypes: ClassVar[tuple[np.dtype[Any], ...]]
    embeddings: ClassVar[bool]  # whether embeddings and head can be quantized
    stacks_experts: ClassVar[bool] = False  # whether all experts of a layer are one tensor
    # Whether engines compute several layers as one module, which must have one precision then; which
    # ones, is in engine_names.py.
    fuses_shared_inputs: ClassVar[bool] = False
    one_precision: ClassVar[bool] = False  # whether all layers must have the same
    one_grid: ClassVar[bool] = False  # whether all layers must have grids of one kind
    reorders: ClassVar[bool] = False  # whether groups may be other than consecutive channels
    refuses_unknown: ClassVar[bool] = False  # whether engines refuse tensors that they do not use
    own_container: ClassVar[bool] = False  # files of its own, for known families, and in float, too
    parts: ClassVar[tuple[str, ...]]  # endings of the names of tensors that hold a layer
    engines: ClassVar[str]  # that load it
    library: ClassVar[str] = "transformers"  # library_name of model cards at the hub
    needs: ClassVar[str] = ""  # packages that transformers loads it with
    metadata: ClassVar[str]  # the "format" that loaders look for in the header of weight files

    @classmethod
    def detect(cls, checkpoint: Checkpoint) -> Self | None:
        """Return a reader if the checkpoint's config.json declares this format."""
        raise NotImplementedError

    @classmethod
    def scale_dtype(cls, model_dtype: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype that scales are stored in, for a model of that dtype."""
        return model_dtype if model_dtype in cls.scale_dtypes else cls.scale_dtypes[0]

    @classmethod
    def files(cls, checkpoint: Checkpoint, options: FileOptions | None = None) -> WeightFiles:
        """Return how weight files are written for the model of a checkpoint."""
        return SafetensorsFiles()

    @classmethod
    def mixed(
        cls, checkpoint: Checkpoint, mix: Mix, matrices: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Precision | None]:
        """Return the precision of each matrix, or stack of them, in a named mixture; None for float."""
        raise NotImplementedError

    @classmethod
    def default_grid(cls, bits: int, channels: Iterable[int]) -> Grid:
        """Return the default grid for layers with so many input channels."""
        return cls.grids[0]

    @classmethod
    def default_group_size(cls, bits: int, grid: Grid) -> int:
        """Return the default group size."""
        table = TABLES.get(grid)
        if table is not None and table.group_size is not None:
            return table.group_size
        return 64 if 64 in cls.group_sizes else cls.group_sizes[-1]

    @classmethod
    def ends(
        cls, model_type: str, default: Precision, channels: int
    ) -> tuple[Precision | None, Precision | None]:
        """Return what embedding and head, with rows of so many channels, are stored in by default: what the
        tools of the format's engines choose for a model whose layers have this precision."""
        return default, default

    @classmethod
    def precisions(cls) -> list[Precision]:
        """Return all precisions that can be stored."""
        sizes = (*cls.group_sizes, *((None,) if cls.whole_row else ()))
        plain = [grid for grid in cls.grids if grid not in TABLES]
        tables = [(grid, TABLES[grid]) for grid in cls.grids if grid in TABLES]
        return [Precision(*each) for each in product(cls.bits, sizes, plain)] + [
            Precision(table.bits, table.group_size, grid) for grid, table in tables
        ]

    @classmethod
    def precision(
        cls, bits: int, group_size: GroupSize, grid: Grid | None, channels: Iterable[int]
    ) -> Precision:
        """Return the precision for layers with so many input channels, with defaults filled in."""
        chosen = cls.named(grid) or cls.default_grid(bits, channels)
        if group_size == "auto":
            group_size = cls.default_group_size(bits, chosen)
        return Precision(bits, None if group_size == -1 else group_size, chosen)

    @classmethod
    def named(cls, grid: Grid | None) -> Grid | None:
        """Return the grid that the format means by a name."""
        return "nvfp4_divided" if grid == "nvfp4" and "nvfp4_divided" in cls.grids else grid

    @classmethod
    def with_bits(cls, default: Precision, bits: int) -> Precision:
        """Return the precision of a layer that only differs in its bits, as far as its grid has them."""
        if default.grid in TABLES and bits != default.bits:
            grid = cls.default_grid(bits, ())
            return Precision(bits, cls.default_group_size(bits, grid), grid)
        return replace(default, bits=bits)

    @classmethod
    def pack(cls, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        """Return the tensors that hold layer `name`."""
        raise NotImplementedError

    def pack_grid(self, name: str, tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
        """Return those of layer `name`'s tensors that hold its scales and its biases or zeros, as this
        checkpoint stores them."""
        raise NotImplementedError

    @classmethod
    def config(
        cls, default: Precision, layers: Mapping[str, Precision | None], block_prefix: str
    ) -> dict[str, Any]:
        """Return the additions to config.json; `layers` maps linears to precisions, None for float."""
        raise NotImplementedError

    @classmethod
    def default_of(cls, mix: Mix) -> Precision:
        """Return the precision of most layers of a named mixture."""
        raise ValueError(
            f"type: {mix.name} is a mixture of types of the gguf format (--format gguf), not of {cls.name}"
        )

    @classmethod
    def loading(
        cls, folder: str, mixed: bool, unfused: bool, file: FileOptions | None = None
    ) -> list[Code]:
        """Return how a folder is loaded, for people who have none of the tools yet.

        Parameters
        ----------
        folder
            As people write it.
        mixed
            Whether its layers have several precisions.
        unfused
            Whether these differ among layers that vLLM computes as one module, which it refuses.
        file
            How its weight files were named.
        """
        code = [transformers_code(folder, cls.needs)]
        return code if unfused else [*code, vllm_command(folder)]

    @classmethod
    def name_written(cls, name: str, nested: bool) -> str:
        """Return the name that a layer or tensor is written under, of a model in which the language model
        is `nested` or not."""
        return name

    @classmethod
    def array_written(cls, name: str, array: NDArray[Any], family: str) -> NDArray[Any]:
        """Return what is written for a float tensor of a family, where engines want it in another form."""
        return array

    @classmethod
    def spell(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json with what its loaders need to find in another spelling than the source has."""
        return dict(config)

    @classmethod
    def keeps_in_float(cls, model_type: str, layer: str) -> bool:
        """Tell whether engines cannot use a quantized layer of this name."""
        return False

    @classmethod
    def check_head(cls, model_type: str, tied: bool) -> None:
        """Raise ValueError if engines cannot load a model of this type whose head is the embedding, or is
        not."""

    def read(
        self, checkpoint: Checkpoint | CheckpointSlice, name: str, channels: int | None = None
    ) -> QuantizedTensor | None:
        """Return layer `name`, None if it is not quantized. The model has so many input `channels` there:
        not all formats' tensors tell."""
        raise NotImplementedError

    @classmethod
    def chosen_scale_dtype(
        cls, model_dtype: np.dtype[Any], asked: DTypeLike | None
    ) -> np.dtype[Any]:
        """Return the dtype of scales that is asked for, or by default that for a model; ValueError unless
        they can be stored in it."""
        dtype = cls.scale_dtype(model_dtype) if asked is None else np.dtype(asked)
        if dtype not in cls.scale_dtypes:
            raise ValueError(
                f"scale_dtype: the {cls.name} format stores {_any_of(cls.scale_dtypes)}, not {dtype}"
            )
        return dtype

    @classmethod
    def wider_dtype(
        cls, model_dtype: np.dtype[Any], asked: DTypeLike | None
    ) -> np.dtype[Any] | None:
        """Return the dtype of scales of layers that the default one cannot hold: the model's, where another
        is the default; otherwise None."""
        own = asked is not None or cls.chosen_scale_dtype(model_dtype, None) == model_dtype
        return None if own or model_dtype not in cls.scale_dtypes else model_dtype

    @classmethod
    def fits(cls, channels: int, precision: Precision) -> bool:
        """Tell whether rows of so many channels divide into whole groups."""
        return channels % precision.group_for(channels) == 0

    @classmethod
    def group_words(cls, precision: Precision, channels: int) -> str:
        """Return what divides rows of so many channels, for messages."""
        return f"groups of {precision.group_for(channels)}"

    @classmethod
    def change_that_fits(cls, channels: int, precision: Precision) -> dict[str, int]:
        """Return what an override says so that rows are whole groups, the largest there are; empty if
        none are."""
        sizes = [size for size in cls.group_sizes if channels % size == 0]
        return {"group_size": max(sizes)} if sizes and not cls.one_precision else {}

    @classmethod
    def stores(cls, shape: tuple[int, int], precision: Precision) -> bool:
        """Tell whether a layer ``[out, in]`` can be stored so."""
        try:
            cls.check("", shape, precision)
        except ValueError:
            return False
        return True

    @classmethod
    def check(cls, name: str, shape: tuple[int, int], precision: Precision) -> None:
        """Raise ValueError unless a layer ``[out, in]`` can be stored so."""
        channels = shape[1]
        size = precision.group_for(channels)
        bits = cls.bits
        if precision.grid in cls.grids and precision.grid in TABLES:
            bits = (TABLES[precision.grid].bits,)
        if precision.bits not in bits:
            raise ValueError(
                f"{name}: the {cls.name} format stores {_any_of(bits)} bits, not {precision.bits}"
            )
        if precision.grid not in cls.grids:
            raise ValueError(
                f"{name}: the {cls.name} format stores {_any_of(cls.grids)} grids, "
                f"not {precision.grid}"
            )
        if not cls.fits(channels, precision):
            raise ValueError(
                f"{name}: group size {size} does not divide its {channels} input channels"
            )
        table = TABLES.get(precision.grid)
        if table is not None and size == table.group_size:
            return
        if size not in cls.group_sizes and not (cls.whole_row and size == channels):
            raise ValueError(
                f"{name}: the {cls.name} format stores groups of {_any_of(cls.group_sizes)}"
                f"{' or whole rows' if cls.whole_row else ''}, not {size}"
            )


def read_shaped(
    checkpoint: Checkpoint | CheckpointSlice,
    name: str,
    dtypes: tuple[Any, ...],
    dimensions: int = 2,
) -> NDArray[Any]:
    """Read a tensor and check its dtype and number of axes."""
    array = checkpoint.read(name)
    if array.ndim != dimensions or array.dtype not in dtypes or array.size == 0:
        raise CheckpointError(
            f"{checkpoint.file(name)}: tensor {name} is {array.dtype} of shape {list(array.shape)}; "
            f"expected {_any_of(dtypes)} with {dimensions} axes"
        )
    return array


def read_scales(stored: NDArray[Any], table: TableGrid, where: str) -> NDArray[Any]:
    """Return the scales of a table from their bytes, checked: `where` tells the tensor."""
    dtype = table.scale_dtype
    scales = stored if dtype is None else stored.view(dtype)
    wide = scales.astype(np.float32)
    bad = np.argwhere(~np.isfinite(wide) | ((wide < 0) & (not table.either_sign)))
    if len(bad):
        row, group = bad[0]
        raise CheckpointError(
            f"{where}: the scale of row {row}, group {group} is {wide[row, group]}, and {len(bad)} of "
            f"{wide.size} are no positive numbers. The file is damaged: fetch or make it again"
        )
    return scales


def read_codes(floats: NDArray[np.uint8], table: TableGrid, where: str) -> NDArray[np.uint8]:
    """Return the codes of floats, checked to be numbers: `where` tells the tensor."""
    codes = table.codes_of_floats[floats]
    if table.has_nan:
        bad = np.argwhere((codes == 0) | (codes == len(table.points) - 1))
        if len(bad):
            row, channel = bad[0]
            raise CheckpointError(
                f"{where}: the weight of row {row}, channel {channel} is NaN, as are {len(bad)} of "
                f"{codes.size}. The file is damaged: fetch or make it again"
            )
    return codes


def read_group_index(
    checkpoint: Checkpoint | CheckpointSlice, tensor: str, channels: int, groups: int
) -> NDArray[np.int32] | None:
    """Read which group each channel is in; None where there is no such tensor, or they are consecutive."""
    if tensor not in checkpoint:
        return None
    index = read_shaped(checkpoint, tensor, INT32, dimensions=1)
    if index.shape != (channels,) or index.min() < 0 or index.max() >= groups:
        raise CheckpointError(
            f"{checkpoint.file(tensor)}: tensor {tensor} does not name one of "
            f"{groups} groups for each of {channels} channels"
        )
    if (index == np.arange(channels) // (channels // groups)).all():
        return None
    return np.ascontiguousarray(index)


def _any_of(values: tuple[Any, ...]) -> str:
    words = [getattr(value, "__name__", str(value)) for value in values]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
