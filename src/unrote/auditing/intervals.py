"""95 % intervals: of fractions (Wilson), of estimates with a known spread (normal, jackknife), of means (bootstrap)."""

from typing import Any

import numpy as np

Z = 1.959964  # the 97.5 % point of the standard normal
RESAMPLED_AT_ONCE = 1 << 22  # values drawn at a time


def wilson_interval(count: float, total: int, z: float = Z) -> tuple[float, float]:
    """The 95 % score interval of a fraction (Wilson 1927); (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    fraction, spread = count / total, z * z / total
    centre = (fraction + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (fraction * (1 - fraction) / total + spread / (4 * total)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def fraction(count: float, total: int) -> dict[str, Any]:
    """``count`` of ``total`` with its 95 % Wilson interval, JSON-able."""
    low, high = wilson_interval(count, total)
    value = count / total if total else 0.0
    return {"count": count, "total": total, "fraction": value, "interval": [low, high]}


def estimate(value: float, spread: float, low: float = -np.inf, high: float = np.inf) -> dict[str, Any]:
    """``value`` with the normal interval of standard error ``spread``, cut to the range of values; JSON-able."""
    interval = [max(low, float(value - Z * spread)), min(high, float(value + Z * spread))]
    return {"value": float(value), "interval": interval}


def squared_estimate(value: float, spread: float, bias: float = 0.0) -> dict[str, Any]:
    """A squared distance with the normal interval of its root, squared; JSON-able.

    Where few directions dominate, the root is much nearer to normal than the square.

    Args:
        value: the squared distance without its ``bias``; their sum is not negative.
        spread: its standard error.
        bias: what was subtracted; the root is taken before that.
    """
    root = max(0.0, float(value + bias)) ** 0.5
    half = Z * (spread / (2 * root) if root > 0 else spread**0.5)
    return {
        "value": float(value),
        "interval": [float(max(0.0, root - half) ** 2 - bias), float((root + half) ** 2 - bias)],
    }


def jackknife_spread(left_out: np.ndarray) -> float:
    """Standard error of a statistic from its values [n] with each sample left out once (Tukey 1958).

    Its expectation is not below the variance (Efron & Stein 1981), and unlike a bootstrap it never repeats a sample:
    a repeated sample is its own nearest neighbour, and lowers the rank of a covariance.
    """
    n = len(left_out)
    return float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()))


def mean_spread(values: np.ndarray) -> float:
    """Standard error of the mean of values [n], n ≥ 2."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def bootstrap_mean(values: np.ndarray, num_resamples: int, seed: int) -> dict[str, Any]:
    """The mean of values [n] with its percentile bootstrap interval (Efron 1979), the same for the same seed."""
    random = np.random.default_rng(seed)
    step = max(1, RESAMPLED_AT_ONCE // len(values))
    means = [
        values[random.integers(0, len(values), (min(step, num_resamples - start), len(values)))].mean(1)
        for start in range(0, num_resamples, step)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return {"value": float(values.mean()), "interval": [float(low), float(high)]}


def exceeding(rate: float, count: int) -> int:
    """How many of ``count`` values may exceed a threshold at a false-positive ``rate``: the product's whole part."""
    return int(rate * count + 1e-9)  # 0.29 · 100 must not become 28


def threshold_at(values: np.ndarray, rate: float) -> float:
    """The least of ``values`` [n] that at most the share ``rate`` of them exceeds; -inf if all may."""
    allowed = exceeding(rate, len(values))
    return float(np.sort(values)[::-1][allowed]) if allowed < len(values) else -np.inf
