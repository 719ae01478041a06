"""One uniform number for each (seed, counter): what makes a seeded request repeatable in any batch.

A counter-based generator has no state to keep, move or restore: the draw for a request's n-th token depends on nothing
but the request's seed and n.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Float64 numbers in [0, 1), multiples of 2⁻⁵³, for uint64 seeds and non-negative counters of the same shape.

    The seed is mixed first, so that neighbouring seeds do not walk through the same sequence one step apart.
    """
    bits = _mix(_mix(seeds + _GOLDEN) + _GOLDEN * (counters.astype(np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
