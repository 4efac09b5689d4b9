"""What may go and what stays: nothing of the rollback window ever goes, whatever the state."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.retention_rig import NODES, OLD, VERSIONS, FakeTracking, Rig, archive, digest, environment, rig, wanted
from torchrelay import config
from torchrelay.cli import gc as cli_gc
from torchrelay.config import Retention, write_json
from torchrelay.delivery import reach, survey
from torchrelay.delivery import sweep as sweeping
from torchrelay.delivery.retention import Fate, Kind, Thing, Window, plan
from torchrelay.delivery.store import Rollout, Served, State
from torchrelay.delivery.survey import Survey
from torchrelay.delivery.sweep import sweep
from torchrelay.errors import ServingError
from torchrelay.handover import ArchiveRecord, RoutedVersion

NOW = time.time()
GREEDY = Retention(archives=0, refused_days=0, evaluations_days=0, environments_days=0, logs_days=0)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    yield rig(tmp_path / "site", monkeypatch)
    config.settings.cache_clear()


# The plan


KINDS: tuple[Kind, ...] = ("version", "archive", "evaluation", "environment", "refused archive", "predictions", "log")


@st.composite
def things(draw: st.DrawFn) -> Thing:
    version = draw(st.sampled_from(VERSIONS))
    return Thing(
        kind=draw(st.sampled_from(KINDS)),
        name=version,
        where=draw(st.sampled_from(["dev-1", "production-1"])),
        changed=NOW - draw(st.floats(0, 100)) * 86400,
        component=draw(st.sampled_from(["tiny", "other", ""])),
        version=version,
        digest=digest(version),
        environment=environment(version),
        running=draw(st.booleans()),
    )


@st.composite
def windows(draw: st.DrawFn) -> Window:
    chosen = st.dictionaries(st.sampled_from(VERSIONS), st.just("live"))
    return Window(
        digests={digest(version): why for version, why in draw(chosen).items()},
        versions={f"tiny@{version}": why for version, why in draw(chosen).items()},
        environments={environment(version): why for version, why in draw(chosen).items()},
        unknown=draw(st.sampled_from(["", "a broken file"])),
        registry=draw(st.booleans()),
    )


@st.composite
def policies(draw: st.DrawFn) -> Retention:
    days = st.floats(0, 50)
    return Retention(
        versions=draw(st.none() | st.integers(1, 5)),
        archives=draw(st.integers(0, 5)),
        refused_days=draw(days),
        evaluations_days=draw(days),
        environments_days=draw(days),
        predictions_days=draw(days),
        logs_days=draw(days),
    )


@examples(max_examples=300, deadline=None)
@given(found=st.lists(things(), max_size=30), window=windows(), policy=policies())
def test_nothing_of_the_window_is_planned_for_deletion(found: list[Thing], window: Window, policy: Retention) -> None:
    fates = plan(found, window, policy, NOW)
    assert [one.thing for one in fates] == found
    assert all(one.why for one in fates)
    staying = {one.thing.environment for one in fates if one.thing.kind == "archive" and not one.goes}
    for thing in (one.thing for one in fates if one.goes):
        assert not thing.running
        if thing.kind in ("version", "archive", "evaluation", "environment"):
            assert not window.unknown
        if thing.kind in ("version", "archive", "evaluation"):
            assert thing.digest not in window.digests
            assert f"{thing.component}@{thing.version}" not in window.versions
        if thing.kind == "environment":
            assert thing.environment not in {*window.environments, *staying}
        if thing.kind in ("version", "environment"):
            assert window.registry
        if thing.kind == "version":
            assert policy.versions is not None


def _fates(*found: Thing, window: Window | None = None, **policy: Any) -> list[bool]:
    fates: list[Fate] = plan(found, window or Window(), Retention(**policy), NOW)
    return [one.goes for one in fates]


def _archive(version: str, days: float, where: str = "dev-1", component: str = "tiny") -> Thing:
    changed = NOW - days * 86400
    return Thing(
        kind="archive", name=version, where=where, changed=changed, component=component, version=version,
        digest=digest(version),
    )  # fmt: skip


def test_the_newest_spare_archives_of_each_place_and_component_stay() -> None:
    found = [_archive("1", 3), _archive("2", 2), _archive("3", 1), _archive("1", 9, where="production-1")]
    assert _fates(*found, archives=2) == [True, False, False, False]


def test_what_is_in_the_window_takes_no_spare_place() -> None:
    window = Window(digests={digest("3"): "live"})
    assert _fates(_archive("1", 3), _archive("2", 2), _archive("3", 1), archives=1, window=window) == [
        True,
        False,
        False,
    ]


def test_the_newest_versions_stay_by_their_number_not_by_their_text() -> None:
    found = [
        Thing(kind="version", name=one, where="the registry", component="tiny", version=one)
        for one in ["9", "10", "11"]
    ]
    assert _fates(*found, versions=2) == [True, False, False]


def test_versions_stay_unless_a_setting_says_otherwise() -> None:
    assert _fates(Thing(kind="version", name="1", where="the registry", component="tiny", version="1")) == [False]


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("predictions", "predictions_days"),
        ("log", "logs_days"),
        ("refused archive", "refused_days"),
        ("evaluation", "evaluations_days"),
        ("environment", "environments_days"),
    ],
)
def test_age_counts_where_a_setting_says_days(kind: Kind, setting: str) -> None:
    found = [Thing(kind=kind, name="x", where="x", changed=NOW - days * 86400) for days in (4.9, 5.1)]
    assert _fates(*found, **{setting: 5}) == [False, True]


# The survey and the sweep, on a disk


@st.composite
def situations(draw: st.DrawFn) -> dict[str, Any]:
    """What the perimeters remember, the nodes were told and hold, and the registry says."""
    version = st.sampled_from(VERSIONS)
    few = st.lists(version, max_size=2)
    maybe = st.none() | version
    perimeter = st.fixed_dictionaries(
        {"live": maybe, "underway": maybe, "served": few, "hold": few, "routed": maybe, "placed": maybe}
    )
    nodes = [name for names in NODES.values() for name in names]
    return {
        "memory": draw(st.fixed_dictionaries({name: st.none() | perimeter for name in NODES})),
        "told": draw(st.fixed_dictionaries({name: st.none() | few for name in nodes})),
        "held": draw(st.fixed_dictionaries(dict.fromkeys(nodes, few))),
        "aliases": draw(st.none() | st.dictionaries(st.sampled_from(["dev", "production", "best"]), version)),
        "built": draw(maybe),
    }


def _state(told: dict[str, Any]) -> State:
    live, underway, routed, placed = (told[key] for key in ("live", "underway", "routed", "placed"))
    rollout = underway and Rollout(
        wanted=wanted(underway), kind="rollout", policy="", who="", why="", began=0, stage=0, since=0, weights=()
    )
    return State(
        component="tiny",
        live=live and wanted(live),
        served=tuple(Served(wanted=wanted(one), since=0) for one in told["served"]),
        rollout=rollout or None,
        hold={"production-1": tuple(wanted(one) for one in told["hold"])},
        routes=(RoutedVersion(version=wanted(routed)),) if routed else (),
        placed={f"{placed}@{digest(placed)}": {}} if placed else {},
    )


def _set_up(site: Rig, situation: dict[str, Any]) -> set[str]:
    """Lay the situation out; the versions that may serve again."""
    window: set[str] = set()
    for name, told in situation["memory"].items():
        if told:
            site.remember(name, _state(told))
            window |= {one for key in ("live", "underway", "routed", "placed") if (one := told[key])}
            window |= {*told["served"], *told["hold"]}
    for name, versions in situation["told"].items():
        if versions is not None:
            site.tell(name, versions)
            window |= {*versions}
    site.held = {name: tuple(versions) for name, versions in situation["held"].items()}
    window |= {one for versions in situation["held"].values() for one in versions}
    site.tracking.known = situation["aliases"]
    window |= {*(situation["aliases"] or {}).values()}
    if built := situation["built"]:
        record = ArchiveRecord(
            component="tiny", version=built, digest=digest(built), environment=environment(built), url=""
        )
        write_json(site.root / "results/tiny/archive.json", record)
        window.add(built)
    return window


@examples(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(situation=situations())
def test_a_sweep_leaves_the_window_whole_and_takes_the_rest(
    situation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "site", ignore_errors=True)
    site = rig(tmp_path / "site", monkeypatch)
    window = _set_up(site, situation)
    planned = {(one.thing.path, one.goes) for one in Survey(site.site, GREEDY).plan()}
    swept = sweep(site.site, GREEDY)
    assert not swept.errors
    assert {(one.thing.path, one.goes) for one in (*swept.gone, *swept.kept)} == planned
    for folder in site.archive_folders():
        assert site.there(folder) == window
    environments = {path.name for path in (site.state / "environments").iterdir() if path.is_dir()}
    everything = {environment(version) for version in VERSIONS}
    known = situation["aliases"] is not None
    assert environments == ({environment(version) for version in window} if known else everything)
    assert not site.asides()


def _gone(site: Rig, policy: Retention = GREEDY) -> set[str]:
    return {one.thing.name for one in Survey(site.site, policy).plan() if one.goes}


def test_with_the_defaults_recent_things_stay(site: Rig) -> None:
    (site.node("dev-1") / "predictions/tiny").mkdir(parents=True)
    (site.node("dev-1") / "predictions/tiny/1-1-1-0.jsonl").write_text("{}\n")
    fates = Survey(site.site, Retention()).plan()
    assert not any(one.goes for one in fates if one.thing.kind not in ("archive", "environment"))


def test_a_node_that_cannot_be_asked_keeps_all_that_the_window_may_speak_of(
    site: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(node: Any) -> None:
        raise ServingError("its engine hangs", "an answer", "make status")

    monkeypatch.setattr(reach, "observe_on", silent)
    look = Survey(site.site, GREEDY)
    assert not [one for one in look.plan() if one.goes]
    assert any("its engine hangs" in note for note in look.notes)


@pytest.mark.parametrize("broken", ["desired.json", "control.db"])
def test_a_memory_that_cannot_be_read_keeps_everything(site: Rig, broken: str) -> None:
    file = site.node("production-1") / broken if broken == "desired.json" else site.state / "perimeters/dev" / broken
    file.write_bytes(b"no such thing" * 100)
    look = Survey(site.site, GREEDY)
    assert not [one for one in look.plan() if one.goes]
    assert look.notes


def test_the_registry_being_down_is_said_and_keeps_environments(site: Rig) -> None:
    site.tracking.known = None
    look = Survey(site.site, GREEDY)
    fates = look.plan()
    assert "does not answer" in look.notes[0]
    assert {one.thing.kind for one in fates if one.goes} == {"archive"}


def test_environments_behind_a_link_are_somebody_elses(site: Rig, tmp_path: Path) -> None:
    (site.state / "environments").rename(tmp_path / "theirs")
    (site.state / "environments").symlink_to(tmp_path / "theirs")
    swept = sweep(site.site, GREEDY)
    assert len(list((tmp_path / "theirs").iterdir())) == len({environment(version) for version in VERSIONS})
    assert any("another checkout" in note for note in swept.notes)


def test_an_environment_that_is_being_built_stays(site: Rig) -> None:
    from filelock import FileLock

    building = site.state / "environments" / environment("1")
    with FileLock(building.with_name(f".{building.name}.lock")):
        swept = sweep(site.site, GREEDY)
    assert building.is_dir()
    assert [one.thing.name for one in swept.busy] == [building.name]


def test_what_processes_left_behind_goes_and_what_they_write_stays(site: Rig) -> None:
    folder = site.node("dev-1") / "archives"
    left, mine = folder / f".{digest('1')}.{_dead()}", folder / f".{digest('2')}.{os.getppid()}"
    for path in (left, mine):
        path.mkdir()
    sweep(site.site, GREEDY)
    assert not left.exists()
    assert mine.exists()


def _dead() -> int:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_refused_archives_go_after_their_days(site: Rig) -> None:
    folder = site.node("dev-1") / "archives"
    old, new = (archive(folder / f"{digest(one)}.refused", one) for one in ("1", "2"))
    os.utime(new, (NOW, NOW))
    site.tell("dev-1", VERSIONS)
    assert _gone(site, Retention(archives=99, refused_days=7)) == {old.name}


def test_an_engine_without_its_description_is_a_rest(site: Rig) -> None:
    engines = site.node("dev-1") / "engines"
    (engines / "rest/tmp").mkdir(parents=True)
    swept = sweep(site.site, Retention())
    assert "rest" in {one.thing.name for one in swept.gone}
    assert not (engines / "rest").exists()


def test_old_segments_and_rotated_logs_go_and_what_is_written_now_stays(site: Rig) -> None:
    segments, logs = site.node("dev-1") / "predictions/tiny", site.state / "logs"
    programs = site.state / "supervisor/programs"
    for folder in (segments, logs, programs):
        folder.mkdir(parents=True)
    (programs / "dev-1-keeper.conf").touch()
    files = {
        segments / "1-1-1-0.jsonl": OLD,
        segments / "1-1-1-1.jsonl": NOW,
        logs / "dev-1-keeper.log": OLD,
        logs / "dev-1-keeper.log.1": OLD,
        logs / "dev-1-keeper.log.2": NOW,
        logs / "dev-1-tiny-of-old.log": OLD,
        logs / "configure.log": OLD,
    }
    for file, changed in files.items():
        file.write_text("x")
        os.utime(file, (changed, changed))
    sweep(site.site, Retention())
    left = {path.name for folder in (segments, logs) for path in folder.iterdir()}
    assert left == {"1-1-1-1.jsonl", "dev-1-keeper.log", "dev-1-keeper.log.2", "configure.log"}


def test_an_engines_own_word_is_enough_where_nobody_answers(site: Rig) -> None:
    told = site.node("dev-1") / "engines/e/digests/tiny/5"
    told.parent.mkdir(parents=True)
    told.write_text(digest("5"))
    sweep(site.site, GREEDY)
    assert site.there(site.node("production-1") / "archives") == {"5"}


def test_the_command_shows_first_and_deletes_with_a_yes(site: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    site.tracking = FakeTracking({"production": "8"})
    monkeypatch.setattr(cli_gc, "site", lambda: site.site)
    shown = CliRunner().invoke(cli_gc.gc, ["--json"])
    found = json.loads(shown.stdout)
    assert not found["done"]
    assert found["bytes"] == sum(one["size"] for one in found["goes"]) > 0
    assert all(one["why"] for one in (*found["goes"], *found["keeps"]))
    assert site.there(site.node("dev-1") / "archives") == {*VERSIONS}
    done = CliRunner().invoke(cli_gc.gc, ["--confirm", "yes"])
    assert done.exit_code == 0, done.output
    assert "freed" in done.stdout
    # Beside what the alias points at, the newest two of the others, which are all of one age here.
    assert len(site.there(site.node("dev-1") / "archives")) == 3
    assert "8" in site.there(site.node("dev-1") / "archives")


def test_a_plan_for_people_says_what_to_type(site: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_gc, "site", lambda: site.site)
    shown = CliRunner().invoke(cli_gc.gc, [])
    assert "make gc CONFIRM=yes" in shown.output
    assert "outside the rollback window" in shown.output
    assert "would free" in shown.output


def test_the_setting_for_dvc_asks_dvc(site: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    unused = site.state / "dvc/cache/files/md5/ab/cdef"
    unused.parent.mkdir(parents=True)
    unused.write_bytes(b"x" * 10000)

    def dvc(*words: str) -> str:
        asked.append(words)
        return f"Removing {unused}\n"

    for module in (survey, sweeping):
        monkeypatch.setattr(module, "dvc_gc", dvc)
    assert "cdef" not in _gone(site, Retention())
    assert not asked
    assert "cdef" in _gone(site, Retention(dvc_cache=True))
    sweep(site.site, Retention(dvc_cache=True))
    assert asked == [("--dry",), ("--dry",), ("--force",)]
