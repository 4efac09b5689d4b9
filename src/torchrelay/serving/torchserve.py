"""The TorchServe adapter: everything the project knows of TorchServe stands here.

TorchServe is Java with one Python process per worker. The supervisor runs Java itself, not `torchserve`, which starts
Java and walks away. An instance shares nothing with another one: it has its own ports, temporary folder, model store,
logging, and a working directory that all the rest is relative to. It comes up empty after a crash, by intention:
`apply` loads again what is wanted, so there is no second memory of it (snapshots are off).
"""

import json
import os
import re
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, urlencode

from torchrelay.config import write_file
from torchrelay.errors import ServingError
from torchrelay.handover import Endpoint, WantedVersion
from torchrelay.serving.engine import Answer, Engine, Instance, Loaded, Program, digest_file

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

_STARTUP_S = 120
_UNLOAD_S = 30
_LOG_SETTLE_S = 2.0

# An engine that was killed leaves unpacked models and libraries behind, and it comes up empty: so do its folders.
# The temporary one is named through /proc because workers listen on sockets in it, whose names must stay under 108
# characters however deep the state folder lies; `exec` keeps the process id, so $$ is Java's.
_LAUNCH = (
    "rm -rf tmp model-store digests && mkdir tmp model-store digests && "
    'exec "$0" "-Djava.io.tmpdir=/proc/$$/cwd/tmp" "$@"'
)

_JVM = (
    "-Xms32m",
    "-Xmx512m",
    "-Xss512k",
    "-XX:+UseSerialGC",
    "-XX:-UsePerfData",  # else it writes to /tmp/hsperfdata_*
    "-XX:+ExitOnOutOfMemoryError",  # the supervisor mends a dead engine, nobody mends a half-dead one
    "-XX:ErrorFile=hs_err.log",
    "--enable-native-access=ALL-UNNAMED",
)

# Models are registered by their file name in the model store, so no URL is ever allowed. The gRPC servers cannot be
# switched off: port 0 lets the system pick one that is free, on loopback.
_PROPERTIES = """\
inference_address=http://127.0.0.1:{ports[0]}
management_address=http://127.0.0.1:{ports[1]}
metrics_address=http://127.0.0.1:{ports[2]}
grpc_inference_address=127.0.0.1
grpc_management_address=127.0.0.1
grpc_inference_port=0
grpc_management_port=0
disable_token_authorization=true
enable_model_api=true
allowed_urls=none
enable_envvars_config=false
install_py_dep_per_model=false
default_workers_per_model=1
default_response_timeout={response_timeout_s}
default_startup_timeout={startup_s}
unregister_model_timeout={unload_s}
max_request_size={max_request_size}
max_response_size={max_request_size}
metrics_mode=prometheus
disable_system_metrics=true
"""

# As installed, TorchServe writes about twelve lines a request. MODEL_LOG is what the workers print: rare, and the
# only place where a failing handler says why, so it stays on.
_LOG4J = """\
<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="WARN">
  <Appenders>
    <Console name="console" target="SYSTEM_OUT">
      <PatternLayout pattern="%d{ISO8601} %p [%t] %m%n"/>
    </Console>
  </Appenders>
  <Loggers>
    <Root level="warn"><AppenderRef ref="console"/></Root>
    <Logger name="MODEL_LOG" level="info" additivity="false"><AppenderRef ref="console"/></Logger>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
  </Loggers>
</Configuration>
"""


class TorchServe(Engine):
    """One TorchServe instance; see Engine for the contract of each method."""

    ports_needed: ClassVar[int] = 3

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.folder = instance.folder
        self.store = instance.folder / "model-store"

    def prepare(self) -> Program:
        """Write config.properties and log4j2.xml; ServingError if the environment or the Java is not usable."""
        write_file(self.folder / "config.properties", self._properties().encode())
        write_file(self.folder / "log4j2.xml", _LOG4J.encode())
        return Program(
            name=self.instance.name,
            command=("/bin/sh", "-c", _LAUNCH, *self._java()),
            environment=self._environment(),
            directory=self.folder,
            log=self.instance.log,
            stop_wait_s=15,
        )

    def ready(self) -> bool:
        """Whether the management API answers; it opens after the inference API."""
        try:
            return self._manage("GET", "/models?limit=1", timeout=5).status == 200
        except ServingError:
            return False

    def load(self, archive: Path, wanted: WantedVersion) -> None:
        """Register the archive and wait until each worker is READY."""
        held = self._held(wanted.component, wanted.version)
        if held is not None and held.healthy and held.digest == wanted.digest:
            return
        if held is not None:
            self.unload(wanted.component, wanted.version)
        self.check_archive(archive / "model.mar", wanted)
        self._place(archive / "model.mar", wanted)
        offset = _size(self.instance.log)
        try:
            self._register(wanted)
            self._await_workers(wanted)
        except ServingError as error:
            # Out with it at once: TorchServe would start its crashing workers again for ever.
            self.unload(wanted.component, wanted.version)
            raise self._explained(error, wanted, offset) from error

    def loaded(self) -> list[Loaded]:
        """All versions of all components, the digest read from the file name that TorchServe reports."""
        return [_loaded(found) for name in self._names() for found in self._describe(name, "all")]

    def predict(self, component: str, version: str, body: bytes, headers: dict[str, str]) -> Answer:
        """POST to the inference API of that version."""
        timeout = self.instance.response_timeout_s + 5
        where = f"{self.instance.ports[0]}{self.path(component, version)}"
        answer = self._call("POST", where, body, headers, timeout=timeout)
        found = {name.lower(): value for name, value in answer.headers.items()}
        return Answer(status=answer.status, headers=found, body=answer.data)

    def unload(self, component: str, version: str) -> None:
        """Unregister, and wait until the version and the processes of its workers are gone."""
        described = self._describe(component, version)
        if described:
            self._move_default(component, version)
            answer = self._manage("DELETE", _model(component, version), timeout=_UNLOAD_S + 5)
            if answer.status not in (200, 202, 404):
                raise self._refused(f"would not unload {component} version {version}", answer)
            self._await_gone(component, version, [worker["pid"] for worker in described[0]["workers"]])
        for file in self.store.glob(f"{component}-{version}-*.mar"):
            file.unlink()
        digest_file(self.folder, component, version).unlink(missing_ok=True)

    def metrics(self) -> str:
        """The answer of the metrics API."""
        return self._call("GET", f"{self.instance.ports[2]}/metrics").data.decode()

    def endpoint(self, component: str, version: str) -> Endpoint:
        """The inference API; the management API alone knows whether a version has a worker that is READY."""
        return Endpoint(
            host="127.0.0.1",
            port=self.instance.ports[0],
            health_port=self.instance.ports[1],
            health_path=_model(component, version),
            health_text='"status": "READY"',
        )

    def path(self, component: str, version: str) -> str:
        """The versioned predictions path."""
        return f"/predictions/{quote(component, safe='')}/{quote(version, safe='')}"

    def check_archive(self, mar: Path, wanted: WantedVersion) -> None:
        """Refuse what would be registered under another version than the wanted one."""
        next_command = f"make deploy-dev COMPONENT={wanted.component}"
        try:
            with zipfile.ZipFile(mar) as archive:
                model = json.loads(archive.read("MAR-INF/MANIFEST.json"))["model"]
                found = f"{model['modelName']} version {model['modelVersion']}"
        except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
            raise ServingError(f"{mar} is not a model archive: {error}", "a .mar file", next_command) from error
        expected = f"{wanted.component} version {wanted.version}"
        if found != expected:
            raise ServingError(f"{mar} is {found}", expected, next_command)

    def _properties(self) -> str:
        return _PROPERTIES.format(
            ports=self.instance.ports,
            response_timeout_s=self.instance.response_timeout_s,
            startup_s=_STARTUP_S,
            unload_s=_UNLOAD_S,
            max_request_size=self.instance.max_body_bytes + 2**20,  # the gateway refuses first
        )

    def _java(self) -> tuple[str, ...]:
        java = self.instance.java_home / "bin" / "java"
        if not os.access(java, os.X_OK):
            raise ServingError(f"{java} cannot be run", "a Java 17 or later", "make setup")
        home = _torchserve_home(self.instance.python)
        return (
            str(java),
            *_JVM,
            f"-Dmodel_server_home={home}",
            f"-Dlog4j.configurationFile={(self.folder / 'log4j2.xml').absolute().as_uri()}",
            "-cp",
            f"{home}/ts/frontend/*",
            "org.pytorch.serve.ModelServer",
            *("--python", self.instance.python),
            *("-f", "config.properties"),
            *("-s", "model-store"),
            "-ncs",
        )

    def _environment(self) -> dict[str, str]:
        return {
            "TORCHRELAY_INSTANCE": str(self.folder.absolute()),
            "TORCHRELAY_PREDICTIONS": str(self.instance.predictions.absolute()) if self.instance.predictions else "",
            "TORCHRELAY_KEEP_INPUTS": "1" if self.instance.keep_inputs else "",
            "TORCHRELAY_MEMORY_MB": str(self.instance.max_memory_mb),
            "TMPDIR": str(self.folder.absolute() / "tmp"),
            "OMP_NUM_THREADS": "1",  # else every worker takes every core: 2.4 to 12 times slower
            "MKL_NUM_THREADS": "1",
            "LC_ALL": "C.UTF-8",  # Java reads file names by it
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _place(self, mar: Path, wanted: WantedVersion) -> None:
        """Put the archive into the model store, whole or not at all, and say its digest to the workers."""
        target = self.store / _store_name(wanted)
        aside = target.with_suffix(".part")
        aside.unlink(missing_ok=True)
        try:
            os.link(mar, aside)
        except OSError:  # another file system
            shutil.copyfile(mar, aside)
        aside.replace(target)
        aside.unlink(missing_ok=True)  # rename does nothing when both names are links to one file
        write_file(digest_file(self.folder, wanted.component, wanted.version), wanted.digest.encode())

    def _register(self, wanted: WantedVersion) -> None:
        """Have the workers started, without waiting for them.

        A synchronous registration holds one of TorchServe's few event loops until they are up, and with it every
        connection of callers that happens to hang on that loop: a quarter of them stood still for seconds.
        """
        query = {
            "url": _store_name(wanted),
            "model_name": wanted.component,
            "initial_workers": wanted.workers,
            "synchronous": "false",
            "batch_size": wanted.batch_size,
            "max_batch_delay": wanted.max_batch_delay_ms,
            "response_timeout": wanted.response_timeout_s,
            "startup_timeout": _STARTUP_S,
        }
        answer = self._manage("POST", f"/models?{urlencode(query)}", timeout=30)
        if answer.status >= 300:
            raise self._refused(f"would not load {wanted.component} version {wanted.version}", answer)

    def _await_workers(self, wanted: WantedVersion) -> None:
        """Poll until every worker is READY. One whose process has ended never will be: it is restarted in vain."""
        end, loading = time.monotonic() + _STARTUP_S, set[int]()
        while True:
            workers = [
                worker for found in self._describe(wanted.component, wanted.version) for worker in found["workers"]
            ]
            states = [worker["status"] for worker in workers]
            if states == ["READY"] * wanted.workers:
                return
            loading |= {worker["pid"] for worker in workers if worker["pid"] > 0}
            if not all(map(_alive, loading)):
                raise self._error("lost a worker while it loaded the model", f"{wanted.workers} workers READY")
            if time.monotonic() > end:
                raise self._error(f"has workers {states}", f"{wanted.workers} workers READY in {_STARTUP_S} s")
            time.sleep(0.05)

    def _await_gone(self, component: str, version: str, pids: Iterable[int]) -> None:
        end = time.monotonic() + _UNLOAD_S
        while self._describe(component, version) or any(_alive(pid) for pid in pids):
            if time.monotonic() > end:
                raise self._error(f"still holds {component} version {version}", f"gone within {_UNLOAD_S} s")
            time.sleep(0.02)

    def _move_default(self, component: str, version: str) -> None:
        """The default version cannot be unregistered while there is another; nobody asks for the default anyway."""
        others = [found["modelVersion"] for found in self._describe(component, "all")]
        rest = [other for other in others if other != version]
        if rest:
            self._manage("PUT", f"{_model(component, rest[0])}/set-default")

    def _held(self, component: str, version: str) -> Loaded | None:
        return next((_loaded(found) for found in self._describe(component, version)), None)

    def _names(self) -> Iterator[str]:
        page_at = "0"
        while page_at:
            answer = self._manage("GET", f"/models?limit=100&next_page_token={page_at}")
            if answer.status != 200:
                raise self._refused("would not list its models", answer)
            page = answer.json()
            yield from (model["modelName"] for model in page["models"])
            page_at = page.get("nextPageToken", "")

    def _describe(self, component: str, version: str) -> list[dict[str, Any]]:
        """One entry a version (`all` for all of them); empty when it is not there."""
        answer = self._manage("GET", _model(component, version))
        if answer.status == 404:
            return []
        if answer.status != 200:
            raise self._refused(f"would not describe {component} version {version}", answer)
        described: list[dict[str, Any]] = answer.json()
        return described

    def _manage(self, method: str, path: str, timeout: float = 10) -> "BaseHTTPResponse":
        return self._call(method, f"{self.instance.ports[1]}{path}", timeout=timeout)

    def _call(
        self,
        method: str,
        where: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        *,
        timeout: float = 10,
    ) -> "BaseHTTPResponse":
        import urllib3

        url = f"http://127.0.0.1:{where}"
        try:
            return urllib3.request(method, url, body=body, headers=headers, timeout=timeout, retries=False)
        except urllib3.exceptions.HTTPError as error:
            raise self._error(f"does not answer on 127.0.0.1:{where}: {error}", "an answer") from error

    def _refused(self, what: str, answer: "BaseHTTPResponse") -> ServingError:
        return self._error(f"{what}: {answer.status} {answer.data[:500].decode(errors='replace')}", "a 2xx answer")

    def _error(self, what: str, expected: str) -> ServingError:
        return ServingError(f"engine {self.instance.name} {what}", expected, f"read {self.instance.log}")

    def _explained(self, error: ServingError, wanted: WantedVersion, offset: int) -> ServingError:
        """The same error with what the worker itself said last."""
        said = worker_lines(self.instance.log, offset, wanted.component, wanted.version)
        return ServingError("\n".join([error.found, *said]), error.expected, error.next_command)


def _store_name(wanted: WantedVersion) -> str:
    return f"{wanted.component}-{wanted.version}-{wanted.digest}.mar"


def _loaded(described: dict[str, Any]) -> Loaded:
    return Loaded(
        component=described["modelName"],
        version=described["modelVersion"],
        digest=described["modelUrl"].removesuffix(".mar").rpartition("-")[2],
        healthy=any(worker["status"] == "READY" for worker in described["workers"]),
    )


def _model(component: str, version: str) -> str:
    return f"/models/{quote(component, safe='')}/{quote(version, safe='')}"


def _torchserve_home(python: str) -> str:
    """The folder that holds the package `ts` of an environment, without importing it."""
    code = "import importlib.util as u; s = u.find_spec('ts'); print(s.submodule_search_locations[0] if s else '')"
    try:
        found = subprocess.run([python, "-Ic", code], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ServingError(f"{python} does not run: {error}", "a component environment", "make deploy-dev") from error
    if not found.stdout.strip():
        raise ServingError(f"{python} has no torchserve", "torchserve in requirements.in", "edit requirements.in")
    return str(Path(found.stdout.strip()).parent)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def worker_lines(log: Path, offset: int, component: str, version: str, count: int = 12) -> list[str]:
    """The last lines that the version's workers wrote after `offset`.

    They reach the log through two pipes, so this waits a little for an error to show up.
    """
    end = time.monotonic() + _LOG_SETTLE_S
    thread = re.compile(rf"\[W-\d+-{re.escape(component)}_{re.escape(version)}-std\w+\] (.*)")
    while True:
        said = [found[1] for line in _lines_after(log, offset) if (found := thread.search(line))]
        if not log.is_file() or any("Error" in line for line in said) or time.monotonic() > end:
            return said[-count:]
        time.sleep(0.1)


def _lines_after(log: Path, offset: int) -> list[str]:
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(offset if offset <= _size(log) else 0)  # a shorter log was rotated meanwhile
        return file.read().decode(errors="replace").splitlines()


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
