"""Bring one serving node to its desired state: the one command that a node runs, on a laptop and on a fleet.

`apply` is idempotent and safe to kill anywhere. What serves keeps serving until what replaces it has been
fetched, verified, loaded and proven; then the gateway swaps, what is no longer wanted drains, and is unloaded.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from torchrelay import archive
from torchrelay.config import GatewayPlace, NodeConfig, read_json, write_json
from torchrelay.console import say, show_error
from torchrelay.errors import ArchiveError, BusyError, ServingError, TorchrelayError
from torchrelay.handover import (
    Desired,
    Endpoint,
    Environment,
    Fault,
    GoldenSet,
    HeldVersion,
    NodeReport,
    RoutedVersion,
    WantedVersion,
)
from torchrelay.serving import gateway, golden
from torchrelay.serving.engine import Engine, Instance, Loaded, engine_class
from torchrelay.serving.gateway import Backend, Routes
from torchrelay.serving.ports import port_taken
from torchrelay.serving.supervisor import Supervisor

_READY_SECONDS = 120
# An engine that has been up for so long and lets so many looks in a row time out does not come up any more.
_UP_SECONDS = 30
_ASKED = 3
_LOCK_SECONDS = 600
# With less than this a version that does not load may just have found no room.
_ROOM_BYTES = 200 * 2**20


class ApplyError(ServingError):
    """Some version did not reach its desired state; `report` says what the node holds and routes all the same."""

    def __init__(self, report: NodeReport, errors: list[TorchrelayError]) -> None:
        super().__init__(errors[0].found, errors[0].expected, errors[0].next_command)
        self.report = report
        self.errors = errors


class UnfitError(ServingError):
    """A version that does not load, or does not reproduce its golden outputs here: trying again is no use."""


class FencedError(BusyError):
    """A converger whose lease somebody else has taken over: what it asks for is out of date."""


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
        if not (folder / "desired.json").is_file():  # nothing was ever asked of this node
            continue
        try:
            report = apply(node_config(folder))
        except TorchrelayError as error:
            show_error(error)
            continue
        for mended in (held for held in report.held if held.changed):
            say(f"{time.strftime('%F %T')} mended {mended.component} version {mended.version}")


def observe(node: NodeConfig) -> NodeReport:
    """What the node holds in its engines and routes at its gateway, asked of them now. Changes nothing."""
    place = node.gateway
    return NodeReport(
        node=node.name,
        held=tuple(sorted(_held(node), key=lambda one: (one.component, one.version))),
        routed=gateway.shares(place) if place else None,
        gateway_healthy=gateway.healthy(place) if place else None,
        draining=gateway.draining(place) if place else (),
        told=last_desired(node),
    )


def resign(node: Path, digest: str, signature: bytes) -> bool:
    """Put the signature into the node's copy of an archive; False if it has none."""
    folder = node / "archives" / digest
    if not folder.is_dir():
        return False
    archive.put_signature(folder, signature)
    return True


def _held(node: NodeConfig) -> Iterator[HeldVersion]:
    for engine in _engines(node):
        for found in engine.loaded() if engine.ready() else []:
            yield HeldVersion(
                component=found.component,
                version=found.version,
                digest=found.digest,
                healthy=found.healthy,
                endpoint=engine.endpoint(found.component, found.version),
                path=engine.path(found.component, found.version),
            )


def _engines(node: NodeConfig) -> Iterator[Engine]:
    for file in _instance_files(node):
        yield engine_class(node.engine)(read_json(Instance, file, "make up"))


def _instance_files(node: NodeConfig) -> list[Path]:
    return sorted((node.folder / "engines").glob("*/instance.json"))


class _Apply:
    """One run of apply: the node, its supervisor, and what changed so far."""

    def __init__(self, node: NodeConfig) -> None:
        self.node = node
        self.supervisor = Supervisor(node.supervisor, node.programs)
        self.changed: set[str] = set()
        self.rerouted: set[str] = set()
        self.errors: list[TorchrelayError] = []
        self.faults: list[Fault] = []

    def run(self, desired: Desired) -> NodeReport:
        last = last_desired(self.node)
        _refuse_stale(desired, last)
        self._ensure_gateway()
        held = {_key(wanted): self._try_to_hold(wanted) for wanted in desired.components}
        failed = {component for (component, _), backend in held.items() if backend is None}
        try:
            self._reach(_what_was_reached(desired, last, held, failed), held, failed)
        except TorchrelayError as error:
            self.errors.append(error)
        report = self._report()
        if self.errors:
            raise ApplyError(report, self.errors)
        return report

    def _reach(self, reached: Desired, held: dict[tuple[str, str], Backend | None], failed: set[str]) -> None:
        """Swap what is routed, write down what was reached, then take away what is no longer wanted.

        What was reached, not what was asked: this is what the node goes back to by itself. Written before anything
        drains, which takes long: a kill then must not make the keeper swap back.
        """
        backends = self._route(reached, held, failed) if self.node.gateway else []
        write_json(self.node.folder / "desired.json", reached)
        self._retire(reached, backends)

    def _route(self, reached: Desired, held: dict[tuple[str, str], Backend | None], failed: set[str]) -> list[Backend]:
        """Bring the gateway to the routes; a component that failed keeps those that it had."""
        place = _place(self.node)
        before = gateway.live_backends(place)
        after = [backend for backend in before if backend.component in failed]
        after += [_backend(routed, held) for routed in reached.routes if routed.version.component not in failed]
        if gateway.apply_routes(place, Routes(backends=tuple(after))):
            self.rerouted = {backend.component for backend in {*before} ^ {*after}}
        return after

    def _report(self) -> NodeReport:
        seen = observe(self.node)
        held = tuple(one.model_copy(update={"changed": one.component in self.changed}) for one in seen.held)
        changed = tuple(sorted(self.rerouted))
        return seen.model_copy(update={"held": held, "faults": tuple(self.faults), "changed": changed})

    def _ensure_gateway(self) -> None:
        place = self.node.gateway
        if place is None:
            return
        gateway.write_bootstrap(place)
        self.supervisor.ensure(gateway.gateway_program(place, self.node.logs / f"{self.node.perimeter}-gateway.log"))
        _wait(lambda: gateway.healthy(place), _READY_SECONDS, f"gateway on port {place.port}", self.node.logs)

    def _try_to_hold(self, wanted: WantedVersion) -> Backend | None:
        """The version as something to route to; None, with its fault noted, if it could not be brought up."""
        try:
            return self._bring_up(wanted)
        except TorchrelayError as error:
            self._blame(wanted, error)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            self._blame(wanted, ServingError(f"{where}{error.strerror}", "room to write", "make doctor"))
        return None

    def _blame(self, wanted: WantedVersion, error: TorchrelayError) -> None:
        """Note the fault. A version is not blamed for what a full disk may have done to it."""
        final = isinstance(error, ArchiveError | UnfitError) and _has_room(self.node.folder)
        self.errors.append(error)
        self.faults.append(
            Fault(
                component=wanted.component,
                version=wanted.version,
                found=error.found,
                expected=error.expected,
                next_command=error.next_command,
                final=final,
            )
        )

    def _bring_up(self, wanted: WantedVersion) -> Backend:
        """Fetched, verified, loaded and proven: only then is a version something to route to."""
        engine = self._engine(wanted)
        if not any(_is(found, wanted) and found.healthy for found in engine.loaded()):
            folder = self._archive(wanted)
            self._load(engine, wanted, folder)
            self.changed.add(wanted.component)
        elif not (self.node.folder / "archives" / wanted.digest).is_dir():
            self._restore(wanted)
        return _backend_of(
            RoutedVersion(version=wanted),
            (engine.endpoint(wanted.component, wanted.version),),
            engine.path(wanted.component, wanted.version),
        )

    def _restore(self, wanted: WantedVersion) -> None:
        """The archive of what is loaded, where somebody has deleted it: after a reboot it is all that there is."""
        try:
            self._archive(wanted)
        except TorchrelayError as error:
            say(f"the archive of {wanted.component} version {wanted.version} is gone: {error.found}")

    def _load(self, engine: Engine, wanted: WantedVersion, folder: Path) -> None:
        """Into the engine, and its golden inputs through it. UnfitError if that is the version's own fault."""
        try:
            engine.load(folder, wanted)
            self._prove(engine, wanted, folder)
        except ServingError as error:
            if not engine.ready():  # the engine died, which another version may have caused
                raise
            raise UnfitError(error.found, error.expected, error.next_command) from error

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
        if not self.supervisor.ensure(engine.prepare()) and self._hangs(engine, instance.name):
            say(f"engine {instance.name} runs and does not answer: it is started anew")
            self.supervisor.restart(instance.name)
        _wait(engine.ready, _READY_SECONDS, f"engine {instance.name}", instance.log)
        return engine

    def _hangs(self, engine: Engine, name: str) -> bool:
        """Whether it has had time enough to come up, and does not answer, asked more than once.

        Nobody can go on before it does, not even back to the version before, so it is not waited for.
        """
        return self.supervisor.uptime_s(name) > _UP_SECONDS and not any(engine.ready() for _ in range(_ASKED))

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
            max_memory_mb=wanted.max_memory_mb,
            predictions=self.node.predictions,
            keep_inputs=wanted.keep_inputs,
        )
        write_json(folder / "instance.json", instance)
        return instance

    def _python(self, wanted: WantedVersion) -> str:
        file = self.node.environments / wanted.environment / "environment.json"
        command = f"make environment COMPONENT={wanted.component}"
        return read_json(Environment, file, command).python

    def _free_ports(self) -> tuple[int, ...]:
        """The next ports of the node's range that no instance has and nobody listens on."""
        given = {port for file in _instance_files(self.node) for port in read_json(Instance, file, "make up").ports}
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

    def _retire(self, reached: Desired, routed: list[Backend]) -> None:
        """Unload every version that is wanted no more, drained where this node's own gateway sent it requests.

        An engine that nothing wanted runs on is stopped.
        """
        kept = {_key(wanted) for wanted in reached.components}
        kept |= {(backend.component, backend.version) for backend in routed}
        names = {_instance_name(wanted) for wanted in reached.components}
        used = {endpoint.port for backend in routed for endpoint in backend.endpoints}
        for file in _instance_files(self.node):
            instance = read_json(Instance, file, "make up")
            engine = engine_class(self.node.engine)(instance)
            needed = file.parent.name in names or bool(used & set(instance.ports))
            for found in engine.loaded() if engine.ready() else []:
                if not needed or (found.component, found.version) not in kept:
                    self._drain(found, instance.response_timeout_s)
                    engine.unload(found.component, found.version)
            if not needed:
                self.supervisor.remove(instance.name)
                shutil.rmtree(instance.folder)
        if self.node.gateway:
            gateway.prune(self.node.gateway)

    def _drain(self, found: Loaded, longest_s: float) -> None:
        """Wait until no request is in flight: as long as one may take to arrive, and `longest_s` to be answered.

        A node without a gateway is told to let go of a version only when the perimeter's gateway has drained it.
        """
        place = self.node.gateway
        end = time.monotonic() + gateway.REQUEST_TIMEOUT_S + longest_s
        while place and gateway.in_flight(place, found.component, found.version) and time.monotonic() < end:
            time.sleep(0.05)


def _refuse_stale(desired: Desired, last: Desired) -> None:
    """A node does what the newest holder of the lease says, and nobody before it."""
    if desired.token < last.token:
        raise FencedError(
            f"a desired state with the fencing token {desired.token}, after one with {last.token}",
            "the present holder of the perimeter's lease",
            "make status",
        )


def _what_was_reached(
    desired: Desired, last: Desired, held: dict[tuple[str, str], Backend | None], failed: set[str]
) -> Desired:
    """What was asked, but for components that failed: they keep what they had, and what came up beside it."""
    reached = [wanted for wanted in desired.components if held[_key(wanted)]]
    there = {_key(wanted) for wanted in reached}
    reached += [wanted for wanted in last.components if wanted.component in failed and _key(wanted) not in there]
    routes = [routed for routed in desired.routes if routed.version.component not in failed]
    routes += [routed for routed in last.routes if routed.version.component in failed]
    reached.sort(key=_key)
    routes.sort(key=lambda routed: _key(routed.version))
    return desired.model_copy(update={"components": tuple(reached), "routes": tuple(routes)})


def _backend(routed: RoutedVersion, held: dict[tuple[str, str], Backend | None]) -> Backend:
    """Where the routed version is served: on the nodes that are named, else on this very node."""
    if routed.endpoints:
        return _backend_of(routed, routed.endpoints, routed.path)
    here = held.get(_key(routed.version))
    if here is None:
        raise ServingError(
            f"a route to {routed.version.component} version {routed.version.version}, which this node does not hold",
            "endpoints, or a version among those to be held",
            "make status",
        )
    return _backend_of(routed, here.endpoints, here.path)


def _backend_of(routed: RoutedVersion, endpoints: tuple[Endpoint, ...], path: str) -> Backend:
    wanted = routed.version
    return Backend(
        component=wanted.component,
        version=wanted.version,
        digest=wanted.digest,
        endpoints=endpoints,
        path=path,
        weight=routed.weight,
        mirror=routed.mirror,
        copies=routed.copies,
        max_body_bytes=wanted.max_body_bytes,
        max_requests_per_s=wanted.max_requests_per_s,
        timeout_s=wanted.response_timeout_s,
    )


def _place(node: NodeConfig) -> GatewayPlace:
    if node.gateway is None:
        raise ServingError(f"routes for {node.name}, which has no gateway", "a node with a gateway", "make status")
    return node.gateway


def _has_room(folder: Path) -> bool:
    return shutil.disk_usage(folder).free > _ROOM_BYTES


def _key(wanted: WantedVersion) -> tuple[str, str]:
    return wanted.component, wanted.version


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
    others = {"component", "version", "digest", "environment", "url", "max_requests_per_s"}
    settings = wanted.model_dump_json(exclude=others)
    return f"{wanted.component}-{wanted.environment}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}"


def _is(found: Loaded, wanted: WantedVersion) -> bool:
    return (found.component, found.version, found.digest) == (wanted.component, wanted.version, wanted.digest)


def _wait(condition: Any, seconds: float, what: str, log: Path) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise ServingError(f"{what} did not come up in {seconds:.0f} s", "an answer", f"read {log}")
        time.sleep(0.05)
