"""Rotary embeddings, against numbers from transformers 5.23 (torch 2.13, float32)."""

import math

import numpy as np
import pytest

from bitwright.errors import CheckpointError
from bitwright.models.config import RopeConfig
from bitwright.models.rope import rope_frequencies, rope_tables

# head_dim 32, max_position_embeddings 256: frequencies of pairs 1, 5, 9, 15; the attention
# factor; cosines and sines of pairs 0, 3, 8, 15 at position 299.
GOLDEN = [
    (
        RopeConfig(),
        [0.5623413324356079, 0.05623412877321243, 0.005623413249850273, 0.00017782794020604342],
        1.0,
        [-0.8532043695449829, -0.9721593260765076, -0.9885318279266357, 0.9985867738723755],
        [-0.5215767025947571, 0.23432093858718872, 0.15101270377635956, 0.053145505487918854],
    ),
    (
        RopeConfig(theta=500000.0),
        [0.44036662578582764, 0.016560440883040428, 0.0006227724370546639, 4.541670477919979e-06],
        1.0,
        [-0.8532043695449829, 0.920674204826355, 0.9119231700897217, 0.9999991059303284],
        [-0.5215767025947571, 0.3903319835662842, 0.4103609621524811, 0.0013579590013250709],
    ),
    (
        RopeConfig(rope_type="linear", factor=4.0),
        [0.14058533310890198, 0.014058532193303108, 0.0014058533124625683, 4.4456985051510856e-05],
        1.0,
        [0.7971575260162354, 0.747657835483551, 0.7333906888961792, 0.9999116659164429],
        [-0.6037713289260864, 0.6640841364860535, 0.6798074245452881, 0.01329224742949009],
    ),
    (
        RopeConfig(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
            theta=50000.0,
        ),
        [0.5085274577140808, 0.0042509096674621105, 0.0002842754765879363, 4.916155830869684e-06],
        1.0,
        [-0.8532043695449829, -0.8160548806190491, 0.9860635995864868, 0.999998927116394],
        [-0.5215767025947571, 0.5779743790626526, 0.16636888682842255, 0.0014699300518259406],
    ),
    (
        RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
        [0.47799012064933777, 0.014058532193303108, 0.0014058533124625683, 4.4456985051510856e-05],
        1.138629436111989,
        [-0.971483588218689, -0.6441633701324463, 0.8350602388381958, 1.138528823852539],
        [-0.5938825607299805, -0.9388985633850098, 0.7740487456321716, 0.015134944580495358],
    ),
    (
        RopeConfig(
            rope_type="yarn",
            factor=40.0,
            original_max_position_embeddings=4096,
            mscale=1.0,
            mscale_all_dim=0.707,
        ),
        [0.5623413324356079, 0.05623412877321243, 0.0024903686717152596, 4.445698323252145e-06],
        1.0857263992561355,
        [-0.926346480846405, -1.0554990768432617, -0.18348316848278046, 1.0857254266738892],
        [-0.5662896037101746, 0.25440841913223267, 1.0701102018356323, 0.0014432163443416357],
    ),
    (
        RopeConfig(
            rope_type="yarn",
            factor=40.0,
            original_max_position_embeddings=4096,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
        [0.5623413324356079, 0.05623412877321243, 0.0024903686717152596, 4.445698323252145e-06],
        1.0,
        [-0.8532043695449829, -0.9721593260765076, -0.16899576783180237, 0.9999991059303284],
        [-0.5215767025947571, 0.23432093858718872, 0.9856168031692505, 0.0013292634394019842],
    ),
    (
        RopeConfig(
            rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=0.707
        ),
        [0.5623413324356079, 0.05623412877321243, 0.0024903686717152596, 4.445698323252145e-06],
        1.3688879454113936,
        [-1.1679410934448242, -1.3307771682739258, -0.23133626580238342, 1.3688867092132568],
        [-0.7139800190925598, 0.3207590878009796, 1.3491989374160767, 0.0018196126911789179],
    ),
    (
        RopeConfig(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=0.75
        ),
        [0.47799012064933777, 0.014058532193303108, 0.0014058533124625683, 4.4456985051510856e-05],
        0.75,
        [-0.6399033069610596, -0.42430180311203003, 0.550042986869812, 0.7499337196350098],
        [-0.391182541847229, -0.6184399127960205, 0.5098555684089661, 0.009969186037778854],
    ),
    (
        RopeConfig(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=4096,
            truncate=False,
            beta_fast=16.0,
            beta_slow=2.0,
            theta=1000000.0,
        ),
        [0.4216965138912201, 0.010401098057627678, 0.00010542412201175466, 5.928434347879374e-07],
        1.138629436111989,
        [-0.971483588218689, -1.034649133682251, 1.1354498863220215, 1.13862943649292],
        [-0.5938825607299805, -0.4753716289997101, 0.08503331243991852, 0.0002018336672335863],
    ),
    (
        RopeConfig(rope_type="yarn", factor=4.0),
        [0.5020904541015625, 0.026108700782060623, 0.0014058533124625683, 4.4456985051510856e-05],
        1.138629436111989,
        [-0.971483588218689, -0.054972629994153976, 0.8350602388381958, 1.138528823852539],
        [-0.5938825607299805, -1.1373015642166138, 0.7740487456321716, 0.015134944580495358],
    ),
    (
        RopeConfig(rope_type="yarn", factor=2.0, original_max_position_embeddings=4),
        [0.28117066621780396, 0.028117064386606216, 0.0028117066249251366, 8.891397010302171e-05],
        1.0693147180559945,
        [-0.9123439788818359, 0.1261626034975052, 0.08097253739833832, 1.068936824798584],
        [-0.5577296614646912, 1.0618460178375244, 1.0662446022033691, 0.02842468023300171],
    ),
]


@pytest.mark.parametrize(("rope", "frequencies", "factor", "cosines", "sines"), GOLDEN)
def test_agrees_with_transformers(
    rope: RopeConfig,
    frequencies: list[float],
    factor: float,
    cosines: list[float],
    sines: list[float],
) -> None:
    computed, computed_factor = rope_frequencies(rope, 32, 256)
    assert computed.dtype == np.float64
    # One unit in the last place is allowed for another processor's powers.
    np.testing.assert_allclose(computed[[1, 5, 9, 15]], frequencies, rtol=1.2e-7)
    assert computed_factor == factor
    tables = rope_tables(rope, 32, 300, 256)
    for table, expected in zip(tables, (cosines, sines), strict=True):
        assert table.dtype == np.float32
        assert table.shape == (300, 16)
        assert table.flags.c_contiguous
        np.testing.assert_allclose(table[299, [0, 3, 8, 15]], expected, rtol=0, atol=5e-6)


def test_llama3_changes_only_long_wavelengths() -> None:
    rope = RopeConfig("llama3", 500000.0, 32.0, 1.0, 4.0, 8192)
    plain, _ = rope_frequencies(RopeConfig(theta=500000.0), 128, 131072)
    scaled, _ = rope_frequencies(rope, 128, 131072)
    wavelengths = 2 * math.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 2048], plain[wavelengths < 2048])
    long = wavelengths > 8192
    np.testing.assert_allclose(scaled[long], plain[long] / 32, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()


def test_the_first_position_is_not_turned() -> None:
    cosines, sines = rope_tables(RopeConfig(), 64, 2, 2048)
    np.testing.assert_array_equal(cosines[0], 1)
    np.testing.assert_array_equal(sines[0], 0)
    np.testing.assert_allclose(cosines**2 + sines**2, 1, rtol=1e-6)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig("linear", factor=1e-39),
        RopeConfig("yarn", factor=1e-39),
        RopeConfig("llama3", factor=2.0),
    ],
)
def test_parameters_that_give_no_frequencies(rope: RopeConfig) -> None:
    with pytest.raises(CheckpointError):
        rope_frequencies(rope, 64, 2048)
