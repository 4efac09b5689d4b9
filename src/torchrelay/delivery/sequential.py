"""Tests that may be looked at after every poll: is a share of bad requests larger than it may be?

Each test is an *e-process*: capital that starts at 1 and is bet, poll by poll, against the null hypothesis that the
candidate keeps its rule. While it does, the capital is not expected to grow, so that by Ville's inequality (1939) the
chance that it EVER reaches 1/alpha is at most alpha, however often and whenever one looks. Where the rule is broken,
it grows exponentially with the number of requests.

- One sample, `exceeds_limit`: betting against "the rate is at most `limit`" (Waudby-Smith and Ramdas, Estimating means
  of bounded random variables by betting, JRSS B 86, 2024), a mixture over bets of several sizes.
- Two samples, `exceeds_live`: the E-variable of Turner, Ly and Grünwald (Generic E-variables for exact sequential
  k-sample tests that allow for optional stopping, JSPI 230, 2024) for the null "candidate's rate - live rate is at
  most `excess`", a half plane as in Turner and Grünwald (Exact anytime-valid confidence intervals for contingency
  tables and beyond, Statistics & Probability Letters 198, 2023), written as a bet on each request.
- A candidate may turn bad late: part of the capital waits, and 1/(j (j+1)) of it is first bet in round j.

What the guarantee rests on: requests of one round are independent of each other given their rates. Rates may be
others in every round, and even from request to request: rounds compare means, so that an outage that hits both
versions alike stops nobody, where counts pooled over a change of the traffic's split would (Simpson's paradox).
Everything is a function of the counts alone, in logarithms, with nothing random in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

UNSEEN_EXCESS = 0.01
"""Least excess over a live version of which no request was seen: its rate is then taken to be 0."""

_REACHES = (0.02, 0.05, 0.12, 0.3, 0.65, 0.98)
"""The rates bet on, as the part of the way from the largest allowed rate to 1; spaced as the odds of real defects."""
_LIVE_GUESS = (0.2, 20.0)
"""Bad requests and requests that the guess of the live rate starts from, before any are seen."""
_BISECTIONS = 16
_BELOW_ONE = 1 - 1e-9


@dataclass(frozen=True, slots=True)
class Sample:
    """How many requests there were, and how many of them were bad."""

    n: int = 0
    bad: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bad <= self.n:
            raise ValueError(f"{self.bad} bad of {self.n} requests")

    def __add__(self, other: "Sample") -> "Sample":
        return Sample(self.n + other.n, self.bad + other.bad)


Pair = tuple[Sample, Sample]
"""The candidate's requests and the live version's, of the same poll."""


def exceeds_limit(samples: Sequence[Sample], limit: float) -> list[float]:
    """The log e-process against "the rate of bad requests is at most `limit`", after each of the samples.

    While each request is bad with a probability of at most `limit`, whatever came before it, the chance that any of
    these values ever reaches log(1/alpha) is at most alpha. A limit of 0 is broken for certain by one bad request.
    """
    if limit <= 0:
        return [math.inf if bad else 0.0 for bad in accumulate(sample.bad for sample in samples)]
    capital, process = _Capital(), []
    for sample in samples:
        if sample.n and limit < _BELOW_ONE:
            capital.settle([_won(sample, _stake(rate, limit), limit) for rate in _rates(limit)])
        process.append(capital.log)
    return process


def exceeds_live(pairs: Sequence[Pair], excess: float) -> list[float]:
    """The log e-process against "the candidate's rate is at most the live one plus `excess`", after each pair.

    While in every round the mean rate of the candidate's requests is at most `excess` above that of the live
    version's, the chance that any of these values ever reaches log(1/alpha) is at most alpha. Polls are put together
    into rounds until both versions had requests. Until the live version's first request there is nothing to compare
    with: half of the capital is then bet as if its rate were 0, with an excess of at least UNSEEN_EXCESS, and the
    guarantee is for candidates that keep that too.
    """
    before = [candidate for candidate, _ in takewhile(lambda pair: not pair[1].n, pairs)]
    compared = _compared(pairs, excess)
    if not any(candidate.n for candidate in before):
        return compared
    alone = exceeds_limit(before, max(excess, UNSEEN_EXCESS))
    alone += alone[-1:] * (len(pairs) - len(alone))
    return [_log_sum((one, other)) - math.log(2) for one, other in zip(alone, compared, strict=True)]


def crossing(process: Sequence[float], alpha: float) -> int | None:
    """The index of the first value that reaches log(1/alpha), or None: when a test at level `alpha` stops."""
    return next((index for index, value in enumerate(process) if value >= -math.log(alpha)), None)


def _compared(pairs: Sequence[Pair], excess: float) -> list[float]:
    """The two-sample process alone, which stays at 0 until both versions had requests."""
    capital, process = _Capital(), []
    candidate = live = seen = Sample()
    for more, live_more in pairs:
        candidate, live = candidate + more, live + live_more
        if candidate.n and live.n:
            capital.settle(_round(candidate, live, _guess(seen), excess))
            candidate, live, seen = Sample(), Sample(), seen + live
        process.append(capital.log)
    return process


class _Capital:
    """Capital spread over the rates bet on and over the rounds in which betting starts, in logarithms."""

    def __init__(self) -> None:
        self.log = 0.0
        self._rounds = 0
        self._bets = [-math.inf] * len(_REACHES)

    def settle(self, won: Sequence[float]) -> None:
        """Put this round's part of the waiting capital on each bet, then multiply it by exp(`won`)."""
        self._rounds += 1
        fresh = -math.log(self._rounds * (self._rounds + 1) * len(_REACHES))
        self._bets = [_log_sum((bet, fresh)) + gain for bet, gain in zip(self._bets, won, strict=True)]
        self.log = _log_sum((-math.log(self._rounds + 1), *self._bets))


def _round(candidate: Sample, live: Sample, guess: float, excess: float) -> list[float]:
    """Logarithm of what each bet wins in one round; nothing where no rate above the largest allowed one is left."""
    if guess + excess >= _BELOW_ONE:
        return [0.0] * len(_REACHES)
    return [_bet(candidate, live, guess, rate, excess) for rate in _rates(guess + excess)]


def _bet(candidate: Sample, live: Sample, guess: float, rate: float, excess: float) -> float:
    """Logarithm of what one round wins by a bet on rates of `guess` and `rate`, from `excess` above each other.

    With b staked on each of the candidate's n requests and -b n/m on each of the live version's m, the expected win
    is at most the n+m-th power of 1 + b n/(n+m) (mean rate - mean live rate - excess), by the inequality of the means:
    at most 1 under the null, for every b >= 0 and every point. The best of them is where the null comes closest to
    the rates bet on.
    """
    point = _closest(candidate.n, live.n, guess, rate, excess)
    allowed, ratio = point + excess, candidate.n / live.n
    stake = min(_stake(rate, allowed), _BELOW_ONE / (ratio * (1 - point)))
    return _won(candidate, stake, allowed) + _won(live, -ratio * stake, point)


def _closest(n: int, m: int, guess: float, rate: float, excess: float) -> float:
    """The live rate at which n KL(rate, live rate + excess) + m KL(guess, live rate) is least, by bisection."""
    low, high = guess, rate - excess
    for _ in range(_BISECTIONS):
        point = (low + high) / 2
        above = point + excess
        if m * (point - guess) * above * (1 - above) + n * (above - rate) * point * (1 - point) < 0:
            low = point
        else:
            high = point
    return (low + high) / 2


def _won(sample: Sample, stake: float, rate: float) -> float:
    """Logarithm of the product of 1 + stake (x - rate) over the sample, x being 1 for bad requests, 0 for others."""
    return sample.bad * math.log1p(stake * (1 - rate)) + (sample.n - sample.bad) * math.log1p(-stake * rate)


def _stake(rate: float, allowed: float) -> float:
    """The stake that wins most when `rate` is true: that of the likelihood ratio to `allowed` (Kelly)."""
    return (rate - allowed) / (allowed * (1 - allowed))


def _rates(allowed: float) -> list[float]:
    return [allowed + (1 - allowed) * reach for reach in _REACHES]


def _guess(seen: Sample) -> float:
    """The live rate to bet on in the next round, from the rounds before it."""
    return (seen.bad + _LIVE_GUESS[0]) / (seen.n + _LIVE_GUESS[1])


def _log_sum(logs: Sequence[float]) -> float:
    """log(sum(exp(logs))), of at least one finite or infinite value."""
    largest = max(logs)
    if math.isinf(largest):
        return largest
    return largest + math.log(sum(math.exp(value - largest) for value in logs))
