"""`mlflow deployments` for real: its own command line against the perimeters of one small site.

It takes minutes because it starts real servers, trains twice and rolls out in both perimeters.
"""

import ast
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml

from tests.conftest import Checkout

pytestmark = [pytest.mark.real, pytest.mark.slow]

COMPONENT = "fashion_mnist"


@pytest.fixture(scope="module")
def deployed(checkout: Checkout) -> Checkout:
    """Two versions in the registry, the second one in dev, all of their code committed; production is empty."""
    params = checkout.folder / "components" / COMPONENT / "params.yaml"
    params.write_text(yaml.safe_dump({**yaml.safe_load(params.read_text()), "limit": 1500}))
    for words in (["add", "--all"], ["commit", "--quiet", "--message", "small"]):
        subprocess.run(["git", *words], cwd=checkout.folder, env=checkout.environment, check=True)
    for seed in (1, 2):
        _settings(checkout, seed)
        checkout.ok("deploy-dev", "--component", COMPONENT)
    return checkout


def _settings(checkout: Checkout, seed: int) -> None:
    """A slice of the data, one epoch, and a roll-out in production with no stages."""
    overlay = {
        "metric": {"floor": 0.3, "allowed_regression": 1.0, "allowed_slice_regression": 1.0},
        "latency": {"p99_ms": 5000},
        "training": {"parameters": {"epochs": 1, "seed": seed}},
        "rollout": {"stages": []},
    }
    path = checkout.folder / "config" / "local.yaml"
    path.write_text(yaml.safe_dump({"poll_s": 2, "components": {COMPONENT: overlay}}))


def _mlflow(checkout: Checkout, verb: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """By the checkout's own path to Python: programs are compared by their commands, and one that differs restarts."""
    return subprocess.run(
        [str(checkout.folder / ".venv" / "bin" / "python"), "-m", "mlflow", "deployments", verb, *words],
        cwd=checkout.folder,
        env=checkout.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def _ok(checkout: Checkout, verb: str, *words: str) -> str:
    done = _mlflow(checkout, verb, *words)
    assert done.returncode == 0, f"{verb} {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _refused(checkout: Checkout, verb: str, *words: str) -> str:
    """What it says when it ends as a refusal does, in three parts and without a traceback."""
    done = _mlflow(checkout, verb, *words)
    assert done.returncode == 3, f"{verb} {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "expected:" in done.stderr
    assert "next:" in done.stderr
    return done.stderr


def _listed(checkout: Checkout, target: str) -> dict[str, dict[str, Any]]:
    text = _ok(checkout, "list", "-t", target).partition("List of all deployments:\n")[2]
    return {one["name"]: one for one in ast.literal_eval(text.strip())}


def _predicted(checkout: Checkout, target: str, folder: Path) -> dict[str, Any]:
    golden = json.loads((checkout.folder / "results" / COMPONENT / "train" / "golden.json").read_text())
    (folder / "in.json").write_text(json.dumps({"instances": golden["instances"][:3]}))
    words = ("-t", target, "--name", COMPONENT, "-I", str(folder / "in.json"), "-O", str(folder / "out.json"))
    _ok(checkout, "predict", *words)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    assert len(found["predictions"]) == 3
    return found


def _aliases(checkout: Checkout) -> dict[str, str]:
    url = f"{checkout.tracking}/api/2.0/mlflow/registered-models/get"
    found = urllib3.request("GET", url, fields={"name": COMPONENT}).json()["registered_model"]
    return {one["alias"]: one["version"] for one in found.get("aliases", [])}


def _version(checkout: Checkout, number: str) -> dict[str, Any]:
    url = f"{checkout.tracking}/api/2.0/mlflow/model-versions/get"
    found: dict[str, Any] = urllib3.request("GET", url, fields={"name": COMPONENT, "version": number}).json()
    return found["model_version"]  # type: ignore[no-any-return]


def test_what_is_deployed_is_listed_and_another_version_takes_its_place(deployed: Checkout, tmp_path: Path) -> None:
    listed = _listed(deployed, "torchserve")[COMPONENT]
    assert (listed["perimeter"], listed["healthy"]) == ("dev", True)
    other = {"1": "2", "2": "1"}[listed["version"]]
    words = ("-t", "torchserve", "--name", COMPONENT, "-m", f"models:/{COMPONENT}/{other}")
    assert "mlflow deployments update" in _refused(deployed, "create", *words)
    assert f"Deployment {COMPONENT} is updated" in _ok(deployed, "update", *words)
    assert _predicted(deployed, "torchserve", tmp_path)["metadata"]["x-model-version"] == other
    described = _ok(deployed, "get", "-t", "torchserve", "--name", f"{COMPONENT}/{other}.0")
    assert f"version: {other}\n" in described
    assert f"nodes: {{'dev-1': {{'{other}': 'healthy'}}}}" in described
    assert _aliases(deployed)["dev-live"] == other


def test_in_dev_a_deployment_is_deleted_and_created_anew_from_its_run(deployed: Checkout, tmp_path: Path) -> None:
    _ok(deployed, "delete", "-t", "torchserve", "--name", COMPONENT)
    _ok(deployed, "delete", "-t", "torchserve", "--name", COMPONENT)
    assert _listed(deployed, "torchserve") == {}
    assert not {"dev", "dev-live"} & _aliases(deployed).keys()
    assert urllib3.request("POST", f"{deployed.gateway}/predictions/{COMPONENT}", body=b"{}").status == 404
    _refused(deployed, "get", "-t", "torchserve", "--name", COMPONENT)
    version = _version(deployed, "2")
    words = ("-m", f"runs:/{version['run_id']}/model", "-C", "VERSION=2.0", "-C", f"EXPORT_PATH={tmp_path}")
    assert "is created" in _ok(deployed, "create", "-t", "torchserve", "--name", COMPONENT, *words)
    assert _predicted(deployed, "torchserve", tmp_path)["metadata"]["x-model-version"] == "2"
    exported = hashlib.sha256((tmp_path / f"{COMPONENT}.mar").read_bytes()).hexdigest()
    assert exported == {tag["key"]: tag["value"] for tag in version["tags"]}["torchrelay.archive.digest"]


def test_production_takes_and_replaces_a_version_and_is_never_emptied(deployed: Checkout, tmp_path: Path) -> None:
    target = "torchserve:production"
    assert _listed(deployed, target) == {}
    _refused(deployed, "update", "-t", target, "--name", COMPONENT, "-m", f"models:/{COMPONENT}/1")
    for verb, version in (("create", "1"), ("update", "2")):
        _ok(deployed, verb, "-t", target, "--name", COMPONENT, "-m", f"models:/{COMPONENT}/{version}")
        assert _predicted(deployed, target, tmp_path)["metadata"]["x-model-version"] == version
        listed = _listed(deployed, target)[COMPONENT]
        assert (listed["version"], listed["healthy"]) == (version, True)
        assert _aliases(deployed)["production-live"] == version
    said = _refused(deployed, "delete", "-t", target, "--name", COMPONENT)
    assert "make rollback" in said
    assert _predicted(deployed, target, tmp_path)["metadata"]["x-model-version"] == "2"


def test_what_was_never_judged_moves_no_alias(deployed: Checkout) -> None:
    version = _version(deployed, "2")
    source = version["source"]
    body = {"name": COMPONENT, "source": source, "run_id": version["run_id"], "model_id": source.split("/")[-1]}
    made = urllib3.request("POST", f"{deployed.tracking}/api/2.0/mlflow/model-versions/create", json=body).json()
    number = made["model_version"]["version"]
    before = _aliases(deployed)
    for target in ("torchserve", "torchserve:production"):
        verb = "update" if _listed(deployed, target) else "create"
        said = _refused(deployed, verb, "-t", target, "--name", COMPONENT, "-m", f"models:/{COMPONENT}/{number}")
        assert "never judged" in said
    assert _aliases(deployed) == before
