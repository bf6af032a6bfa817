"""Whether two models differ: a test and an interval of paired differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Signs that are drawn where there are more of them than this.
FLIPS = 10_000
# Rows of signs in memory at once.
CHUNK = 100
TEST = "two-sided sign-flip permutation test of the mean; all signs of up to 13 rows, else 10,000 drawn from seed 0"


class Paired(NamedTuple):
    """Of n differences: their mean and its standard error, the 95% interval of the mean by Student's t, and the
    probability of a mean as far from 0 where each difference is as likely to be negative.

    All are NaN where they do not exist: of no differences, and the error and the interval of one.
    """

    rows: int
    mean: float
    standard_error: float
    interval: tuple[float, float]
    p_value: float


def paired(differences: Sequence[float]) -> Paired:
    """Computed in fp64."""
    d = np.asarray(differences, np.float64)
    n = len(d)
    if not n:
        return Paired(0, math.nan, math.nan, (math.nan, math.nan), math.nan)
    mean = float(d.mean())
    error = float(d.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    reach = t_quantile(n - 1) * error if n > 1 else math.nan
    return Paired(n, mean, error, (mean - reach, mean + reach), sign_flip_p_value(d))


def sign_flip_p_value(d: np.ndarray) -> float:
    """Fisher's permutation test: the share of the signs of d [n] under which its sum is at least as far from 0.

    Of drawn signs, the observed ones count as one more, so that the test is exact (Phipson and Smyth 2010).
    """
    if not np.isfinite(d).all():
        return math.nan
    # sums in another order round differently, and equal ones must count
    observed = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if 2 ** len(d) <= FLIPS:
        bits = np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ d) >= observed))
    draw = np.random.default_rng(0)
    farther = 0
    for _ in range(FLIPS // CHUNK):
        signs = 2 * draw.integers(0, 2, (CHUNK, len(d)), np.int8) - 1
        farther += int(np.sum(np.abs(signs @ d) >= observed))
    return (1 + farther) / (1 + FLIPS)


def t_quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t, by integrating its density."""
    # one degree of freedom, the widest, has 12.706
    x = np.linspace(0, 13, 130_001)
    constant = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    density = np.exp(constant - (degrees + 1) / 2 * np.log1p(x * x / degrees))
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2) * x[1]])
    return float(np.interp(0.475, mass, x))
