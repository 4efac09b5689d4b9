"""The plugin against MLflow's own plugin manager and command line, with a site of files and a gateway that echoes."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from torchrelay.config import Node, Perimeter, Site, TrackingServer
from torchrelay.delivery import mlflow_arguments, reach, request
from torchrelay.delivery import store as store_module
from torchrelay.delivery.mlflow_arguments import Options, perimeter_of, request_body, version_of
from torchrelay.delivery.store import State, Store
from torchrelay.errors import ConfigError, RefusedError, ServingError
from torchrelay.handover import Endpoint, HeldVersion, NodeReport, RouteShare, WantedVersion
from torchrelay.tracking import ModelVersion

LIVE = WantedVersion(
    component="digits",
    version="3",
    digest="d3",
    environment="e",
    url="http://x",
    workers=1,
    batch_size=1,
    max_batch_delay_ms=1,
    response_timeout_s=1,
    max_body_bytes=1024,
)


class Registry:
    """Four versions of `digits`, of which 3 is @best."""

    def __init__(self, _url: str = "") -> None:
        self.all = [
            ModelVersion(
                name="digits",
                version=str(n),
                run_id=f"run{n}",
                source=f"models:/m-{n}",
                status="READY",
                tags={},
                aliases=(),
            )
            for n in (1, 2, 3, 4)
        ]

    def versions(self, name: str) -> list[ModelVersion]:
        return [one for one in self.all if one.name == name]

    def version(self, name: str, version: str) -> ModelVersion | None:
        return next((one for one in self.versions(name) if one.version == version), None)

    def alias(self, name: str, alias: str) -> ModelVersion | None:
        return self.version(name, "3") if alias == "best" else None

    def version_of_run(self, name: str, run_id: str) -> ModelVersion | None:
        return next((one for one in self.versions(name) if one.run_id == run_id), None)

    def aliases(self, name: str) -> dict[str, str]:
        return {"dev": "4", "production": "3"} if name == "digits" else {}


class _Echo(BaseHTTPRequestHandler):
    """Answers with one prediction for each instance, or 400 where there is none."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200 if body["instances"] else 400)
        self.send_header("x-model-version", "3")
        self.end_headers()
        self.wfile.write(json.dumps({"predictions": [{"got": one} for one in body["instances"]]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def gateway() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def plugin() -> Any:
    """The module as MLflow finds it: by the entry point, accepted by its plugin manager."""
    from mlflow.deployments.plugin_manager import DeploymentPlugins

    return DeploymentPlugins()["torchserve:production"]


@pytest.fixture
def asked(plugin: Any, gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """A site whose two perimeters serve version 3 of `digits` on one node; what is asked of them: verb, where, what."""
    for name in ("EXPORT_PATH", "CONFIG_PROPERTIES", "EXPORT_URL"):
        monkeypatch.delenv(name, raising=False)
    perimeters = {
        name: Perimeter(alias=name, gateway=gateway, nodes=(Node(name="n1", folder=tmp_path),), gateway_node="n1")
        for name in ("dev", "production")
    }
    here = Site(supervisor=tmp_path, tracking=TrackingServer(url="http://x"), perimeters=perimeters)
    monkeypatch.setattr(plugin, "site", lambda: here)
    monkeypatch.setattr("torchrelay.tracking.Tracking", Registry)
    monkeypatch.setattr(store_module, "store", lambda name: Store(tmp_path / f"{name}.db"))
    for name in perimeters:
        memory = store_module.store(name)
        with memory.lease(1) as token:
            memory.save(State(component="digits", live=LIVE), token)
    monkeypatch.setattr(reach, "observe_on", lambda node: _report(node.name))
    calls: list[tuple[str, str, str]] = []
    monkeypatch.setattr(request, "deploy", lambda _h, p, w, *, why, timeout_s: calls.append((why, p, w.version)))
    monkeypatch.setattr(request, "withdraw", lambda _h, p, name, *, why, timeout_s: calls.append((why, p, name)))
    return calls


def _report(node: str) -> NodeReport:
    endpoint = Endpoint(host="127.0.0.1", port=1)
    held = HeldVersion(component="digits", version="3", digest="d3", healthy=True, endpoint=endpoint, path="/p")
    share = RouteShare(component="digits", version="3", digest="d3", weight=100)
    return NodeReport(node=node, held=(held,), routed=(share,), gateway_healthy=True)


def _mlflow(*words: str) -> Result:
    from mlflow.deployments.cli import commands

    return CliRunner().invoke(commands, list(words))


def _errs(result: Result, *words: str) -> None:
    """It ended with an error in three parts that says `words`."""
    assert result.exit_code in (1, 3)
    assert isinstance(result.exception, SystemExit), result.exception
    for word in ("expected:", "next:", *words):
        assert word in result.output


def test_mlflow_finds_the_plugin_and_its_help() -> None:
    said = _mlflow("help", "-t", "torchserve")
    assert said.exit_code == 0
    assert "torchserve:production" in said.output


def test_the_plugin_adds_little_to_what_mlflow_has_loaded() -> None:
    code = (
        "import sys, mlflow.deployments; before = set(sys.modules); import torchrelay.delivery.mlflow_plugin;"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"torchrelay", "click"}


@pytest.mark.parametrize(
    ("target", "perimeter"),
    [
        ("torchserve", "dev"),
        ("torchserve:production", "production"),
        ("torchserve:/production", "production"),
        ("torchserve://production", "production"),
        ("torchserve:production/", "production"),
    ],
)
def test_a_target_names_a_perimeter(target: str, perimeter: str) -> None:
    assert perimeter_of(target) == perimeter


@pytest.mark.parametrize(
    "target", ["torchserver", "sagemaker:/x", "torchserve:a/b", "torchserve:dev?x=1", "torchserve:#a"]
)
def test_another_target_is_an_error(target: str) -> None:
    with pytest.raises(ConfigError):
        perimeter_of(target)


def test_a_perimeter_that_is_not_there_is_named_with_those_that_are(asked: list[Any]) -> None:
    _errs(_mlflow("list", "-t", "torchserve:prod"), "'prod'", "torchserve:dev, torchserve:production")


@pytest.mark.parametrize(
    ("uri", "version"),
    [
        ("models:/digits/2", "2"),
        ("models:/digits@best", "3"),
        ("models:/m-4", "4"),
        ("runs:/run1/model", "1"),
        ("runs:/run1", "1"),
    ],
)
def test_a_model_uri_names_a_version(uri: str, version: str) -> None:
    assert version_of(Registry(), "digits", uri).version == version  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/digits/9", "no registered version"),
        ("models:/digits@worst", "no registered version"),
        ("models:/m-9", "no registered version"),
        ("runs:/run9/model", "no registered version"),
        ("models:/letters/1", "--name letters"),
        ("models:/digits/latest", "-m models:/digits/VERSION"),
        ("models:/digits/Production", "-m models:/digits/VERSION"),
        ("models:/digits", "-m models:/digits/VERSION"),
        ("models/titanic_state_dict.pt", "-m models:/digits/VERSION"),
        ("file:///home/ubuntu/models", "-m models:/digits/VERSION"),
        ("s3://bucket/model", "-m models:/digits/VERSION"),
    ],
)
def test_what_names_no_version_is_refused_with_the_way_to_one(uri: str, said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        version_of(Registry(), "digits", uri)  # type: ignore[arg-type]


# Every option of mlflow-torchserve's documents and code, as they wrote it, and what the refusal must name.
UPSTREAM = {
    "MODEL_FILE=titanic.py": "components/digits/model.py",
    "HANDLER=titanic_handler.py": "components/digits/handler.py",
    "EXTRA_FILES=index_to_name.json,vocab.txt": "components/digits",
    "REQUIREMENTS_FILE=requirements.txt": "components/digits/requirements.in",
    "min-worker=2": "serving.workers",
    "min_worker=2": "serving.workers",
    "max-worker=4": "serving.workers",
    "initial_workers=1": "serving.workers",
    "batch_size=8": "serving.batch_size",
    "max_batch_delay=50": "serving.max_batch_delay_ms",
    "response_timeout=120": "serving.response_timeout_s",
    "set-default=true": "leave it out",
    "synchronous=true": "timeout=0",
    "number_gpu=1": "variant: cuda",
    "device=gpu": "variant: cuda",
    "config_properties=config.properties": "inventory",
    "export_url=http://x": "leave it out",
    "colour=red": "EXPORT_PATH",
    "VERSION=1.0": "models:/digits/1",
    "timeout=soon": "seconds",
}


@pytest.mark.parametrize("option", UPSTREAM)
@pytest.mark.parametrize("verb", ["create", "update"])
def test_an_option_of_the_earlier_plugin_is_refused_with_the_new_way(
    verb: str, option: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch, plugin: Any
) -> None:
    if verb == "create":
        monkeypatch.setattr(plugin._Here, "live", lambda *_: None)
    result = _mlflow(verb, "-t", "torchserve", "--name", "digits", "-m", "models:/digits/3", "-C", option)
    _errs(result, UPSTREAM[option])
    assert asked == []


def test_the_setting_of_remote_torchserves_is_refused_and_not_forgotten(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFIG_PROPERTIES", "config.properties")
    _errs(_mlflow("update", "-t", "torchserve", "--name", "digits", "-m", "models:/digits/3"), "inventory")
    assert asked == []


def test_accepted_options_are_read_in_any_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXPORT_PATH", str(tmp_path / "store"))
    found = Options.read("digits", {"version": "3.0", "Timeout": "1.5"})
    assert found == Options("3.0", tmp_path / "store", 1.5)
    assert Options.read("digits", {"export-path": "here"}).export_path == Path("here")
    assert Options.read("digits", {}).timeout_s == request.PATIENCE_S


@pytest.mark.parametrize(
    ("words", "error"), [(("--endpoint", "e"), "one gateway"), (("--flavor", "pytorch"), "archive")]
)
def test_what_this_target_does_not_have_is_refused(words: tuple[str, str], error: str, asked: list[Any]) -> None:
    _errs(_mlflow("update", "-t", "torchserve", "--name", "digits", "-m", "models:/digits/3", *words), error)
    assert asked == []


def test_create_asks_for_the_version_and_says_its_name(asked: list[Any], plugin: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(plugin._Here, "live", lambda *_: None)
    said = _mlflow("create", "-t", "torchserve:production", "--name", "digits", "-m", "models:/digits@best")
    assert "mar deployment digits is created" in said.output
    assert asked == [("mlflow deployments create", "production", "3")]


def test_create_of_what_is_there_is_mlflows_conflict(asked: list[Any], plugin: Any) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match="mlflow deployments update -t torchserve --name digits") as caught:
        plugin.TorchServeClient("torchserve").create_deployment("digits", "models:/digits/4")
    assert caught.value.error_code == "RESOURCE_ALREADY_EXISTS"
    assert asked == []


def test_update_asks_for_the_version(asked: list[Any]) -> None:
    said = _mlflow("update", "-t", "torchserve", "--name", "digits/3.0", "-m", "runs:/run4/model", "-C", "VERSION=4.0")
    assert "Deployment digits/3.0 is updated (with flavor mar)" in said.output
    assert asked == [("mlflow deployments update", "dev", "4")]


def test_update_of_what_is_not_there_is_mlflows_absence(asked: list[Any], plugin: Any) -> None:
    from mlflow.exceptions import MlflowException

    client = plugin.TorchServeClient("torchserve")
    for call in (
        lambda: client.update_deployment("letters", "models:/letters/1"),
        lambda: client.get_deployment("letters"),
    ):
        with pytest.raises(MlflowException, match="one of: digits") as caught:
            call()
        assert caught.value.error_code == "RESOURCE_DOES_NOT_EXIST"
    with pytest.raises(MlflowException, match="serves version 3 of digits, not 2"):
        client.get_deployment("digits/2.0")


def test_an_update_without_a_version_says_what_it_lacks(asked: list[Any]) -> None:
    _errs(_mlflow("update", "-t", "torchserve", "--name", "digits"), "needs a model URI")
    _errs(_mlflow("update", "-t", "torchserve", "--name", "digits", "-C", "min-worker=2"), "serving.workers")
    assert asked == []


def test_delete_withdraws_and_does_so_again_without_an_error(asked: list[Any]) -> None:
    for name in ("digits", "digits/3.0", "letters", "letters/1.0"):
        assert _mlflow("delete", "-t", "torchserve", "--name", name).exit_code == 0
    assert asked == [("mlflow deployments delete", "dev", name) for name in ("digits", "digits", "letters", "letters")]
    _errs(_mlflow("delete", "-t", "torchserve", "--name", "digits/2.0"), "serves version 3")


def test_list_and_get_say_what_nodes_say(asked: list[Any], plugin: Any) -> None:
    client = plugin.TorchServeClient("torchserve")
    short = {"name": "digits", "flavor": "mar", "perimeter": "dev", "version": "3", "digest": "d3", "healthy": True}
    assert client.list_deployments() == [short]
    found = client.get_deployment("digits/all")
    assert short.items() <= found.items()
    assert (found["requested"], found["percent"], found["nodes"]) == ("4", {"3": 100}, {"n1": {"3": "healthy"}})
    assert "nodes: {'n1': {'3': 'healthy'}}" in _mlflow("get", "-t", "torchserve", "--name", "digits").output


def test_a_node_that_does_not_answer_is_not_healthy(asked: list[Any], plugin: Any, monkeypatch: Any) -> None:
    def silent(node: Node) -> NodeReport:
        raise ServingError(f"{node.name} does not answer", "an answer", "make up")

    monkeypatch.setattr(reach, "observe_on", silent)
    found = plugin.TorchServeClient("torchserve").get_deployment("digits")
    assert (found["version"], found["healthy"], found["nodes"]) == ("3", False, {"n1": "does not answer"})


@pytest.mark.parametrize(
    ("text", "instances"),
    [
        ('{"instances": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]}', [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]),
        ('{"instances": [{"date": "2020-01-01", "x": 1.25}]}', [{"date": "2020-01-01", "x": 1.25}]),
        ('[{"a": 1, "b": "x"}, {"a": 2.5, "b": null}]', [{"a": 1.0, "b": "x"}, {"a": 2.5, "b": None}]),
        ('{"data": ["This year business is good"]}', [{"data": "This year business is good"}]),
        ("[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]", [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]),
        ("[[0.123456789012, 2.0]]", [[0.123456789012, 2]]),
    ],
)
def test_a_file_is_sent_as_the_instances_that_it_holds(
    text: str, instances: list[Any], asked: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "in.json").write_text(text)
    words = ("-t", "torchserve", "--name", "digits", "-I", str(tmp_path / "in.json"))
    said = _mlflow("predict", *words)
    assert said.exit_code == 0, said.output
    answer = json.loads(said.output)
    assert [one["got"] for one in answer["predictions"]] == instances
    assert answer["metadata"]["x-model-version"] == "3"
    _mlflow("predict", *words, "-O", str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == answer


@pytest.mark.parametrize(
    "inputs",
    [
        np.array([[1, 2], [3, 4]]),
        [[1, 2], [3, 4]],
        [np.array([1, 2]), np.array([3, 4])],
        {"instances": [[1, 2], [np.int64(3), 4]]},
        '{"instances": [[1, 2], [3, 4]]}',
        b'{"instances": [[1, 2], [3, 4]]}',
        pd.DataFrame([[1, 2], [3, 4]]),
        pd.DataFrame({"instances": [np.array([1, 2]), [3, 4]]}),
    ],
)
def test_python_callers_may_send_what_they_have(inputs: Any) -> None:
    assert json.loads(request_body(inputs)) == {"instances": [[1, 2], [3, 4]]}


@pytest.mark.parametrize("inputs", [pd.DataFrame({"date": pd.to_datetime(["2020-01-01"])}), 3, None, [object()]])
def test_inputs_that_cannot_be_said_in_json_are_refused(inputs: Any) -> None:
    with pytest.raises(ConfigError):
        request_body(inputs)


def test_a_request_that_the_component_refuses_is_an_error(asked: list[Any], plugin: Any) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match="answered 400"):
        plugin.TorchServeClient("torchserve").predict("digits", [])


def test_explanations_are_refused_with_what_to_do(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('{"instances": [[1]]}')
    result = _mlflow("explain", "-t", "torchserve", "--name", "digits", "-I", str(tmp_path / "in.json"))
    _errs(result, "no explanations", "mlflow deployments predict")


def test_run_local_goes_to_dev_whatever_serves_there(asked: list[Any], plugin: Any, monkeypatch: Any) -> None:
    words = ("run-local", "-t", "torchserve", "--name", "digits", "-m", "models:/digits/2")
    assert _mlflow(*words).exit_code == 0
    monkeypatch.setattr(plugin._Here, "live", lambda *_: None)
    assert _mlflow(*words).exit_code == 0
    assert asked == [("mlflow deployments update", "dev", "2"), ("mlflow deployments create", "dev", "2")]


def test_the_page_names_every_option(asked: list[Any]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "mlflow-deployments.md").read_text(encoding="utf-8")
    arguments = mlflow_arguments
    options = (*arguments._ACCEPTED, *arguments._PACKED, *arguments._SERVING, *arguments._REPLACED)
    assert not [option for option in options if option.lower() not in page.lower().replace("-", "_")]
