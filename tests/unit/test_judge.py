"""The gate always leaves a verdict, also where what it compares with cannot be had any more."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from torchrelay.config import Component, Settings, Site, TrackingServer, write_json
from torchrelay.errors import TrackingError
from torchrelay.handover import Evaluation, TrainedRun, Verdict
from torchrelay.legs import judge
from torchrelay.lineage import TAG_ARCHIVE_URL, TAG_DIGEST, TAG_ENVIRONMENT
from torchrelay.tracking import ModelVersion

SCORES = [1.0] * 8 + [0.0] * 2
DIGEST = "0" * 64


class _Answers(BaseHTTPRequestHandler):
    """Answers every request with one status, as a server does that has the archive no more, or that is ill."""

    status = 404

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_words: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


class _Tracking:
    """A registry whose live version was evaluated on another test set than the candidate's."""

    def __init__(self, url: str) -> None:
        self.url = url

    def alias(self, name: str, alias: str) -> ModelVersion:
        tags = {TAG_ARCHIVE_URL: f"{self.url}/archive", TAG_DIGEST: DIGEST, TAG_ENVIRONMENT: "env"}
        return ModelVersion(
            name=name, version="7", run_id="old", source="models:/m-7", status="READY", tags=tags, aliases=(alias,)
        )

    def download_artifact(self, _run_id: str, _path: str) -> bytes:
        return Evaluation(test_set="of yesterday", scores=SCORES).model_dump_json().encode()

    def upload_artifact(self, _run_id: str, _path: str, content: Path) -> None:
        assert content.is_file()

    def run_url(self, _experiment: str, run: str) -> str:
        return f"{self.url}/{run}"


@pytest.fixture
def gate(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `_judge` can be called: a trained run, a test set, and that registry."""
    (tmp_path / "test.npz").write_bytes(b"of today")
    digest = judge.hashlib.sha256(b"of today").hexdigest()
    write_json(tmp_path / "train" / "evaluation.json", Evaluation(test_set=digest, scores=SCORES))
    run = TrainedRun(
        run_id="new", experiment_id="1", model_uri="models:/m-8", metrics={"accuracy": 0.8}, parameters={}, device="cpu"
    )
    write_json(tmp_path / "train" / "run.json", run)
    described = Component.model_validate(
        {
            "name": "tiny",
            "description": "d",
            "task": "classification",
            "data": "none",
            "metric": {"floor": 0.5, "allowed_regression": 0.1},
        }
    )
    here = Settings(state=tmp_path / "state", keys=tmp_path / "keys")
    site = Site(supervisor=Path("s"), tracking=TrackingServer(url=server), perimeters={})
    monkeypatch.setattr(judge, "component", lambda _name: described)
    monkeypatch.setattr(judge, "settings", lambda: here)
    monkeypatch.setattr(judge, "site", lambda: site)
    monkeypatch.setattr(judge, "Tracking", _Tracking)
    return tmp_path


def _judge(folder: Path) -> Verdict:
    return judge.gate_model("tiny", folder / "train", folder / "test.npz", folder / "gate")


def test_a_live_archive_that_is_gone_is_a_verdict_with_a_way_out(gate: Path) -> None:
    verdict = _judge(gate)
    assert verdict.verdict == "refuse"
    assert "gone from the tracking server" in verdict.reasons[0]
    assert "allowed_regression: null" in verdict.reasons[0]
    assert Verdict.model_validate_json((gate / "gate" / "verdict.json").read_bytes()) == verdict


def test_a_server_that_is_ill_is_no_verdict_on_the_candidate(gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Answers, "status", 500)
    with pytest.raises(TrackingError, match="500"):
        _judge(gate)
    assert not (gate / "gate").exists()
