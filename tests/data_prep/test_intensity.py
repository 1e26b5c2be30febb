from __future__ import annotations

import numpy as np
import pytest

from data_prep.intensity import channel_statistics, encode_int16, histogram, ranks


def decode(codes: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    return codes.astype(np.float64) * slope + intercept


def test_ct_is_whole_hounsfield_units() -> None:
    values = np.array([[[-1024.4, -0.5, 0.49, 3071.6, 40000.0, -40000.0]]], dtype=np.float32)
    codes, slope, intercept = encode_int16(values, 1.0, 0.0, "CT")
    assert (slope, intercept) == (1.0, 0.0)
    assert codes.ravel().tolist() == [-1024, 0, 0, 3072, 32767, -32768]


def test_ct_slope_is_applied() -> None:
    stored = np.array([[[0, 1024, 4095]]], dtype=np.uint16)
    codes, slope, intercept = encode_int16(stored, 1.0, -1024.0, "CT")
    assert codes.ravel().tolist() == [-1024, 0, 3071]
    assert (slope, intercept) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_mr_integers_that_fit_stay_as_they_are(dtype: str) -> None:
    stored = np.array([[[0, 7, 200]]], dtype=dtype)
    codes, slope, intercept = encode_int16(stored, 0.352, 6.68, "MR")
    assert codes.dtype == np.int16
    assert codes.ravel().tolist() == [0, 7, 200]
    assert (slope, intercept) == (0.352, 6.68)


def test_mr_uint16_is_shifted_without_loss() -> None:
    stored = np.array([[[0, 1, 40000, 65535]]], dtype=np.uint16)
    codes, slope, intercept = encode_int16(stored, 2.0, 5.0, "MR")
    np.testing.assert_allclose(decode(codes, slope, intercept), stored * 2.0 + 5.0, rtol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4, 1e12])
@pytest.mark.parametrize("shift", [0.0, -0.3, 1000.0])
def test_mr_error_is_at_most_half_a_step(scale: float, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = ((rng.gamma(2, 1, (5, 6, 7)) + shift) * scale).astype(np.float32)
    codes, slope, intercept = encode_int16(values, 1.0, 0.0, "MR")
    assert slope == pytest.approx((float(values.max()) - float(values.min())) / 65535)
    error = np.abs(decode(codes, slope, intercept) - values.astype(np.float64)).max()
    assert error <= slope / 2 * (1 + 1e-6)
    assert (codes.min(), codes.max()) == (-32768, 32767)


def test_statistics_equal_numpy_percentiles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = (rng.gamma(2, 300, (9, 10, 11)) - 500).astype(np.int16)
    for slope, intercept in [(1.0, 0.0), (0.25, -3.0), (-2.0, 1.0)]:
        values = decode(codes, slope, intercept)
        found = channel_statistics(codes, slope, intercept)
        low, middle, high = np.percentile(values, [0.5, 50, 99.5])
        clipped = np.clip(values, low, high)
        expected = {
            "min": values.min(),
            "max": values.max(),
            "p0_5": low,
            "p50": middle,
            "p99_5": high,
            "clipped_mean": clipped.mean(),
            "clipped_std": clipped.std(),
        }
        assert found == pytest.approx(expected, rel=1e-9)


def test_ranks_count_distinct_codes() -> None:
    codes = np.array([[[-32768, 5, 5, 32767, 6]]], dtype=np.int16)
    table = ranks(histogram(codes))
    assert [int(table[c + 32768]) for c in (-32768, 5, 6, 32767)] == [0, 1, 2, 3]
