"""The bins of a quantile sketch with 1% relative error (DDSketch, VLDB 2019), as arrays.

A bin has a code: an integer that grows with the values in it. Code 0 holds zero; positive codes
hold positive values between two powers of gamma; negative codes mirror them. So sketches are
merged by adding the counts of equal codes, and read in the order of codes.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RELATIVE_ERROR: Final = 0.01
"""How far a quantile may be from the true value, as a share of it."""
SMALLEST: Final = 1e-12
"""Values nearer to zero than this are zero."""
CODE_SPAN: Final = 1 << 17
"""Codes are between minus and plus half of this, whatever the finite value."""

_GAMMA: Final = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GAMMA: Final = math.log(_GAMMA)
_OFFSET: Final = 1 - math.ceil(math.log(SMALLEST) / _LOG_GAMMA)


def codes_of(values: Floats) -> Ints:
    """The bins of finite values."""
    sizes = np.abs(values)
    codes = np.ceil(np.log(np.maximum(sizes, SMALLEST)) / _LOG_GAMMA).astype(np.int64) + _OFFSET
    return np.where(sizes < SMALLEST, 0, np.where(values < 0, -codes, codes))


def middles_of(codes: Ints) -> Floats:
    """The value that stands for a bin: within 1% of all that are in it."""
    exponents = (np.abs(codes) - _OFFSET) * _LOG_GAMMA + math.log(2 / (_GAMMA + 1))
    with np.errstate(over="ignore"):
        sizes = np.minimum(np.exp(exponents), np.finfo(np.float64).max)
    return np.sign(codes) * np.where(codes == 0, 0.0, sizes)


def quantiles_of(codes: Ints, counts: Ints, edges: Ints, quantiles: Floats) -> Floats:
    """The values at quantiles of sketches that stand behind one another.

    Args:
        codes: their bins, ascending within each sketch.
        counts: how many values each bin holds; none holds none.
        edges: sketch i has the bins from ``edges[i]`` to before ``edges[i + 1]``.
        quantiles: which, each from 0 to 1.

    Returns:
        Shape (sketches, quantiles); NaN where a sketch is empty.
    """
    found = np.full((len(edges) - 1, len(quantiles)), math.nan)
    filled = np.flatnonzero(np.diff(edges))
    if not len(filled):
        return found
    # A rank within a sketch, counted from the first bin of all, names a bin of that sketch.
    seen = np.concatenate(([0], np.cumsum(counts)))
    before = seen[edges[filled]][:, None]
    totals = seen[edges[filled + 1]][:, None] - before
    ranks = before + np.floor(quantiles[None, :] * (totals - 1)).astype(np.int64)
    places = np.searchsorted(seen[1:], ranks, side="right")
    found[filled] = middles_of(codes[places])
    return found


def code_of_index(index: int) -> int:
    """The code of the bin of positive values up to gamma to the power of ``index``."""
    return index + _OFFSET
