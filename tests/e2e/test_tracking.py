"""The client, the lineage on a version and the ledger, against a real MLflow server."""

import math
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import urllib3

from torchrelay import ledger
from torchrelay.errors import TrackingError
from torchrelay.rest import AnsweredError
from torchrelay.tracking import Tracking

from .conftest import free_port

pytestmark = pytest.mark.real

MODEL = """
    import sys
    import mlflow
    import numpy as np
    from mlflow.models import infer_signature

    with open("served.py", "w") as file:
        file.write(
            "import mlflow\\n"
            "class M(mlflow.pyfunc.PythonModel):\\n"
            "    def predict(self, context, model_input, params=None):\\n"
            "        return [0.0 for _ in model_input]\\n"
            "mlflow.models.set_model(M())\\n"
        )
    mlflow.set_experiment("with-model")
    x = np.zeros((2, 4), dtype=np.float32)
    with mlflow.start_run() as run:
        info = mlflow.pyfunc.log_model(
            name="model", python_model="served.py", input_example=x, pip_requirements=["mlflow"],
            signature=infer_signature(x, np.zeros(2, dtype=np.float32)),
        )
    print(run.info.run_id, info.model_uri, file=sys.stderr)
"""


@pytest.fixture
def tracking(mlflow_server: str) -> Tracking:
    return Tracking(mlflow_server)


@pytest.fixture
def run_id(tracking: Tracking, request: pytest.FixtureRequest) -> str:
    return tracking.create_run(tracking.ensure_experiment("tests"), "a run", request.node.name).run_id


@pytest.fixture
def model(tracking: Tracking, request: pytest.FixtureRequest) -> str:
    name = request.node.name.split("[")[0][-60:]
    tracking.ensure_model(name)
    return name


def test_a_run_from_beginning_to_end(tracking, run_id):
    tracking.log_params(run_id, {f"p{n}": n for n in range(150)})
    tracking.log_metrics(run_id, {"accuracy": 0.5, "loss": math.nan, "worst": -math.inf}, step=0)
    tracking.log_metrics(run_id, {"accuracy": 0.75}, step=1)
    tracking.set_run_tags(run_id, {"why": 'it\'s ö "quoted"'})
    tracking.finish_run(run_id)
    run = tracking.get_run(run_id)
    assert (run.status, run.name) == ("FINISHED", "a run")
    assert run.ended >= run.started
    assert run.parameters == {f"p{n}": str(n) for n in range(150)}
    assert run.metrics["accuracy"] == 0.75
    assert math.isnan(run.metrics["loss"])
    assert run.metrics["worst"] < -1e300
    assert run.tags["why"] == 'it\'s ö "quoted"'


def test_the_same_key_is_the_same_run(tracking):
    experiment = tracking.ensure_experiment("keys")
    assert tracking.ensure_experiment("keys") == experiment
    first = tracking.create_run(experiment, "x", "key", {"a": "1"}, started=1000)
    assert tracking.create_run(experiment, "x", "key") == first
    assert tracking.create_run(experiment, "x", "other").run_id != first.run_id
    assert [run.run_id for run in tracking.search_runs("keys", "tags.a = '1'")] == [first.run_id]
    assert tracking.search_runs("no such experiment") == []


def test_a_deleted_experiment_is_an_error_and_says_how_to_get_it_back(tracking, mlflow_server):
    number = tracking.ensure_experiment("doomed")
    body = {"experiment_id": number}
    urllib3.request("POST", f"{mlflow_server}/api/2.0/mlflow/experiments/delete", json=body)
    with pytest.raises(TrackingError, match="somebody deleted") as caught:
        tracking.ensure_experiment("doomed")
    assert f"restore --experiment-id {number}" in caught.value.next_command


def test_another_value_for_a_parameter_is_refused(tracking, run_id):
    tracking.log_params(run_id, {"lr": 0.1})
    tracking.log_params(run_id, {"lr": 0.1})
    with pytest.raises(AnsweredError, match="Changing param values"):
        tracking.log_params(run_id, {"lr": 0.2})


def test_artifacts_go_there_and_come_back(tracking, run_id, tmp_path):
    big = tmp_path / "big.bin"
    big.write_bytes(bytes(range(256)) * 2**15)  # 8 MiB
    tracking.upload_artifact(run_id, "torchrelay/archive/d1/model.mar", big)
    tracking.upload_artifact(run_id, "torchrelay/archive/d1/mani fest ü.json", b"{}")
    tracking.upload_artifact(run_id, "torchrelay/archive/d1/mani fest ü.json", b'{"a": 1}')
    assert tracking.download_artifact(run_id, "torchrelay/archive/d1/mani fest ü.json") == b'{"a": 1}'
    tracking.save_artifact(run_id, "torchrelay/archive/d1/model.mar", tmp_path / "new" / "back.bin")
    assert (tmp_path / "new" / "back.bin").read_bytes() == big.read_bytes()
    assert len(tracking.artifacts(run_id, "torchrelay/archive/d1")) == 2
    answer = urllib3.request("GET", f"{tracking.artifact_url(run_id, 'torchrelay/archive/d1')}/model.mar")
    assert (answer.status, answer.data) == (200, big.read_bytes())


def test_an_artifact_that_is_not_there_leaves_no_file(tracking, run_id, tmp_path):
    with pytest.raises(AnsweredError) as caught:
        tracking.save_artifact(run_id, "none", tmp_path / "none")
    assert caught.value.code == "RESOURCE_DOES_NOT_EXIST"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b"])
def test_a_path_out_of_the_run_is_refused(tracking, run_id, path):
    with pytest.raises(TrackingError, match="artifact path"):
        tracking.artifact_url(run_id, path)


def test_one_version_per_run_whoever_asks_how_often(tracking, model, run_id):
    source = f"{tracking.get_run(run_id).artifact_uri}/model"
    first = tracking.register_version(model, run_id, source, {"torchrelay.a": "1"})
    again = tracking.register_version(model, run_id, source, {"torchrelay.a": "2", "torchrelay.b": "x" * 5000})
    assert (first.version, again.version) == ("1", "1")
    found = tracking.version(model, "1")
    assert found.tags == again.tags == {"torchrelay.a": "2", "torchrelay.b": "x" * 5000}
    assert (found.run_id, found.source, found.status) == (run_id, source, "READY")
    assert [version.version for version in tracking.versions(model)] == ["1"]
    assert tracking.version_of_run(model, "0" * 32) is None
    assert tracking.version(model, "99") is None
    assert tracking.versions("no_such_model") == []


def test_an_answer_that_got_lost_makes_no_second_version(tracking, model, run_id, monkeypatch):
    """The server creates the version, the client hears nothing, the command is repeated."""
    source = f"{tracking.get_run(run_id).artifact_uri}/model"
    create = tracking._rest.create

    def deaf(path, body):
        create(path, body)
        raise TrackingError("no answer", "an answer", "make up")

    monkeypatch.setattr(tracking._rest, "create", deaf)
    with pytest.raises(TrackingError, match="no answer"):
        tracking.register_version(model, run_id, source, {})
    monkeypatch.undo()
    assert tracking.register_version(model, run_id, source, {}).version == "1"
    assert len(tracking.versions(model)) == 1


@pytest.mark.parametrize(
    ("status", "next_command"), [("PENDING_REGISTRATION", "delete it"), ("FAILED_REGISTRATION", "delete it")]
)
def test_a_version_that_does_not_become_ready_is_an_error(tracking, model, run_id, status, next_command, monkeypatch):
    made = tracking.create_version(model, run_id, f"{tracking.get_run(run_id).artifact_uri}/model", {})
    stuck = made.model_copy(update={"status": status})
    monkeypatch.setattr(tracking, "version", lambda name, version: stuck)
    with pytest.raises(TrackingError, match=status) as caught:
        tracking._settled(stuck, patience_s=0.6)
    assert caught.value.next_command.startswith(next_command)


def test_aliases_move_and_go(tracking, model, mlflow_server):
    experiment = tracking.ensure_experiment("tests")
    for n in ("1", "2"):
        run = tracking.create_run(experiment, n, f"alias-{n}")
        tracking.create_version(model, run.run_id, f"{run.artifact_uri}/model", {})
    assert tracking.alias(model, "dev") is None
    assert tracking.alias("no_such_model", "dev") is None
    tracking.set_alias(model, "dev", "1")
    tracking.set_alias(model, "dev", "2")
    tracking.set_alias(model, "dev-live", "2")
    assert tracking.alias(model, "dev").version == "2"
    assert tracking.models()[model] == {"dev": "2", "dev-live": "2"}
    assert [version.aliases for version in tracking.versions(model)] == [(), ("dev", "dev-live")]
    tracking.delete_alias(model, "dev")
    tracking.delete_alias(model, "dev")
    assert tracking.aliases(model) == {"dev-live": "2"}
    with pytest.raises(AnsweredError):
        tracking.set_alias(model, "dev", "3")


def test_a_name_with_a_quote_is_refused_before_it_is_asked_for(tracking):
    with pytest.raises(TrackingError, match="the name"):
        tracking.versions("x' or name != '")


def test_a_registered_version_shows_the_logged_model(tracking, mlflow_server, tmp_path):
    """Signature and input example hang on the logged model: the version and the model must know each other."""
    script = tmp_path / "log_model.py"
    script.write_text(textwrap.dedent(MODEL))
    environment = {
        "PATH": str(Path(sys.executable).parent),
        "MLFLOW_TRACKING_URI": mlflow_server,
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run_id, source = done.stderr.strip().splitlines()[-1].split()
    version = tracking.register_version("with_model", run_id, source, {"torchrelay.component": "with_model"})
    assert version.source == source
    logged = tracking._rest.get(f"logged-models/{source.removeprefix('models:/')}")["model"]["info"]
    links = {tag["key"]: tag["value"] for tag in logged["tags"]}["mlflow.modelVersions"]
    assert f'"name": "with_model", "version": {version.version}' in links
    page = _page(tracking.version_url("with_model", version.version), tmp_path)
    assert "torchrelay.component" in page
    assert "Source Model : model" in page
    assert "Inputs (1)" in page


def _page(url: str, profile: Path) -> str:
    """The words that a browser shows at `url`."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on PATH; the links between version and model were checked")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={profile}/chromium", "--virtual-time-budget=20000", "--dump-dom", url,
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_ledger_in_mlflow(tracking, tmp_path):
    entry = ledger.Entry(
        kind="rollout", component="tiny", who="ada", why="make deploy-dev\n'first'", from_version=None, to_version="1",
        verdict="pass", digest="d" * 64, duration_s=1.5, failed_requests=0, started=time.time(),
    )  # fmt: skip
    dead = Tracking(f"http://127.0.0.1:{free_port()}")
    assert ledger.record(dead, "dev", entry, tmp_path) is None
    run_id = ledger.record(tracking, "dev", entry, tmp_path)
    assert ledger.record(tracking, "dev", entry, tmp_path) == run_id
    (found,) = ledger.history(tracking, "dev")
    assert (found.entry, found.run_id) == (entry, run_id)
    run = tracking.get_run(run_id)
    assert (run.status, run.tags["mlflow.user"], run.ended - run.started) == ("FINISHED", "ada", 1500)


def test_a_dead_server_is_said_soon_and_with_the_command_to_type():
    dead = Tracking(f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    assert not dead.healthy()
    with pytest.raises(TrackingError) as caught:
        dead.models()
    assert caught.value.next_command == "make up"
    assert time.monotonic() - began < 5


def test_what_is_no_mlflow_is_said(mlflow_server):
    with pytest.raises(TrackingError):
        Tracking(f"{mlflow_server}/somewhere").models()


def test_a_living_server_is_healthy(tracking):
    assert tracking.healthy()
