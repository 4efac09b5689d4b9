"""The corpus of bad models, where each must be stopped, and good ones that are not quite the version in service.

Those of tests/bad_models are handlers; the others are weights.
"""

import random
import time

from production_rig import BAD_MODELS, Matrix, Rig, scaled

ADMISSION, LOADING, SHADOW, CANARY = "admission", "loading", "shadow", "canary"
ONE_CLASS = [{"class": 0, "probabilities": [1.0, 0.0, 0.0, 0.0]}] * 4

# Where each must be stopped. The first group is known by what it is, every other one only where it serves.
STOPPED_AT = {
    "fails_to_import": ADMISSION,
    "raises_on_load": ADMISSION,
    "exits_on_load": ADMISSION,
    "raises_always": ADMISSION,
    "raises_on_some": ADMISSION,
    "returns_nan": ADMISSION,
    "wrong_shape": ADMISSION,
    "wrong_keys": ADMISSION,
    "one_class": ADMISSION,
    "too_slow": ADMISSION,
    "served_raises_on_load": LOADING,
    "served_exits_on_load": LOADING,
    "served_hangs_on_load": LOADING,
    "served_differs": LOADING,
    "served_raises": SHADOW,
    "served_raises_on_some": SHADOW,
    "served_exits": SHADOW,
    "served_hangs": SHADOW,
    "served_slow": SHADOW,
    "served_nan": SHADOW,
    "served_wrong_shape": SHADOW,
    "served_wrong_keys": SHADOW,
    "served_more_keys": SHADOW,
    "served_one_class": SHADOW,
    "served_random": SHADOW,
    "served_too_few": SHADOW,
    "served_leaks": SHADOW,
    "later_raises": CANARY,
    "later_slow": CANARY,
    "later_one_class": CANARY,
    "later_exits": CANARY,
}


def shifted(by: int) -> Matrix:
    """Weights of a model that is always wrong in the same way."""
    return [[1.0 if (row + by) % 4 == column else 0.0 for column in range(4)] for row in range(4)]


def noisy(size: float, seed: int = 3, factor: float = 1.0) -> Matrix:
    """Weights of a model that errs now and then."""
    chance = random.Random(seed)
    return [[one + chance.uniform(-size, size) for one in row] for row in scaled(factor)]


def blind(to: int, size: float) -> Matrix:
    """Weights of a model that knows one class less well."""
    return [[one * (size if row == to else 1.0) for one in line] for row, line in enumerate(scaled(1.0))]


WEIGHTS: dict[str, Matrix] = {
    "random_answers": [[random.Random(5 * row + column).gauss(0, 1) for column in range(4)] for row in range(4)],
    "always_wrong": shifted(1),
    "under_the_floor": noisy(0.35),
    "worse_on_one_class": blind(2, 0.5),
}


def made(rig: Rig, name: str) -> str:
    if name in WEIGHTS:
        return rig.version(WEIGHTS[name])
    return rig.version(handler=BAD_MODELS / f"{name}.py", golden=ONE_CLASS if name == "one_class" else None)


class Watch:
    """How far a version came."""

    def __init__(self, rig: Rig, version: str) -> None:
        self.rig, self.version, self.reached = rig, version, ADMISSION

    def await_refusal(self, seconds: float = 90) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = self.rig.state
            if state.rollout and state.rollout.wanted.version == self.version:
                stage = state.rollout.stage
                self.reached = LOADING if stage < 0 else SHADOW if stage == 0 else CANARY
                assert stage < len(state.rollout.weights), f"it gets all requests\n{self.rig.story()}"
            elif state.refused and state.refused.version == self.version:
                return state.refused.reason
            time.sleep(0.02)
        raise AssertionError(f"version {self.version} was not refused\n{self.rig.story()}")


GOOD = {"a bit off": noisy(0.01), "less sure": scaled(0.5), "surer": scaled(3.0), "as good elsewhere": noisy(0.05)}
