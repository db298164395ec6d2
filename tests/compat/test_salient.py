"""Salient-weight AWQ: golden vectors of the peer, packing, files of activations, whole models."""

import json
import subprocess
import sys
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_runs import DEMO, EVALUATION, TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Array
from shared_data import SHARED, needs_shared

import bitwright

CASES = ("case0", "case1", "case2")


@cache
def golden() -> dict[str, Array]:
    with np.load(SHARED / "golden" / "salient_awq.npz") as file:
        return dict(file)


def data(channels: int = 128, out: int = 24, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    activations = rng.standard_normal((2, 64, channels), dtype=np.float32)
    activations[:, :, rng.choice(channels, 4, replace=False)] *= 25
    return rng.standard_normal((channels, out), dtype=np.float32), activations


def output_error(weights: Array, restored: Array, activations: Array) -> float:
    tokens = activations.reshape(-1, len(weights)).astype(np.float64)
    return float(np.linalg.norm(tokens @ (restored - weights)) / np.linalg.norm(tokens @ weights))


def restored(result: bitwright.AWQResult) -> Array:
    return bitwright.awq_dequantize(
        result.Q, result.scales, result.zeros, result.q_scale, result.meta
    )


# --- against the peer


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_statistics_masks_and_scaling_are_the_peers(case: str) -> None:
    weights, activations = golden()[f"{case}_weights"], golden()[f"{case}_activations"]
    for method in ("mean", "max", "rms"):
        stats = bitwright.compute_activation_stats(activations, method)  # type: ignore[arg-type]
        np.testing.assert_allclose(stats, golden()[f"{case}_stats_{method}"], rtol=1e-6)
    mask, importance = bitwright.find_salient_weights(weights, golden()[f"{case}_stats_rms"], 0.01)
    np.testing.assert_array_equal(mask, golden()[f"{case}_salient_mask"])
    assert importance.max() == 1
    groups = len(golden()[f"{case}_peer_scales"])
    steps = np.abs(weights).reshape(groups, -1, weights.shape[1]).max(axis=1) / 7
    scaling = bitwright.compute_salient_scaling(weights, mask, steps, len(weights) // groups)
    np.testing.assert_allclose(scaling, golden()[f"{case}_peer_q_scale"], rtol=1e-3)


@needs_shared
@pytest.mark.parametrize("channel_scaling", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_closer_than_the_peers(case: str, channel_scaling: bool) -> None:
    weights, activations = golden()[f"{case}_weights"], golden()[f"{case}_activations"]
    words, scales = golden()[f"{case}_peer_Q"], golden()[f"{case}_peer_scales"].astype(np.float32)
    group_size = len(weights) // len(scales)
    nibbles = [(words >> np.uint32(4 * i)) & 15 for i in range(8)]
    codes = np.stack(nibbles, axis=1).reshape(weights.shape).astype(np.float32) - 7
    peer = codes * np.repeat(scales, group_size, axis=0) / golden()[f"{case}_peer_q_scale"]
    result = bitwright.awq_quantize(
        weights, activations, group_size, channel_scaling=channel_scaling
    )
    assert (result.channel_scale is not None) == channel_scaling
    ours = output_error(weights, restored(result), activations)
    assert ours < 0.92 * output_error(weights, peer, activations)


# --- packing


def test_all_codes_survive_packing() -> None:
    codes = np.tile(np.arange(-8, 8, dtype=np.int8), 4).reshape(32, 2)
    words, meta = bitwright.pack_awq_weights(codes, np.ones((1, 2)), np.zeros((1, 2)), 32)
    assert words.dtype == np.uint32
    assert words.shape == (4, 2)
    assert meta == {
        "in_features": 32,
        "out_features": 2,
        "group_size": 32,
        "quant_type": "awq_int4",
    }
    np.testing.assert_array_equal(bitwright.unpack_awq_weights(words, meta), codes)
    # Marlin's order: nibble i of word r is channel 8 r + i.
    assert (words[1, 0] >> 12) & 15 == codes[11, 0] + 8


@given(
    channels=st.integers(1, 70),
    out=st.integers(1, 9),
    group_size=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_any_number_of_channels_is_padded(
    channels: int, out: int, group_size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, (channels, out), dtype=np.int8)
    groups = -(-channels // group_size)
    scales = rng.random((groups, out), dtype=np.float32)
    words, meta = bitwright.pack_awq_weights(codes, scales, scales, group_size)
    assert words.shape == (groups * group_size // 8, out)
    np.testing.assert_array_equal(bitwright.unpack_awq_weights(words, meta), codes)
    weights = bitwright.awq_dequantize(words, scales, 0 * scales, np.full(out, 2), meta)
    np.testing.assert_allclose(
        weights, codes * np.repeat(scales, group_size, axis=0)[:channels] / 2, rtol=1e-6
    )


# --- quantizing


@pytest.mark.parametrize("channel_scaling", [False, True])
@pytest.mark.parametrize("channels", [128, 100])
def test_the_output_suffers_less_than_from_rounding(channels: int, channel_scaling: bool) -> None:
    weights, activations = data(channels)
    result = bitwright.awq_quantize(weights, activations, 32, channel_scaling=channel_scaling)
    groups = -(-channels // 32)
    assert result.Q.shape == (groups * 4, 24)
    assert result.scales.shape == result.zeros.shape == (groups, 24)
    assert result.scales.dtype == result.zeros.dtype == result.q_scale.dtype == np.float16
    assert result.q_scale.shape == (24,)
    found = restored(result)
    assert found.shape == weights.shape
    assert result.quantization_error == pytest.approx(np.square(found - weights).sum(), rel=1e-4)
    padded = np.pad(np.ascontiguousarray(weights.T), ((0, 0), (0, -channels % 32)))
    rounded = bitwright.quantize_rtn(padded, 4, 32, grid="symmetric").dequantize()[:, :channels].T
    assert output_error(weights, found, activations) < 0.6 * output_error(
        weights, rounded, activations
    )
    codes = bitwright.unpack_awq_weights(result.Q, result.meta)
    assert codes.min() >= -8
    assert codes.max() <= 7


def test_the_size_is_what_four_bits_promise() -> None:
    weights, activations = data(1024, 512)
    result = bitwright.awq_quantize(weights, activations)
    size = result.Q.nbytes + result.scales.nbytes + result.zeros.nbytes + result.q_scale.nbytes
    assert weights.nbytes / size > 7.4


def test_salient_weights_are_protected_and_the_ratio_matters() -> None:
    """The more weights are salient, the less error is left on those that always are; and the ratio decides
    which channels are scaled."""
    weights, activations = data(128, 200)
    scaled = {
        ratio: bitwright.awq_quantize(weights, activations, 64, ratio, channel_scaling=True)
        for ratio in (0.0, 0.01, 1.0)
    }
    counts = []
    for result in scaled.values():
        assert result.channel_scale is not None
        counts.append(int((result.channel_scale != 1).sum()))
    assert counts[0] == 0 < counts[1] <= counts[2]
    stats = bitwright.compute_activation_stats(activations)
    loud = stats > 10
    assert (scaled[0.01].channel_scale[loud] > 1).all()  # type: ignore[index]
    tokens = activations.reshape(-1, 128) * loud
    errors = [np.linalg.norm(tokens @ (restored(result) - weights)) for result in scaled.values()]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", ["mean", "max", "rms"])
def test_statistics_follow_their_definition(method: Any) -> None:
    activations = data()[1]
    sizes = np.abs(activations.astype(np.float64)).reshape(-1, 128)
    expected = {"mean": sizes.mean(0), "max": sizes.max(0), "rms": np.sqrt((sizes**2).mean(0))}
    found = bitwright.compute_activation_stats(activations, method)
    np.testing.assert_allclose(found, expected[method], rtol=1e-5)


@pytest.mark.parametrize(
    ("weights", "activations", "options", "name"),
    [
        (np.ones((8, 2)), np.ones((1, 4, 9)), {}, "9 channels"),
        (np.ones((8, 2)), np.full((1, 4, 8), np.nan), {}, "activations"),
        (np.ones((8, 2)), np.full((1, 4, 8), np.inf), {}, "activations"),
        (np.full((8, 2), np.nan), np.ones((1, 4, 8)), {}, "weights"),
        (np.ones((8, 2)), np.zeros((1, 4, 8)), {}, "all zero"),
        (np.ones((8, 2)), np.ones((1, 0, 8)), {}, "activations"),
        (np.ones((8, 2)), np.ones(8), {}, "activations"),
        (np.ones(8), np.ones((1, 4, 8)), {}, "weights"),
        (np.ones((8, 2)), np.ones((1, 4, 8)), {"salient_ratio": 1.1}, "salient_ratio"),
        (np.ones((8, 2)), np.ones((1, 4, 8)), {"salient_ratio": np.nan}, "salient_ratio"),
        (np.ones((8, 2)), np.ones((1, 4, 8)), {"group_size": 12}, "group_size"),
        (np.ones((8, 2)), np.ones((1, 4, 8)), {"group_size": 0}, "group_size"),
        (np.ones((8, 2)), np.ones((1, 4, 8)), {"activation_method": "median"}, "method"),
        (np.ones((8, 2)), np.array([[None] * 8]), {}, "activations"),
    ],
)
def test_wrong_arrays_are_named(
    weights: Array, activations: Array, options: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        bitwright.awq_quantize(weights, activations, **options)


def test_wrong_meta_is_named() -> None:
    codes, one = np.zeros((8, 2), np.int8), np.ones((1, 2))
    words, meta = bitwright.pack_awq_weights(codes, one, one, 8)
    for changes, name in (
        ({"quant_type": "int8"}, "quant_type"),
        ({"in_features": 99}, "Q"),
        ({"group_size": 7}, "group_size"),
        ({"channel_scale": np.ones(5)}, "channel_scale"),
    ):
        with pytest.raises(ValueError, match=name):
            bitwright.awq_dequantize(words, one, one, np.ones(2), {**meta, **changes})
    with pytest.raises(ValueError, match="lacks"):
        bitwright.awq_dequantize(words, one, one, np.ones(2), {})
    with pytest.raises(ValueError, match="q_scale"):
        bitwright.awq_dequantize(words, one, one, np.ones(3), meta)
    with pytest.raises(ValueError, match="codes"):
        bitwright.pack_awq_weights(codes + np.int8(8), one, one, 8)
    with pytest.raises(TypeError, match="int8"):
        bitwright.pack_awq_weights(codes.astype(np.float32), one, one, 8)  # type: ignore[arg-type]


def test_zero_weights_stay_zero() -> None:
    result = bitwright.awq_quantize(np.zeros((32, 4)), data(32)[1], 32)
    assert result.quantization_error == 0
    assert not restored(result).any()


# --- files of activations and whole models


@pytest.fixture(scope="module")
def activations_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("activations") / "demo.npz"
    bitwright.collect_activations(DEMO, path, TEXT, samples=8, length=128)
    return path


def test_what_is_collected_is_what_the_layers_see(activations_file: Path) -> None:
    with np.load(activations_file) as file:
        assert len(file.files) == 3 * 4
        found = file["model.layers.0.self_attn.q_proj"]
    model = bitwright.load_model(DEMO)
    tokens = bitwright.load_tokens(TEXT, tokenizer=DEMO, length=128, samples=8, seed=0)
    embedded = model.embedding()[tokens]
    gain = model.vector("model.layers.0.input_layernorm.weight", (embedded.shape[2],))
    power = np.square(embedded).mean(axis=2, keepdims=True) + model.config.norm_eps
    np.testing.assert_allclose(found, embedded / np.sqrt(power) * gain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["awq", "mlx", "gptq"])
def test_models_are_quantized_from_a_file(
    tmp_path: Path, activations_file: Path, format: Any
) -> None:
    report = bitwright.awq_quantize_model(
        DEMO, tmp_path / "out", activations_file, 32, format=format, verbose=False
    )
    assert report.method == "salient"
    assert len(report.layers) == 7 * 3 + (format == "mlx")  # which has the embedding, too
    rounded = bitwright.quantize(
        DEMO, tmp_path / "rtn", "rtn", 4, 32, format, progress=False, grid=None
    )
    found, plain = (
        bitwright.evaluate(tmp_path / name, EVALUATION, reference=DEMO, length=128, samples=16)
        for name in ("out", "rtn")
    )
    assert found.kl_divergence is not None
    assert plain.kl_divergence is not None
    assert found.kl_divergence < plain.kl_divergence
    assert rounded.size_bytes == report.size_bytes


def test_formats_hold_the_same_weights(tmp_path: Path, activations_file: Path) -> None:
    models = []
    for format in ("awq", "gptq"):
        bitwright.awq_quantize_model(
            DEMO,
            tmp_path / format,
            activations_file,
            32,
            format=format,
            verbose=False,  # type: ignore[arg-type]
        )
        models.append(bitwright.load_model(tmp_path / format))
    for name, shape in models[0].linear_shapes().items():
        np.testing.assert_array_equal(*(model.weight(name, shape) for model in models))


def test_the_method_also_runs_on_calibration_text(tmp_path: Path) -> None:
    report = bitwright.quantize(
        DEMO,
        tmp_path / "out",
        method="salient",
        format="awq",
        group_size=32,
        calibration=TEXT,
        samples=8,
        length=128,
        progress=False,
    )
    assert max(layer.error for layer in report.layers) < 0.05


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_other_methods_take_a_file_too(tmp_path: Path, activations_file: Path, method: Any) -> None:
    report = bitwright.quantize(
        DEMO, tmp_path / "out", method=method, activations=activations_file, progress=False
    )
    assert len(report.layers) == 22


def broken_files(folder: Path, good: Path) -> dict[str, Path]:
    """Files that must be refused, by a word of the message."""
    with np.load(good) as file:
        arrays = dict(file)
    first = "model.layers.0.self_attn.q_proj"
    down = "model.layers.0.mlp.down_proj"
    made = {}

    def save(word: str, **changes: Any) -> None:
        made[word] = folder / f"{len(made)}.npz"
        kept = {key: each for key, each in {**arrays, **changes}.items() if each is not None}
        np.savez(made[word], **kept)

    save("has no activations of layer model.layers.0.mlp.down_proj; it has", **{down: None})
    save("needs floats", **{first: arrays[first][:, :, 1:]})
    save("are NaN or infinite", **{first: arrays[first] * np.inf})
    save("all zero", **{first: np.zeros_like(arrays[first])})
    save("pickled", **{first: np.array([{"a": 1}], object)})
    made["not an .npz"] = folder / "text.npz"
    made["not an .npz"].write_text("hello")
    made["single array"] = folder / "single.npz"
    np.save(folder / "single.npy", np.ones(3))
    (folder / "single.npy").rename(made["single array"])
    made["cannot be read"] = folder / "absent.npz"
    made["damaged"] = folder / "damaged.npz"
    content = bytearray(good.read_bytes())
    content[2000:2100] = b"\xff" * 100
    made["damaged"].write_bytes(content)
    return made


def test_broken_files_are_named(tmp_path: Path, activations_file: Path) -> None:
    (tmp_path / "files").mkdir()
    for word, path in broken_files(tmp_path / "files", activations_file).items():
        with pytest.raises((bitwright.CalibrationError, bitwright.NonFiniteError)) as caught:
            bitwright.awq_quantize_model(DEMO, tmp_path / "out", path, 32, verbose=False)
        assert word in str(caught.value)
        assert path.name in str(caught.value)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bits": 3}, "4 bits"),
        ({"salient_ratio": -0.1}, "salient_ratio"),
        ({"activation_method": "median"}, "activation_method"),
        (
            {"activation_method": "max", "activations": None, "calibration": TEXT},
            "activation_method",
        ),
        ({"calibration": TEXT}, "one of the two"),
        ({"method": "awq"}, "activations"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, activations_file: Path, options: dict[str, Any], word: str
) -> None:
    defaults: dict[str, Any] = {"method": "salient", "activations": activations_file}
    with pytest.raises(ValueError, match=word):
        bitwright.quantize(DEMO, tmp_path / "out", progress=False, **{**defaults, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["awq", "mlx", "gptq"])
def test_layers_can_be_left_out(tmp_path: Path, activations_file: Path, format: Any) -> None:
    """As messages about layers that do not fit say."""
    report = bitwright.awq_quantize_model(
        *(DEMO, tmp_path / "out", activations_file, 32),
        format=format,
        exclude=["*.down_proj", "*.0.self_attn.[qkv]_proj"],
        verbose=False,
    )
    names = {layer.name for layer in report.layers}
    assert "model.layers.0.self_attn.o_proj" in names
    assert "model.layers.1.self_attn.q_proj" in names
    assert not any(name.endswith("down_proj") for name in names)
    assert "model.layers.0.self_attn.q_proj" not in names


def test_layers_can_have_other_groups(tmp_path: Path, activations_file: Path) -> None:
    report = bitwright.awq_quantize_model(
        *(DEMO, tmp_path / "out", activations_file, 32),
        format="mlx",
        overrides={"*.o_proj": {"group_size": 64}},
        verbose=False,
    )
    for layer in report.layers:
        assert layer.group_size == (64 if layer.name.endswith("o_proj") else 32)


def test_what_vllm_computes_as_one_is_left_out_as_one(
    tmp_path: Path, activations_file: Path
) -> None:
    given = {"exclude": ["*.q_proj"], "verbose": False}
    with pytest.raises(ValueError, match="--allow-unfused"):
        bitwright.awq_quantize_model(DEMO, tmp_path / "out", activations_file, 32, **given)
    assert not list(tmp_path.iterdir())
    report = bitwright.awq_quantize_model(
        DEMO, tmp_path / "out", activations_file, 32, allow_unfused=True, **given
    )
    assert not any(layer.name.endswith("q_proj") for layer in report.layers)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    def salient(*arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "bitwright", "salient", str(DEMO)),
                *("--activations", str(tmp_path / "a.npz"), *arguments),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    calibration = ("--calibration", str(TEXT), "--samples", "4", "--length", "64")
    assert "--calibration" in salient("--dry-run", status=2)
    assert "--out" in salient(*calibration, status=2)
    salient("--dry-run", *calibration, "--out", str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert zipfile.is_zipfile(tmp_path / "a.npz")
    assert "exists" in salient("--dry-run", *calibration, status=1)
    shown = salient(
        *("--out", str(tmp_path / "out"), "--group-size", "32", "--salient-ratio", "0.02"),
        *("--exclude", "*.down_proj"),
    )
    assert "bits per weight" in shown
    assert "down_proj" not in shown
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"


@pytest.mark.parametrize("content", [["lock"], ["lock", "scratch/0"], ["lock", "last"]], ids=str)
def test_activations_that_are_there_leave_no_work(tmp_path: Path, content: list[str]) -> None:
    """Of a run that was killed at its very end."""
    out, work = tmp_path / "a.npz", tmp_path / ".a.npz.work"
    out.write_bytes(b"all")
    for name in content:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        moved = "activations.npz"
        last = f"{moved}\0{zlib.crc32(moved.encode())}"
        (work / name).write_text(last if name == "last" else "")
    with pytest.raises(bitwright.OutputExistsError):
        bitwright.collect_activations(DEMO, out, TEXT, samples=1, length=16)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert out.read_bytes() == b"all"
