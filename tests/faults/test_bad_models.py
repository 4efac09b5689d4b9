"""Bad models are stopped as early as they can be known, revert by themselves, and good ones are never refused."""

import random
import time
from contextlib import ExitStack
from typing import Any

import pytest

from production_rig import BAD_MODELS, Matrix, Rig, scaled

pytestmark = pytest.mark.real

ADMISSION, LOADING, SHADOW, CANARY = "admission", "loading", "shadow", "canary"
ONE_CLASS = [{"class": 0, "probabilities": [1.0, 0.0, 0.0, 0.0]}] * 4
EVERY_TIME = (
    *("raises_always", "one_class", "worse_on_one_class"),
    *("served_raises_on_load", "served_exits", "served_random", "served_wrong_keys"),
    "later_raises",
)

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
    "later_exits": CANARY,
}


def shifted(by: int) -> Matrix:
    """Weights of a model that is always wrong in the same way."""
    return [[1.0 if (row + by) % 4 == column else 0.0 for column in range(4)] for row in range(4)]


def noisy(size: float) -> Matrix:
    """Weights of a model that errs now and then."""
    chance = random.Random(3)
    return [[one + chance.uniform(-size, size) for one in row] for row in scaled(1.0)]


def blind(to: int, size: float) -> Matrix:
    """Weights of a model that knows one class less well."""
    return [[one * (size if row == to else 1.0) for one in line] for row, line in enumerate(scaled(1.0))]


WEIGHTS: dict[str, Matrix] = {
    "random_answers": [[random.Random(5 * row + column).gauss(0, 1) for column in range(4)] for row in range(4)],
    "always_wrong": shifted(1),
    "under_the_floor": noisy(0.35),
    "worse_on_one_class": blind(2, 0.5),
}


def bad_models() -> list[Any]:
    names = [*STOPPED_AT, *WEIGHTS]
    slow = [pytest.mark.whole]
    return [pytest.param(name, marks=[] if name in EVERY_TIME else slow) for name in names]


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


def test_the_corpus_is_complete() -> None:
    assert sorted(STOPPED_AT) == sorted(path.stem for path in BAD_MODELS.glob("*.py"))
    assert set(EVERY_TIME) <= {*STOPPED_AT, *WEIGHTS}


@pytest.mark.parametrize("name", bad_models())
def test_a_bad_model_is_stopped_where_it_must_be_and_production_reverts(name: str, rig: Rig, live: str) -> None:
    """Those that are slow: the whole corpus takes five minutes, so only one of each kind runs every time."""
    version = made(rig, name)
    watch = Watch(rig, version)
    with rig.clients().looping() as clients, ExitStack() as turned:
        rig.promote(version)
        if name.startswith("later"):
            rig.await_stage(version, 1)
            turned.enter_context(rig.turned())
        reason = watch.await_refusal()
        rig.await_live(live)
        time.sleep(0.5)
    assert watch.reached == STOPPED_AT.get(name, ADMISSION), reason
    rig.await_told(version, "refusal")
    if watch.reached == CANARY:
        assert len(clients.wrong) + len(clients.failures) <= 0.1 * clients.by_version.total()
        assert len(clients.wrong) <= 0.01 * clients.by_version.total(), clients.wrong[:3]
    else:
        assert not clients.by_version[version]
        assert (clients.wrong, clients.failures) == ([], [])


GOOD = {"a bit off": noisy(0.01), "less sure": scaled(0.5), "surer": scaled(3.0), "as good elsewhere": noisy(0.05)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.whole] if number else []) for number, name in enumerate(GOOD)]
)
def test_a_good_model_is_not_refused(name: str, rig: Rig, live: str) -> None:
    """Slow are all but one, for the same reason as with the bad ones."""
    weights = GOOD[name]
    version = rig.version(weights)
    with rig.clients().looping() as clients:
        rig.promote(version)
        rig.await_live(version)
    rig.await_told(version, "rollout")
    assert (clients.wrong, clients.failures) == ([], [])
    assert set(clients.by_version) == {live, version}


@pytest.mark.whole
def test_after_thirty_bad_models_in_a_row_a_good_one_goes_live(rig: Rig, live: str) -> None:
    """Over a minute, though most are turned down at a glance, since all that is new here is their number."""
    began = len(rig.ledger())
    bad = [rig.version(tags={"torchrelay.verdict": "refuse"}) for _ in range(24)]
    bad += [rig.version(signed_by=None) for _ in range(4)]
    bad += [made(rig, "always_wrong"), made(rig, "served_raises_on_load")]
    with rig.clients().looping() as clients:
        for version in bad:
            rig.promote(version)
            rig.await_refused(version)
        rig.await_live(live)
        good = rig.version(scaled(1.5))
        rig.promote(good)
        rig.await_live(good)
    assert (clients.wrong, clients.failures) == ([], [])
    rig.await_told(good, "rollout")
    told = [(entry.kind, entry.to_version) for entry in rig.ledger()[began:]]
    assert told == [*(("refusal", version) for version in bad), ("rollout", good)]
