"""Changes that are likely to matter, as hypothesis draws them."""

import json
import math
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from bitwright.checkpoint.reader import DTYPES
from hostile.changes import PLACES, Case, Edit, Fill, Place, Put, Say, Store
from hostile.files import LAYERS, families, read_gguf, read_safetensors
from hostile.targets import Target

_WORDS = (  # noqa: SIM905
    "0 -1 1 2 3 7 64 1000 1000000000 2147483647 2147483648 9223372036854775807 9223372036854775808 "
    "18446744073709551615 -9223372036854775808 0.5 -0.0 1e-30 1e-320 1e30 1e308 1e400 NaN Infinity "
    r'null true false "" "x" "../x" "/dev/zero" "a/b" "\ud800" "\u0000" "\n\u001b[31m" [] [[]] {} [-1] '
    r'[1,2] [0,8] [null] ["x"] {"a":1} {"":null} 1,"hidden_size":2 x ] "'
).split()
_HUGE = [
    "9" * 100_000,
    "[" * 100_000,
    "[" * 900 + "]" * 900,
    "[" + "1, " * 20_000 + "1]",
    '"' + "x" * 100_000 + '"',
]
_LITERALS = (  # noqa: SIM905
    "'<f4' '<f2' '>f8' '|O' '<M8' '<V2' '|S9' [('a','<f4')] (2,4,64) (8,64) (1,-1) () (True,4,64) (0,64) "
    "(1<<70,) (1099511627776,64) (4611686018427387904,64) True None ((((( __import__('os').abort()"
).split()
_PIECES = [
    (value % (1 << 8 * size)).to_bytes(size, "little")
    for size in (1, 2, 4, 8)
    for value in (0, 1, 127, 255, -1, (1 << (8 * size - 1)) - 1, 1 << (8 * size - 1))
]
_FLOATS = [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e38, 65504.0, 1e-40, 255.0, 2.0**31, 1e30]
_COUNT, _INDEX = st.integers(1, 3), st.integers(0, (1 << 16) - 1)
_TEXTS = (
    st.sampled_from(_WORDS)
    | st.integers(0, len(_HUGE) - 1).map(_HUGE.__getitem__)
    | st.integers(-9, 600).map(str)
    | st.floats().map(json.dumps)
    | st.text(max_size=8).map(json.dumps)
    | st.lists(st.integers(-1, 64), max_size=4).map(json.dumps)
)


def cases(target: Target) -> st.SearchStrategy[Case]:
    """Up to three changes of a target's files."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Case:
        variant = draw(_one_of(target.files()))
        files = target.files()[variant]
        names = [name for name in files if name.endswith(target.edited)]
        edits = []
        for _ in range(draw(_COUNT)):
            name = draw(_one_of(names))
            edits.append(draw(_edit(name, files[name])))
        return Case(variant, draw(_one_of(target.tasks)), tuple(edits))

    return drawn()


def _one_of(known: Iterable[str]) -> st.SearchStrategy[str]:
    return _sampled(tuple(sorted(known)))


@cache
def _sampled(known: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.sampled_from(known)


# What is drawn from is made once for each file: hypothesis takes longer to make it than to draw.
@cache
def _edit(name: str, content: bytes) -> st.SearchStrategy[Edit]:
    suffix, same = Path(name).suffix, st.just(name)
    start = st.integers(0, min(len(content), 4096)) | st.integers(0, len(content))
    piece = st.binary(max_size=8) | st.sampled_from(_PIECES)
    kinds: list[st.SearchStrategy[Edit]] = [
        st.builds(Put, same, start, st.integers(0, 9), piece),
        st.builds(Put, same, start, st.just(len(content)), st.just(b"")),
        st.builds(Place, same, st.sampled_from(PLACES)),
    ]
    if suffix in (".json", ".safetensors", ".gguf", ".npz"):
        kinds += [_say(name, content)] * 8
    if suffix in (".safetensors", ".npz"):
        tensors = LAYERS if suffix == ".npz" else sorted(read_safetensors(content))
        kinds += [_store(name, tensors), _fill(name, tensors)] * 2
    if suffix == ".gguf":
        kinds += [_put_number(name, content)] * 6
    return st.sampled_from(kinds).flatmap(lambda kind: kind)


def _say(name: str, content: bytes) -> st.SearchStrategy[Edit]:
    document = _document(name, content)
    texts = _TEXTS | st.sampled_from(_values(name, content))

    @st.composite
    def drawn(draw: st.DrawFn) -> Edit:
        path: list[str | int] = []
        place = document
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            path.append(keys[draw(_INDEX) % len(keys)])
            place = place[path[-1]]
            if draw(_INDEX) % 10 == 9:
                break
        if name == "config.json" and draw(_INDEX) % 10 == 9:
            path = [_config_keys()[draw(_INDEX) % len(_config_keys())]]
        return Say(name, tuple(path), draw(texts))

    return drawn()


def _document(name: str, content: bytes) -> Any:
    match Path(name).suffix:
        case ".safetensors":
            size = int.from_bytes(content[:8], "little")
            return json.loads(content[8 : 8 + size])
        case ".gguf":
            return read_gguf(content)[0]
        case ".npz":
            return {each: dict.fromkeys(("descr", "fortran_order", "shape")) for each in LAYERS}
        case _:
            return json.loads(content)


def _values(name: str, content: bytes) -> list[str]:
    """The values of a document, each as text: any may be put in the place of any other."""
    if name.endswith(".npz"):
        return _LITERALS
    known = [_document(name, content)]
    if name == "config.json":
        known += [json.loads(files[name]) for files in families().values()]
    found = {json.dumps(value, default=str) for each in known for value in _walk(each)}
    return sorted(text for text in found if len(text) < 1000)[:1000]


def _walk(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _walk(each)


@cache
def _config_keys() -> list[str]:
    return sorted(
        {key for files in families().values() for key in json.loads(files["config.json"])}
    )


def _store(name: str, tensors: Iterable[str]) -> st.SearchStrategy[Edit]:
    shapes = st.lists(st.integers(0, 8) | st.sampled_from([16, 32, 64, 96, 256, 512]), max_size=3)
    return st.builds(
        Store,
        st.just(name),
        _one_of(tensors),
        st.sampled_from(sorted(DTYPES)),
        shapes.map(tuple).filter(lambda shape: math.prod(shape) < 1 << 18),
    )


def _fill(name: str, tensors: Iterable[str]) -> st.SearchStrategy[Edit]:
    element = st.none() | st.integers(0, 1 << 16)
    return st.builds(Fill, st.just(name), _one_of(tensors), st.sampled_from(_FLOATS), element)


def _put_number(name: str, content: bytes) -> st.SearchStrategy[Edit]:
    """Change a count, size, type or offset in the header of a GGUF file."""
    places = [(4, 4), (8, 8), (16, 8)]
    for tensor, array in read_gguf(content)[1].items():
        place, axes = content.rindex(tensor.encode()) + len(tensor), array.ndim
        places += [(place - len(tensor) - 8, 8), (place, 4)]
        places += [(place + 4 + 8 * axis, 8) for axis in range(axes)]
        places += [(place + 4 + 8 * axes, 4), (place + 8 + 8 * axes, 8)]
    numbers = st.integers(0, 40) | st.sampled_from([96, 256, 1 << 31, 1 << 32, 1 << 62, 1 << 63])

    def put(place: tuple[int, int], number: int) -> Edit:
        start, size = place
        return Put(name, start, size, (number % (1 << 8 * size)).to_bytes(size, "little"))

    return st.builds(put, st.sampled_from(places), numbers)
