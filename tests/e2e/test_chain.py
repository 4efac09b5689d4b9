"""The main job, for real: data, training, gate, registry, archive, gateway, on a small slice of the real images.

It takes minutes because it starts real servers, trains, and redeploys a few times.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3
import yaml

from tests.conftest import Checkout
from torchrelay.serving.apply import node_config

pytestmark = [pytest.mark.real, pytest.mark.slow]

COMPONENT = "fashion_mnist"


@pytest.fixture(scope="module")
def small(checkout: Checkout) -> Checkout:
    """The checkout, set to a slice of 1,500 images and one epoch; the floor is what that can reach."""
    params = checkout.folder / "components" / COMPONENT / "params.yaml"
    content = yaml.safe_load(params.read_text())
    params.write_text(yaml.safe_dump({**content, "limit": 1500}))
    _settings(checkout, floor=0.3)
    return checkout


@pytest.fixture(scope="module")
def deployed(small: Checkout) -> Checkout:
    small.ok("deploy-dev", "--component", COMPONENT)
    return small


def _settings(checkout: Checkout, floor: float, **training: Any) -> None:
    overlay = {
        "components": {
            COMPONENT: {
                "metric": {"floor": floor, "allowed_regression": 1.0},
                "training": {"parameters": {"epochs": 1, **training}},
            },
        }
    }
    (checkout.folder / "config" / "local.yaml").write_text(yaml.safe_dump(overlay))


def _golden(checkout: Checkout) -> dict[str, Any]:
    path = checkout.folder / "results" / COMPONENT / "train" / "golden.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _post(checkout: Checkout, body: bytes, **headers: str) -> urllib3.BaseHTTPResponse:
    url = f"{checkout.gateway}/predictions/{COMPONENT}"
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return urllib3.request("POST", url, body=body, headers={"content-type": "application/json"} | names, retries=False)


def _one(checkout: Checkout) -> bytes:
    return json.dumps({"instances": _golden(checkout)["instances"][:1]}).encode()


def _versions(checkout: Checkout) -> list[dict[str, Any]]:
    url = f"{checkout.tracking}/api/2.0/mlflow/model-versions/search"
    found = urllib3.request("GET", url, fields={"filter": f"name='{COMPONENT}'", "max_results": "100"}).json()
    versions: list[dict[str, Any]] = found.get("model_versions", [])
    return versions


def _status(checkout: Checkout) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(checkout.ok("status", "--json").stdout)
    return found


def test_a_prediction_is_served_and_traced_to_its_version(deployed: Checkout) -> None:
    golden = _golden(deployed)
    answer = _post(deployed, json.dumps({"instances": golden["instances"]}).encode(), x_request_id="caller-1")
    assert answer.status == 200
    assert answer.headers["x-request-id"] == "caller-1"
    assert answer.headers["x-component"] == COMPONENT
    assert not [name for name in answer.headers if name.startswith("x-torchrelay")]
    record = json.loads((deployed.folder / "results" / COMPONENT / "archive.json").read_text())
    assert answer.headers["x-model-version"] == record["version"]
    assert answer.headers["x-archive-digest"] == record["digest"]
    predictions = answer.json()["predictions"]
    assert [one["label"] for one in predictions] == [one["label"] for one in golden["predictions"]]


def test_status_says_what_is_wanted_and_what_each_node_runs(deployed: Checkout) -> None:
    found = _status(deployed)
    assert found["tracking"] == {"url": deployed.tracking, "public": None, "healthy": True}
    state = found["perimeters"]["dev"]["components"][COMPONENT]
    assert found["perimeters"]["dev"]["gateway"] == deployed.gateway
    assert state["converged"] is True
    assert state["nodes"][0]["version"] == state["wanted"]
    assert state["nodes"][0]["healthy"] is True


def _serving(checkout: Checkout) -> str:
    found: str = _status(checkout)["perimeters"]["dev"]["components"][COMPONENT]["wanted"]
    return found


def _tags(checkout: Checkout, version: str) -> dict[str, str]:
    found = next(one for one in _versions(checkout) if str(one["version"]) == version)
    return {tag["key"].removeprefix("torchrelay."): tag["value"] for tag in found["tags"]}


def _left(checkout: Checkout, file: str) -> dict[str, Any]:
    """A hand-over file of the component."""
    found: dict[str, Any] = json.loads((checkout.folder / "results" / COMPONENT / file).read_text())
    return found


def test_lineage_is_complete_on_the_model_version(deployed: Checkout) -> None:
    tags = _tags(deployed, _serving(deployed))
    run, git = _left(deployed, "train/run.json"), _left(deployed, "train/git.json")
    assert tags["run"] == run["run_id"]
    assert json.loads(tags["parameters"]) == run["parameters"]
    assert (tags["git.commit"], tags["git.tree"]) == (git["commit"], git["tree"])
    assert tags["git.dirty"] == str(git["dirty"]).lower()
    assert tags["data.hash"] == _left(deployed, "data.json")["hash"]
    assert tags["archive.digest"] == tags["archive.proof"] == _left(deployed, "archive.json")["digest"]
    assert tags["environment"] == _left(deployed, "archive.json")["environment"]
    assert tags["verdict"] == "pass"


def test_with_nothing_changed_nothing_is_trained_and_it_says_so(deployed: Checkout) -> None:
    deployed.ok("deploy-dev", "--component", COMPONENT)
    before = len(_versions(deployed))
    done = deployed.ok("deploy-dev", "--component", COMPONENT)
    assert "nothing had changed" in done.stdout
    assert len(_versions(deployed)) == before


def test_plan_touches_nothing_and_names_what_would_run(deployed: Checkout) -> None:
    deployed.ok("deploy-dev", "--component", COMPONENT)
    before = len(_versions(deployed))
    assert "nothing to do" in deployed.ok("plan", "--component", COMPONENT).stdout
    folder = deployed.folder / "components" / COMPONENT
    text = (folder / "model.py").read_text()
    (folder / "model.py").write_text(text + "\n# a changed training file\n")
    try:
        changed = deployed.ok("plan", "--component", COMPONENT).stdout
    finally:
        (folder / "model.py").write_text(text)
    (folder / "layers").mkdir()
    (folder / "layers" / "block.py").touch()
    try:
        added = deployed.ok("plan", "--component", COMPONENT).stdout
    finally:
        shutil.rmtree(folder / "layers")
    assert "train_model" in changed
    assert "train_model" in added
    assert len(_versions(deployed)) == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b'{"instances": []}', 400),
        (b'{"instances": [[1, 2, 3]]}', 400),
        (b'{"inputs": 1}', 400),
        (b"x" * 100_000_000, 413),
    ],
    ids=["bad JSON", "empty body", "no instance", "wrong shape", "other key", "100 MB"],
)
def test_a_malformed_request_is_refused_and_the_next_good_one_answers(
    deployed: Checkout, body: bytes, status: int
) -> None:
    answer = _post(deployed, body)
    assert answer.status == status
    assert set(answer.json()) == {"error", "request_id"}
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert _post(deployed, _one(deployed)).status == 200


def test_what_curl_sends_by_default_is_told_the_types_to_use(deployed: Checkout) -> None:
    answer = _post(deployed, _one(deployed), content_type="application/x-www-form-urlencoded")
    assert answer.status == 415
    assert "application/json" in answer.json()["error"]
    assert _post(deployed, _one(deployed)).status == 200


def test_an_image_is_answered_like_its_numbers(deployed: Checkout) -> None:
    from io import BytesIO

    import numpy as np
    from PIL import Image

    instance = _golden(deployed)["instances"][0]
    file = BytesIO()
    Image.fromarray(np.asarray(instance, dtype="uint8")).save(file, format="PNG")
    image = _post(deployed, file.getvalue(), content_type="image/png")
    numbers = _post(deployed, _one(deployed))
    assert image.status == 200
    assert image.json()["predictions"][0]["class"] == numbers.json()["predictions"][0]["class"]


@contextmanager
def _looping_clients(checkout: Checkout, body: bytes) -> Iterator[list[int]]:
    """Four clients that ask without a pause; yields the statuses that they saw."""
    stop = threading.Event()
    statuses: list[int] = []
    kind = {"content-type": "application/json"}

    def loop() -> None:
        pool = urllib3.HTTPConnectionPool("127.0.0.1", checkout.port_base + 10, maxsize=1)
        while not stop.is_set():
            answer = pool.request("POST", f"/predictions/{COMPONENT}", body=body, headers=kind, retries=False)
            statuses.append(answer.status)

    clients = [threading.Thread(target=loop) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        yield statuses
    finally:
        stop.set()
        for client in clients:
            client.join()


def test_a_changed_parameter_redeploys_without_losing_a_request(deployed: Checkout) -> None:
    body = _one(deployed)
    before = _serving(deployed)
    with _looping_clients(deployed, body) as statuses:
        _settings(deployed, floor=0.3, seed=101)
        deployed.ok("deploy-dev", "--component", COMPONENT)
    assert len(statuses) > 100
    assert set(statuses) == {200}
    after = _serving(deployed)
    assert _post(deployed, body).headers["x-model-version"] == after
    assert int(after) > int(before)
    tags = _tags(deployed, after)
    assert (tags["parent.version"], tags["parent.run"]) == (before, _tags(deployed, before)["run"])


def test_a_changed_policy_judges_anew_and_keeps_what_the_version_came_from(deployed: Checkout) -> None:
    deployed.ok("deploy-dev", "--component", COMPONENT)
    before = _tags(deployed, _serving(deployed))
    overlay = yaml.safe_load((deployed.folder / "config" / "local.yaml").read_text())
    overlay["components"][COMPONENT]["metric"]["floor"] = 0.31
    (deployed.folder / "config" / "local.yaml").write_text(yaml.safe_dump(overlay))
    (deployed.folder / "a_file_of_later").touch()
    done = deployed.ok("deploy-dev", "--component", COMPONENT)
    assert "gate_model" in done.stderr
    assert "train_model" not in done.stderr
    assert _left(deployed, "gate/verdict.json")["floor"] == 0.31
    assert _tags(deployed, _serving(deployed)) == before


def test_a_version_that_was_deleted_in_the_registry_is_registered_and_served_again(deployed: Checkout) -> None:
    deployed.ok("deploy-dev", "--component", COMPONENT)
    deleted = _serving(deployed)
    url = f"{deployed.tracking}/api/2.0/mlflow/model-versions/delete"
    assert urllib3.request("DELETE", url, json={"name": COMPONENT, "version": deleted}).status == 200
    assert "its version was deleted" in deployed.ok("plan", "--component", COMPONENT).stdout
    done = deployed.ok("deploy-dev", "--component", COMPONENT)
    assert "train_model" not in done.stderr
    again = _serving(deployed)
    assert int(again) > int(deleted)
    assert _post(deployed, _one(deployed)).headers["x-model-version"] == again


def test_a_run_that_was_deleted_in_the_registry_is_trained_again(deployed: Checkout) -> None:
    deployed.ok("deploy-dev", "--component", COMPONENT)
    run = _left(deployed, "train/run.json")["run_id"]
    url = f"{deployed.tracking}/api/2.0/mlflow/runs/delete"
    assert urllib3.request("POST", url, json={"run_id": run}).status == 200
    done = deployed.ok("deploy-dev", "--component", COMPONENT)
    assert "train_model" in done.stderr
    assert _left(deployed, "train/run.json")["run_id"] != run
    assert _post(deployed, _one(deployed)).headers["x-model-version"] == _serving(deployed)


def test_a_lost_signing_key_is_replaced_and_the_version_signed_anew(deployed: Checkout) -> None:
    deployed.ok("deploy-dev", "--component", COMPONENT)
    before = _left(deployed, "archive.json")
    shutil.rmtree(Path(deployed.environment["TORCHRELAY_KEYS"]) / "dev")
    done = deployed.ok("deploy-dev", "--component", COMPONENT)
    assert "train_model" not in done.stderr
    assert _left(deployed, "archive.json") == before
    deployed.ok("down")
    deployed.ok("up")
    assert _post(deployed, _one(deployed)).headers["x-archive-digest"] == before["digest"]


def test_a_training_that_fails_leaves_what_serves_and_names_its_log(deployed: Checkout) -> None:
    body = _one(deployed)
    serving, count = _serving(deployed), len(_versions(deployed))
    source = deployed.folder / "components" / COMPONENT / "model.py"
    text = source.read_text()
    source.write_text(text + "\nraise RuntimeError('a mistake')\n")
    try:
        done = deployed.run("deploy-dev", "--component", COMPONENT)
    finally:
        source.write_text(text)
    assert done.returncode != 0
    assert "logs/train_model/fashion_mnist.log" in done.stderr
    assert "next:" in done.stderr
    assert (_serving(deployed), len(_versions(deployed))) == (serving, count)
    assert _post(deployed, body).headers["x-model-version"] == serving
    assert "train_model" in deployed.ok("deploy-dev", "--component", COMPONENT).stderr


def test_bad_data_stop_the_chain_before_any_training(deployed: Checkout, tmp_path: Path) -> None:
    serving = _serving(deployed)
    params = deployed.folder / "components" / COMPONENT / "params.yaml"
    text = params.read_text()
    params.write_text(yaml.safe_dump({**yaml.safe_load(text), "source": str(tmp_path)}))
    try:
        done = deployed.run("deploy-dev", "--component", COMPONENT)
    finally:
        params.write_text(text)
    assert done.returncode != 0
    assert "train_model" not in done.stderr
    assert "next:" in done.stderr
    assert _post(deployed, _one(deployed)).headers["x-model-version"] == serving
    deployed.ok("deploy-dev", "--component", COMPONENT)


def _stored(checkout: Checkout, digest: str) -> Path:
    """The archive with this digest as the tracking server keeps it."""
    [found] = (checkout.state / "tracking" / "artifacts").glob(f"**/archive/{digest}/model.mar")
    return found


def test_a_live_version_that_cannot_be_judged_anew_is_a_verdict_with_a_way_out(deployed: Checkout) -> None:
    deployed.ok("deploy-dev", "--component", COMPONENT)
    live = _left(deployed, "archive.json")
    _stored(deployed, live["digest"]).write_bytes(b"not an archive")
    params = deployed.folder / "components" / COMPONENT / "params.yaml"
    content = yaml.safe_load(params.read_text())
    params.write_text(yaml.safe_dump({**content, "limit": content["limit"] + 50}))
    done = deployed.run("deploy-dev", "--component", COMPONENT)
    assert done.returncode != 0
    verdict = _left(deployed, "gate/verdict.json")
    assert verdict["verdict"] == "refuse"
    assert "allowed_regression: null" in verdict["reasons"][0]
    assert _post(deployed, _one(deployed)).headers["x-model-version"] == live["version"]
    local = deployed.folder / "config" / "local.yaml"
    before = local.read_text()
    overlay = yaml.safe_load(before)
    overlay["components"][COMPONENT]["metric"]["allowed_regression"] = None
    try:
        local.write_text(yaml.safe_dump(overlay))
        deployed.ok("deploy-dev", "--component", COMPONENT)
    finally:
        local.write_text(before)
    assert int(_serving(deployed)) > int(live["version"])


def test_changed_serving_settings_start_a_new_engine_without_a_training_or_a_lost_request(deployed: Checkout) -> None:
    deployed.ok("deploy-dev", "--component", COMPONENT)
    before, count = _serving(deployed), len(_versions(deployed))
    path = deployed.folder / "config" / "local.yaml"
    overlay = yaml.safe_load(path.read_text())
    # What component.yaml says is neither of these.
    overlay["components"][COMPONENT] |= {"serving": {"workers": 3}, "monitoring": {"keep_inputs": False}}
    with _looping_clients(deployed, _one(deployed)) as statuses:
        path.write_text(yaml.safe_dump(overlay))
        done = deployed.ok("deploy-dev", "--component", COMPONENT)
    assert set(statuses) == {200}
    assert "train_model" not in done.stderr
    assert (_serving(deployed), len(_versions(deployed))) == (before, count)
    node = node_config(deployed.state / "perimeters" / "dev" / "nodes" / "dev-1")
    [instance] = (node.folder / "engines").glob("*/instance.json")
    management = json.loads(instance.read_text())["ports"][1]
    [described] = urllib3.request("GET", f"http://127.0.0.1:{management}/models/{COMPONENT}/{before}").json()
    assert [worker["status"] for worker in described["workers"]] == ["READY"] * 3
    assert json.loads(instance.read_text())["keep_inputs"] is False


def test_a_refused_candidate_moves_no_alias_and_says_why(deployed: Checkout) -> None:
    serving = _serving(deployed)
    _settings(deployed, floor=0.999, seed=102)
    try:
        done = deployed.run("deploy-dev", "--component", COMPONENT)
        assert done.returncode != 0
        assert "floor" in done.stderr
        assert "next:" in done.stderr
        assert _serving(deployed) == serving
        assert _post(deployed, _one(deployed)).headers["x-model-version"] == serving
    finally:
        _settings(deployed, floor=0.3, seed=103)
        deployed.ok("deploy-dev", "--component", COMPONENT)


def _answers_again(checkout: Checkout, body: bytes, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if _post(checkout, body).status == 200:
            return True
        time.sleep(0.5)
    return False


def test_a_killed_engine_is_mended_by_its_node_with_nobody_watching(deployed: Checkout) -> None:
    folder = node_config(deployed.state / "perimeters" / "dev" / "nodes" / "dev-1").folder
    engines = [
        process
        for process in psutil.process_iter(["name", "cwd"])
        if process.info["name"] == "java" and process.info["cwd"].startswith(str(folder))
    ]
    body = _one(deployed)
    for engine in engines:
        engine.kill()
    assert engines
    assert _answers_again(deployed, body, seconds=90)


def test_a_changed_test_set_judges_the_live_archive_on_it_anew(deployed: Checkout) -> None:
    deployed.ok("deploy-dev", "--component", COMPONENT)
    params = deployed.folder / "components" / COMPONENT / "params.yaml"
    content = yaml.safe_load(params.read_text())
    params.write_text(yaml.safe_dump({**content, "limit": content["limit"] + 100}))
    live = _serving(deployed)
    deployed.ok("deploy-dev", "--component", COMPONENT)
    verdict = json.loads((deployed.folder / "results" / COMPONENT / "gate" / "verdict.json").read_text())
    assert verdict["live_version"] == live
    assert verdict["live"] is not None
    assert verdict["interval"][0] <= verdict["difference"] <= verdict["interval"][1]


def test_down_and_up_bring_back_what_was_served(deployed: Checkout) -> None:
    serving = _serving(deployed)
    deployed.ok("down")
    with pytest.raises(urllib3.exceptions.HTTPError):
        _post(deployed, _one(deployed))
    deployed.ok("up")
    assert _post(deployed, _one(deployed)).headers["x-model-version"] == serving


KILLED = ("train_model", "gate_model", "register_model", "package_archive", "prove_archive", "deploy_model")


def _stopped_in(checkout: Checkout, rule: str) -> "subprocess.Popen[str]":
    """A deploy-dev in a process group of its own, 0.3 s after the rule began."""
    child = checkout.popen("deploy-dev", "--component", COMPONENT, start_new_session=True)
    assert child.stderr is not None
    for line in child.stderr:
        if f"▶ {rule}" in line:
            break
    time.sleep(0.3)
    return child


@pytest.mark.parametrize("rule", KILLED)
def test_killed_in_the_middle_of_a_leg_the_same_command_resumes(deployed: Checkout, rule: str) -> None:
    """kill -9 of the whole process group while the leg runs, then a rerun: one version per run, and it serves."""
    body = _one(deployed)
    _settings(deployed, floor=0.3, seed=110 + KILLED.index(rule))
    child = _stopped_in(deployed, rule)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert _post(deployed, body).status == 200
    deployed.ok("deploy-dev", "--component", COMPONENT)
    versions = _versions(deployed)
    assert len({version["run_id"] for version in versions}) == len(versions)
    assert _status(deployed)["perimeters"]["dev"]["components"][COMPONENT]["converged"] is True


def test_a_training_that_outlives_its_leg_does_not_write_into_the_next_one(deployed: Checkout) -> None:
    """kill -9 of the leg alone: what it started goes on by itself while the rerun trains."""
    _settings(deployed, floor=0.3, seed=130)
    child = _stopped_in(deployed, "train_model")
    [leg] = [
        process
        for process in psutil.Process(child.pid).children(recursive=True)
        if "train-model" in process.cmdline() and "torchrelay" in process.cmdline()
    ]
    orphans = leg.children(recursive=True)
    leg.kill()
    child.communicate()
    assert child.returncode != 0
    deployed.ok("deploy-dev", "--component", COMPONENT)
    run = _left(deployed, "train/run.json")
    assert _tags(deployed, _serving(deployed))["run"] == run["run_id"]
    for orphan in psutil.wait_procs(orphans, timeout=60)[1]:
        orphan.kill()
    assert _left(deployed, "train/run.json") == run


def test_after_a_kill_of_snakemake_alone_what_serves_is_what_was_judged(deployed: Checkout) -> None:
    """kill -9 of Snakemake: its leg goes on and ends when the rerun, or the one after it, is somewhere in the chain."""
    _settings(deployed, floor=0.3, seed=131)
    child = _stopped_in(deployed, "train_model")
    [snakemake] = [
        process
        for process in psutil.Process(child.pid).children()
        if any("snakemake.cli" in word for word in process.cmdline())
    ]
    orphans = snakemake.children(recursive=True)
    snakemake.kill()
    child.communicate()
    assert child.returncode != 0
    deployed.run("deploy-dev", "--component", COMPONENT)  # whether it gets through is a matter of who is first
    for orphan in psutil.wait_procs(orphans, timeout=60)[1]:
        orphan.kill()
    deployed.ok("deploy-dev", "--component", COMPONENT)
    served = _serving(deployed)
    assert _tags(deployed, served)["run"] == _left(deployed, "train/run.json")["run_id"]
    assert _left(deployed, "gate/verdict.json")["run_id"] == _tags(deployed, served)["run"]
    versions = _versions(deployed)
    assert len({version["run_id"] for version in versions}) == len(versions)
    assert _post(deployed, _one(deployed)).headers["x-model-version"] == served


def test_a_taken_port_is_reported_by_name(tmp_path: Path, deployed: Checkout) -> None:
    other = {**deployed.environment, "TORCHRELAY_STATE": str(tmp_path / "state")}
    done = subprocess.run(
        [str(deployed.folder / ".venv" / "bin" / "python"), "-m", "torchrelay", "up"],
        cwd=deployed.folder,
        env=other,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert str(deployed.port_base) in done.stderr
    assert "Traceback" not in done.stderr


def _page(browser: Any, url: str, *words: str) -> str:
    """The text of a page once all `words` are on it."""
    from selenium.webdriver.common.by import By

    browser.get(url)
    deadline = time.monotonic() + 60
    text = ""
    while time.monotonic() < deadline:
        text = browser.find_element(By.TAG_NAME, "body").text
        if all(word in text for word in words):
            return text
        time.sleep(0.5)
    raise AssertionError(f"{url} does not show {words}; it shows:\n{text[:3000]}")


def test_the_page_of_mlflow_shows_the_run_with_its_metrics_and_artifacts(deployed: Checkout, browser: Any) -> None:
    run = json.loads((deployed.folder / "results" / COMPONENT / "train" / "run.json").read_text())
    place = f"{deployed.tracking}/#/experiments/{run['experiment_id']}/runs/{run['run_id']}"
    _page(browser, place, "val_accuracy", "epochs")
    _page(browser, f"{place}/artifacts", "torchrelay")


def test_the_page_of_mlflow_shows_the_version_with_its_alias_and_verdict(deployed: Checkout, browser: Any) -> None:
    deployed.ok("deploy-dev", "--component", COMPONENT)
    place = f"{deployed.tracking}/#/models/{COMPONENT}/versions/{_serving(deployed)}"
    _page(browser, place, "torchrelay.verdict", "dev-live")
