"""What is measured: the gateway, the engine behind it, and `mlflow models serve` of the same model version."""

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from report import say
from torchrelay.components import install_torch
from torchrelay.config import root, settings, site
from torchrelay.errors import ConfigError, ServingError
from torchrelay.serving import gateway
from torchrelay.serving.apply import last_desired, node_config
from torchrelay.serving.ports import HOST

_HERE = Path(__file__).resolve().parent
_START_S = 180


@dataclass(frozen=True)
class Deployed:
    """What the dev perimeter serves of a component, and the addresses in front of and behind its gateway."""

    component: str
    version: str
    digest: str
    gateway: str
    engine: str
    workers: int
    archive: Path


def deployed(name: str) -> Deployed:
    """The component as it is served now; ConfigError where it is not."""
    perimeter = site().perimeters["dev"]
    node = node_config(perimeter.nodes[0].folder)
    backend = next((found for found in gateway.live_backends(node.gateway) if found.component == name), None)
    if backend is None:
        raise ConfigError(f"dev does not serve {name}", "a served model", f"make deploy-dev COMPONENT={name}")
    point = backend.endpoints[0]
    told = next(one for one in last_desired(node).components if one.component == name)
    return Deployed(
        component=name,
        version=backend.version,
        digest=backend.digest,
        gateway=f"{perimeter.gateway}/predictions/{name}",
        engine=f"http://{point.host}:{point.port}{backend.path}",
        workers=told.workers,
        archive=node.folder / "archives" / backend.digest / "model.mar",
    )


def unpack(archive: Path, target: Path) -> None:
    """The archive that is served, for the forward pass without any server."""
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(target)


def mlflow_environment() -> Path:
    """The interpreter that runs `mlflow models serve`, in an environment built on the first call."""
    folder = settings().state / "bench" / "mlflow"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = _HERE / "requirements.txt"
    subprocess.run([sys.executable, root() / "requirements" / "install", "--venv", folder, "--lock", lock], check=True)
    python = folder / "bin" / "python"
    if not list(folder.glob("lib/python*/site-packages/torch/__init__.py")):
        pinned = root() / "components" / "fashion_mnist" / "requirements.torch"
        say("installing torch for mlflow")
        install_torch(python, pinned, folder / "torch.log")
    return python


@contextmanager
def mlflow_server(python: Path, target: Deployed, port: int) -> Iterator[str]:
    """`mlflow models serve` of the same version with as many workers, one thread each; yields its URL."""
    log = settings().state / "bench" / "serving" / "mlflow.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    model = f"models:/{target.component}/{target.version}"
    command: list[str | Path] = [
        python.with_name("mlflow"),
        "models",
        "serve",
        "--model-uri",
        model,
        "--env-manager",
        "local",
    ]
    options = ["--host", HOST, "--port", str(port), "--workers", str(target.workers)]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*command, *options],
            env=_mlflow_variables(python),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await(f"http://{HOST}:{port}/ping", child, log)
        yield f"http://{HOST}:{port}/invocations"
    finally:
        _end(child)


def _mlflow_variables(python: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "MLFLOW_TRACKING_URI": site().tracking.url,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _await(url: str, child: "subprocess.Popen[bytes]", log: Path) -> None:
    import urllib3

    end = time.monotonic() + _START_S
    while time.monotonic() < end and child.poll() is None:
        try:
            if urllib3.request("GET", url, timeout=2, retries=False).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            time.sleep(0.2)
    raise ServingError(f"no answer from {url}", f"mlflow models serve within {_START_S} s", f"read {log}")


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End the server and its workers: they share its process group."""
    for signal in (15, 9):
        try:
            os.killpg(child.pid, signal)
        except ProcessLookupError:
            break
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            continue
        if signal == 15:
            time.sleep(1)
    child.wait()
