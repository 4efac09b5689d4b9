"""The ledger against a stand-in for the tracking server that can die at any request."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from torchrelay import ledger
from torchrelay.errors import ConfigError, TrackingError
from torchrelay.ledger import Entry, flush_outbox, history, record
from torchrelay.rest import AnsweredError
from torchrelay.tracking import KEY, Run


class Dying:
    """Keeps runs in memory as the server does. Dies after so many requests, before or after it has acted."""

    def __init__(self, lives: int = 10**9, acts: bool = True, refuses: str = "") -> None:
        self.runs: dict[str, Run] = {}
        self.lives, self.acts, self.refuses = lives, acts, refuses

    def _request(self, act: Callable[[], Any]) -> Any:
        self.lives -= 1
        if self.lives < 0:
            if self.acts:
                act()
            raise TrackingError("no answer", "a server", "make up")
        return act()

    def ensure_experiment(self, name: str) -> str:
        return self._request(lambda: name)

    def create_run(self, experiment: str, name: str, key: str, tags: dict[str, str], started: int) -> Run:
        if self.refuses and self.refuses in name:
            raise AnsweredError("no", "yes", "make up", "INVALID_PARAMETER_VALUE")
        run = Run(
            run_id=f"run-{key[:8]}", experiment_id=experiment, name=name, status="RUNNING", started=started,
            artifact_uri="", parameters={}, metrics={}, tags={**tags, KEY: key},
        )  # fmt: skip
        return self._request(lambda: self.runs.setdefault(key, run))

    def log_metrics(self, run_id: str, metrics: dict[str, float]) -> None:
        self._request(lambda: self._update(run_id, metrics=metrics))

    def finish_run(self, run_id: str, ended: int) -> None:
        self._request(lambda: self._update(run_id, status="FINISHED", ended=ended))

    def _update(self, run_id: str, **values: object) -> None:
        key = next(key for key, run in self.runs.items() if run.run_id == run_id)
        self.runs[key] = self.runs[key].model_copy(update=values)

    def search_runs(self, experiment: str, condition: str, limit: int) -> list[Run]:
        found = [run for run in self.runs.values() if run.experiment_id == experiment]
        return sorted(found, key=lambda run: -run.started)[:limit]

    def run_url(self, experiment_id: str, run_id: str) -> str:
        return f"http://127.0.0.1:1/#/experiments/{experiment_id}/runs/{run_id}"


def entry(**changed: object) -> Entry:
    base = {
        "kind": "rollout", "component": "tiny", "who": "ada", "why": "make deploy-dev", "from_version": "1",
        "to_version": "2", "verdict": "pass", "digest": "d" * 64, "duration_s": 2.5, "failed_requests": 0,
        "started": 1_800_000_000.25,
    }  # fmt: skip
    return Entry.model_validate({**base, **changed})


def test_an_entry_becomes_one_finished_run_and_leaves_the_outbox(tmp_path):
    server = Dying()
    run_id = record(server, "dev", entry(), tmp_path)
    (run,) = server.runs.values()
    assert run.run_id == run_id
    assert (run.status, run.name, run.experiment_id) == ("FINISHED", "rollout tiny 1 → 2", "ledger-dev")
    assert (run.started, run.ended) == (1_800_000_000_250, 1_800_000_002_750)
    assert run.metrics == {"duration_s": 2.5, "failed_requests": 0.0}
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("acts", [True, False])
@pytest.mark.parametrize("lives", range(4))
def test_a_server_that_dies_at_any_request_loses_and_doubles_nothing(tmp_path, lives, acts, caplog):
    server = Dying(lives, acts)
    assert record(server, "dev", entry(), tmp_path) is None
    assert "waits in" in caplog.text
    server.lives = 10**9
    carried = flush_outbox(server, tmp_path)
    assert list(carried) == [entry().key("dev")]
    (run,) = server.runs.values()
    assert (run.status, run.metrics["duration_s"]) == ("FINISHED", 2.5)
    assert flush_outbox(server, tmp_path) == {}


def test_recorded_twice_is_one_run(tmp_path):
    server = Dying()
    assert record(server, "dev", entry(), tmp_path) == record(server, "dev", entry(), tmp_path)
    assert len(server.runs) == 1


def test_the_same_refusal_is_one_run_however_often_it_is_asked_for(tmp_path):
    server = Dying()
    for moment in (1.0, 2.0):
        record(server, "dev", entry(kind="refusal", started=moment), tmp_path)
        record(server, "dev", entry(kind="mend", started=moment), tmp_path)
    assert sorted(run.name.split()[0] for run in server.runs.values()) == ["mend", "mend", "refusal"]


def test_perimeters_are_apart(tmp_path):
    server = Dying()
    record(server, "dev", entry(), tmp_path)
    record(server, "production", entry(), tmp_path)
    assert len(history(server, "dev")) == len(history(server, "production")) == 1


def test_history_gives_back_what_was_recorded_newest_first(tmp_path):
    server = Dying()
    entries = [entry(started=float(moment), from_version=None, why='für\n"dich"') for moment in (1, 3, 2)]
    for one in entries:
        record(server, "dev", one, tmp_path)
    assert [found.entry for found in history(server, "dev")] == [entries[1], entries[2], entries[0]]
    assert history(server, "dev", limit=1)[0].url.endswith(history(server, "dev", limit=1)[0].run_id)


def test_what_the_server_refuses_holds_up_nothing_else(tmp_path):
    server = Dying(lives=0)
    for component in ("bad", "good"):
        record(server, "dev", entry(component=component), tmp_path)
    server.lives, server.refuses = 10**9, "bad"
    with pytest.raises(AnsweredError):
        flush_outbox(server, tmp_path)
    assert [run.name for run in server.runs.values() if run.status == "FINISHED"] == ["rollout good 1 → 2"]
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_broken_file_is_named_and_kept(tmp_path):
    (tmp_path / "0.json").write_text("{")
    server = Dying()
    with pytest.raises(ConfigError, match=r"0\.json is not a Waiting"):
        flush_outbox(server, tmp_path)
    assert (tmp_path / "0.json").exists()


def test_an_empty_outbox_asks_the_server_nothing(tmp_path):
    assert flush_outbox(Dying(lives=0), tmp_path / "none yet") == {}


def test_flushing_waits_for_the_process_that_flushes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ledger, "FileLock", lambda path, timeout: FileLock(path, timeout=0.05))
    with FileLock(tmp_path / ".lock"):
        assert record(Dying(), "dev", entry(), tmp_path) is None
    assert "locked by another process" in caplog.text
    assert len(flush_outbox(Dying(), tmp_path)) == 1


def test_long_reasons_are_cut_so_that_the_entry_fits_a_tag():
    long = entry(who="x" * 9000, why="\x01" * 9000, verdict="y" * 9000)
    assert len(long.model_dump_json()) < 8000
    assert long.why.endswith("…")


def test_a_ledger_run_without_its_entry_is_named(tmp_path):
    server = Dying()
    record(server, "dev", entry(), tmp_path)
    key, run = server.runs.popitem()
    server.runs[key] = run.model_copy(update={"tags": {}})
    with pytest.raises(TrackingError, match="holds no entry"):
        history(server, "dev")


def test_the_outbox_is_read_in_the_order_of_the_events(tmp_path: Path):
    server = Dying(lives=0)
    for moment in (30.0, 4.0, 1_800_000_000.0):
        record(server, "dev", entry(started=moment), tmp_path)
    server.lives = 10**9
    flush_outbox(server, tmp_path)
    assert [run.started for run in server.runs.values()] == [4_000, 30_000, 1_800_000_000_000]
