"""Bring one serving node to its desired state: the one command that a node runs, on a laptop and on a fleet.

`apply` is idempotent and safe to kill anywhere. What serves keeps serving until what replaces it has been
fetched, verified, loaded and proven; then the gateway swaps, what is no longer wanted drains, and is unloaded.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from torchrelay import archive
from torchrelay.config import NodeConfig, read_json, write_json
from torchrelay.console import say, show_error
from torchrelay.errors import BusyError, ServingError, TorchrelayError
from torchrelay.handover import Desired, Environment, GoldenSet, NodeReport, ServedVersion, WantedVersion
from torchrelay.serving import gateway, golden
from torchrelay.serving.engine import Engine, Instance, Loaded, engine_class
from torchrelay.serving.gateway import Backend, Endpoint, Routes
from torchrelay.serving.ports import port_taken
from torchrelay.serving.supervisor import Supervisor

_READY_SECONDS = 120
_LOCK_SECONDS = 600


class ApplyError(ServingError):
    """Some component did not reach its desired state; `report` says what the node serves all the same."""

    def __init__(self, report: NodeReport, errors: list[TorchrelayError]) -> None:
        super().__init__(errors[0].found, errors[0].expected, errors[0].next_command)
        self.report = report
        self.errors = errors


def node_config(folder: Path) -> NodeConfig:
    """The node's own `node.json`."""
    return read_json(NodeConfig, folder / "node.json", "make up")


def last_desired(node: NodeConfig) -> Desired:
    """What this node was last asked to serve; nothing at all on a new node."""
    if not (node.folder / "desired.json").is_file():
        return Desired(perimeter=node.perimeter, components=())
    return read_json(Desired, node.folder / "desired.json", "make deploy-dev")


def apply(node: NodeConfig, desired: Desired | None = None) -> NodeReport:
    """Make `node` serve `desired`, by default what it was last asked to serve, and report what it serves.

    Raises ApplyError when a component could not be brought there: the others were, and it serves what it did before.
    """
    node.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(node.folder / "apply.lock", timeout=_LOCK_SECONDS):
            # Read under the lock: whoever asked last has written it.
            return _Apply(node).run(desired or last_desired(node))
    except Timeout as error:
        raise BusyError(
            f"another apply has held {node.folder / 'apply.lock'} for {_LOCK_SECONDS} s",
            "one apply at a time",
            "make status",
        ) from error


def keep(folder: Path, every: float) -> NoReturn:
    """Look every `every` seconds whether the node serves what it was last asked for, and mend it where it does not.

    An engine that was killed comes back empty; this loads it again without waiting for a person.
    """
    while True:
        time.sleep(every)
        try:
            report = apply(node_config(folder))
        except TorchrelayError as error:
            show_error(error)
            continue
        for mended in (served for served in report.served if served.changed):
            say(f"{time.strftime('%F %T')} mended {mended.component} version {mended.version}")


def observe(node: NodeConfig) -> NodeReport:
    """What the node serves now: routed by its gateway and healthy in its engine. Changes nothing."""
    routed = {backend.component: backend for backend in gateway.live_backends(node.gateway)}
    alive = gateway.healthy(node.gateway)
    loaded = {(found.component, found.version): found for found in _loaded_everywhere(node)}
    return NodeReport(
        node=node.name,
        served=tuple(
            ServedVersion(
                component=name,
                version=backend.version,
                digest=backend.digest,
                healthy=alive and _answers(loaded.get((name, backend.version)), backend.digest),
            )
            for name, backend in sorted(routed.items())
        ),
    )


def _answers(found: Loaded | None, digest: str) -> bool:
    return found is not None and found.healthy and found.digest == digest


def _loaded_everywhere(node: NodeConfig) -> Iterable[Loaded]:
    for file in sorted((node.folder / "engines").glob("*/instance.json")):
        engine = engine_class(node.engine)(read_json(Instance, file, "make up"))
        if engine.ready():
            yield from engine.loaded()


class _Apply:
    """One run of apply: the node, its supervisor, and what changed so far."""

    def __init__(self, node: NodeConfig) -> None:
        self.node = node
        self.supervisor = Supervisor(node.supervisor, node.programs)
        self.changed: set[str] = set()

    def run(self, desired: Desired) -> NodeReport:
        self._ensure_gateway()
        errors: list[TorchrelayError] = []
        before = {backend.component: backend for backend in gateway.live_backends(self.node.gateway)}
        last = {wanted.component: wanted for wanted in last_desired(self.node).components}
        after: list[Backend] = []
        reached: list[WantedVersion] = []
        for wanted in desired.components:
            name = wanted.component
            try:
                after.append(self._bring_up(wanted))
                reached.append(wanted)
            except TorchrelayError as error:
                errors.append(error)
                after.extend([before[name]] if name in before else [])
                reached.extend([last[name]] if name in last else [])
        try:
            if gateway.apply_routes(self.node.gateway, Routes(backends=tuple(after))):
                self.changed |= {backend.component for backend in after if before.get(backend.component) != backend}
            # What was reached, not what was asked: this is what the node goes back to by itself. Written before
            # anything drains, which takes long: a kill then must not make the keeper swap back.
            reached_state = Desired(perimeter=desired.perimeter, components=tuple(reached))
            write_json(self.node.folder / "desired.json", reached_state)
            self._retire(after)
        except TorchrelayError as error:
            errors.append(error)
        report = self._report()
        if errors:
            raise ApplyError(report, errors)
        return report

    def _report(self) -> NodeReport:
        seen = observe(self.node)
        return NodeReport(
            node=seen.node,
            served=tuple(
                served.model_copy(update={"changed": served.component in self.changed}) for served in seen.served
            ),
        )

    def _ensure_gateway(self) -> None:
        place = self.node.gateway
        gateway.write_bootstrap(place)
        self.supervisor.ensure(gateway.gateway_program(place, self.node.logs / f"{self.node.perimeter}-gateway.log"))
        _wait(lambda: gateway.healthy(place), _READY_SECONDS, f"gateway on port {place.port}", self.node.logs)

    def _bring_up(self, wanted: WantedVersion) -> Backend:
        """Fetched, verified, loaded and proven: only then is a version something to route to."""
        engine = self._engine(wanted)
        if not any(_is(found, wanted) and found.healthy for found in engine.loaded()):
            folder = self._archive(wanted)
            engine.load(folder, wanted)
            self._prove(engine, wanted, folder)
            self.changed.add(wanted.component)
        host, port = engine.address()
        return Backend(
            component=wanted.component,
            version=wanted.version,
            digest=wanted.digest,
            endpoints=(Endpoint(host=host, port=port),),
            path=engine.path(wanted.component, wanted.version),
            max_body_bytes=wanted.max_body_bytes,
            timeout_s=wanted.response_timeout_s,
        )

    def _archive(self, wanted: WantedVersion) -> Path:
        """The archive's folder on this node, fetched if it is not here, and verified whichever way it came."""
        folder = self.node.folder / "archives" / wanted.digest
        if folder.is_dir():
            try:
                return self._verified(folder, wanted)
            except TorchrelayError as error:
                # The disk's fault, or it has been signed anew since: what the server holds now decides.
                say(f"{folder} is fetched again: {error.found}")
        archive.fetch(wanted.url, folder)
        return self._verified(folder, wanted)

    def _verified(self, folder: Path, wanted: WantedVersion) -> Path:
        """`folder`, if that is what was asked for and signed by whom this node trusts; else it is put aside."""
        try:
            self._check(folder, wanted)
        except TorchrelayError:
            # Kept for whoever looks into it.
            shutil.rmtree(folder.with_suffix(".refused"), ignore_errors=True)
            folder.rename(folder.with_suffix(".refused"))
            raise
        return folder

    def _check(self, folder: Path, wanted: WantedVersion) -> None:
        manifest = archive.verify(folder, self.node.trust, wanted.digest)
        found = (manifest.component, manifest.version, manifest.environment)
        if found != (wanted.component, wanted.version, wanted.environment):
            raise ServingError(
                f"the archive at {wanted.url} is {found[0]} version {found[1]} for environment {found[2]}",
                f"{wanted.component} version {wanted.version} for environment {wanted.environment}",
                "make deploy-dev",
            )

    def _engine(self, wanted: WantedVersion) -> Engine:
        """The engine instance of the version's environment and settings, running and ready."""
        instance = self._instance(wanted)
        engine = engine_class(self.node.engine)(instance)
        self.supervisor.ensure(engine.prepare())
        _wait(engine.ready, _READY_SECONDS, f"engine {instance.name}", instance.log)
        return engine

    def _instance(self, wanted: WantedVersion) -> Instance:
        name = _instance_name(wanted)
        folder = self.node.folder / "engines" / name
        if (folder / "instance.json").is_file():
            kept = read_json(Instance, folder / "instance.json", "make up")
            if self.supervisor.running(kept.name) or not any(map(port_taken, kept.ports)):
                return kept
            say(f"engine {kept.name} gets other ports: somebody else took one of {', '.join(map(str, kept.ports))}")
            shutil.rmtree(folder)
        instance = Instance(
            name=f"{self.node.name}-{name}",
            folder=folder,
            python=self._python(wanted),
            ports=self._free_ports(),
            java_home=self.node.java_home,
            log=self.node.logs / f"{self.node.name}-{name}.log",
            response_timeout_s=wanted.response_timeout_s,
            max_body_bytes=wanted.max_body_bytes,
        )
        write_json(folder / "instance.json", instance)
        return instance

    def _python(self, wanted: WantedVersion) -> str:
        file = self.node.environments / wanted.environment / "environment.json"
        command = f".venv/bin/torchrelay build-environment --component {wanted.component}"
        return read_json(Environment, file, command).python

    def _free_ports(self) -> tuple[int, ...]:
        """The next ports of the node's range that no instance has and nobody listens on."""
        given = {
            port
            for file in (self.node.folder / "engines").glob("*/instance.json")
            for port in read_json(Instance, file, "make up").ports
        }
        first, last = self.node.engine_ports
        needed = engine_class(self.node.engine).ports_needed
        free = [port for port in range(first, last + 1) if port not in given and not port_taken(port)]
        if len(free) < needed:
            raise BusyError(
                f"{len(free)} of the ports {first}-{last} of node {self.node.name} are free",
                f"{needed} free ports for another engine",
                "set TORCHRELAY_PORT_BASE to a free range, then `make down` and `make up`",
            )
        return tuple(free[:needed])

    def _prove(self, engine: Engine, wanted: WantedVersion, folder: Path) -> None:
        """The golden inputs, through the engine itself; a version that fails is taken out again."""
        expected = archive.golden_set(folder / "model.mar")
        try:
            difference = _ask(engine, wanted, expected)
        except TorchrelayError:
            engine.unload(wanted.component, wanted.version)
            raise
        if difference > expected.tolerance:
            engine.unload(wanted.component, wanted.version)
            raise ServingError(
                f"{wanted.component} version {wanted.version} differs from its golden outputs by {difference:.3g}",
                f"at most {expected.tolerance:.3g}",
                f"make deploy-dev COMPONENT={wanted.component}",
            )

    def _retire(self, kept: list[Backend]) -> None:
        """Drain and unload every version that is routed no more, and stop engines that serve nothing."""
        routed = {(backend.component, backend.version) for backend in kept}
        addresses = {(endpoint.host, endpoint.port) for backend in kept for endpoint in backend.endpoints}
        for file in sorted((self.node.folder / "engines").glob("*/instance.json")):
            instance = read_json(Instance, file, "make up")
            engine = engine_class(self.node.engine)(instance)
            needed = engine.address() in addresses
            for found in engine.loaded() if engine.ready() else []:
                if not needed or (found.component, found.version) not in routed:
                    self._drain(found, instance.response_timeout_s)
                    engine.unload(found.component, found.version)
            if not needed:
                self.supervisor.remove(instance.name)
                shutil.rmtree(instance.folder)
        gateway.prune(self.node.gateway)

    def _drain(self, found: Loaded, longest_s: float) -> None:
        """Wait until no request is in flight: as long as one may take to arrive, and `longest_s` to be answered."""
        place = self.node.gateway
        end = time.monotonic() + gateway.REQUEST_TIMEOUT_S + longest_s
        while gateway.in_flight(place, found.component, found.version) and time.monotonic() < end:
            time.sleep(0.05)


def _ask(engine: Engine, wanted: WantedVersion, expected: GoldenSet) -> float:
    body = json.dumps({"instances": expected.instances}).encode()
    answer = engine.predict(
        wanted.component,
        wanted.version,
        body,
        {"content-type": "application/json", "x-torchrelay-request-id": f"golden-{wanted.digest[:12]}"},
    )
    if answer.status != 200:
        raise ServingError(
            f"{wanted.component} version {wanted.version} answered its golden inputs with {answer.status}: "
            f"{answer.body[:300]!r}",
            "200 and the golden outputs",
            f"make deploy-dev COMPONENT={wanted.component}",
        )
    predictions: list[Any] = json.loads(answer.body)["predictions"]
    return golden.largest_difference(expected.predictions, predictions)


def _instance_name(wanted: WantedVersion) -> str:
    """An engine has one environment and one set of settings; with others a new one takes over, losing no request."""
    settings = wanted.model_dump_json(exclude={"component", "version", "digest", "environment", "url"})
    return f"{wanted.component}-{wanted.environment}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}"


def _is(found: Loaded, wanted: WantedVersion) -> bool:
    return (found.component, found.version, found.digest) == (wanted.component, wanted.version, wanted.digest)


def _wait(condition: Any, seconds: float, what: str, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise ServingError(f"{what} did not come up in {seconds:.0f} s", "an answer", f"read {log}")
        time.sleep(0.05)
