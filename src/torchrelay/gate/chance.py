"""What chance explains: exact tests and intervals for counts and means, from scipy.special.

scipy.special alone, since scipy.stats takes a second to import and twice the memory.
"""

import math
from collections.abc import Sequence

from torchrelay.gate.judging import binary, normal, wilson


def at_least(count: int, of: int, share: float) -> float:
    """Chance of `count` or more out of `of`, where each happens with the chance `share`: the exact binomial test."""
    from scipy.special import bdtrc

    return 1.0 if count <= 0 else float(bdtrc(count - 1, of, share))


def share_interval(count: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a share (Clopper and Pearson, Biometrika 26, 1934, 404-413); `of` is not 0."""
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = float(betaincinv(count, of - count + 1, tail)) if count else 0.0
    high = float(betaincinv(count + 1, of - count, 1 - tail)) if count < of else 1.0
    return low, high


def student(probability: float, freedom: int) -> float:
    """The quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, probability))


def mean_interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean: Wilson's for scores of 0 and 1, else Student's; one such score has none."""
    from statistics import fmean, stdev

    n = len(scores)
    if binary(scores):
        return wilson(int(sum(scores)), n, normal(0.975))
    if n < 2:
        return None
    centre, half = fmean(scores), student(0.975, n - 1) * stdev(scores) / math.sqrt(n)
    return centre - half, centre + half
