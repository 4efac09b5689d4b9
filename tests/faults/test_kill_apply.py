"""kill -9 of `apply` at every boundary between two effects, on a simulated node: nothing is lost, a rerun finishes.

The engine, gateway and archives are simulated here so that every boundary can be tried; `tests/e2e/test_chain.py`
kills real processes at a few of them.
"""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from torchrelay import archive
from torchrelay.config import GatewayPlace, NodeConfig, write_json
from torchrelay.errors import ArchiveError, ServingError
from torchrelay.handover import (
    Desired,
    Endpoint,
    Environment,
    GoldenSet,
    Manifest,
    RoutedVersion,
    RouteShare,
    WantedVersion,
)
from torchrelay.serving import apply, gateway
from torchrelay.serving.engine import Answer, Instance, Loaded, Program


class Killed(BaseException):
    """The process is gone: nothing may catch this."""


class World:
    """A node's processes and what they hold. `kill_at` ends the caller at the n-th boundary."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.models: dict[str, dict[tuple[str, str], str]] = {}
        self.routes: tuple[gateway.Backend, ...] = ()
        self.boundaries = 0
        self.kill_at: int | None = None
        self.broken: set[str] = set()
        self.bad_archives: set[str] = set()

    def effect(self, do: Callable[[], Any]) -> Any:
        """One effect with a boundary before and after it; afterwards the promise must hold."""
        self._boundary()
        found = do()
        self.check()
        self._boundary()
        return found

    def _boundary(self) -> None:
        self.boundaries += 1
        if self.kill_at == self.boundaries:
            raise Killed

    def check(self) -> None:
        """What is routed is loaded, in a running engine, from the archive that the route names."""
        for backend in self.routes:
            assert any(
                name in self.running and models.get((backend.component, backend.version)) == backend.digest
                for name, models in self.models.items()
            ), f"{backend.component} {backend.version} is routed but nowhere loaded"


class SimulatedEngine:
    ports_needed: ClassVar[int] = 1
    world: ClassVar[World]

    def __init__(self, instance: Instance) -> None:
        self.instance = instance

    def _mine(self) -> dict[tuple[str, str], str]:
        return self.world.models.setdefault(self.instance.name, {})

    def prepare(self) -> Program:
        return Program(name=self.instance.name, command=("true",), directory=Path("/"), log=self.instance.log)

    def ready(self) -> bool:
        return self.instance.name in self.world.running

    def load(self, folder: Path, wanted: WantedVersion) -> None:
        if wanted.digest in self.world.broken:
            raise ServingError("does not load", "loads", "make status")
        key = (wanted.component, wanted.version)
        self.world.effect(lambda: self._mine().__setitem__(key, wanted.digest))

    def loaded(self) -> list[Loaded]:
        return [Loaded(component=c, version=v, digest=d, healthy=True) for (c, v), d in self._mine().items()]

    def predict(self, component: str, version: str, body: bytes, headers: dict[str, str]) -> Answer:
        return Answer(status=200, headers={}, body=b'{"predictions": [1]}')

    def unload(self, component: str, version: str) -> None:
        self.world.effect(lambda: self._mine().pop((component, version)))

    def endpoint(self, component: str, version: str) -> Endpoint:
        return Endpoint(host="127.0.0.1", port=self.instance.ports[0])

    def path(self, component: str, version: str) -> str:
        return f"/{component}/{version}"


class SimulatedSupervisor:
    world: ClassVar[World]

    def __init__(self, socket: Path, programs: Path) -> None:
        pass

    def ensure(self, program: Program) -> bool:
        if program.name in self.world.running:
            return False
        self.world.effect(lambda: self.world.running.add(program.name))
        return True

    def running(self, name: str) -> bool:
        return name in self.world.running

    def uptime_s(self, name: str) -> float:
        return 0.0

    def remove(self, name: str) -> None:
        def gone() -> None:
            self.world.running.discard(name)
            self.world.models.pop(name, None)

        self.world.effect(gone)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    SimulatedEngine.world = SimulatedSupervisor.world = made

    def fetch(url: str, target: Path) -> None:
        made.effect(lambda: target.mkdir(parents=True))

    def verify(folder: Path, key: Path, digest: str) -> Manifest:
        if digest in made.bad_archives:
            raise ArchiveError("bad signature", "a good one", "make deploy-dev")
        component, version, environment = digest.split("-")
        return Manifest(
            component=component, version=version, digest=digest, environment=environment, golden="g", run_id="r"
        )

    def routes(place: GatewayPlace, wanted: gateway.Routes, wait: bool = True) -> bool:
        if wanted.backends == made.routes:
            return False
        made.effect(lambda: setattr(made, "routes", wanted.backends))
        return True

    replaced: dict[tuple[object, str], object] = {
        (archive, "fetch"): fetch,
        (archive, "verify"): verify,
        (archive, "golden_set"): lambda mar: GoldenSet(instances=[1], predictions=[1], tolerance=0),
        (gateway, "write_bootstrap"): lambda place: False,
        (gateway, "gateway_program"): lambda place, log: Program(
            name="gateway", command=("true",), directory=Path("/"), log=log
        ),
        (gateway, "healthy"): lambda place: True,
        (gateway, "live_backends"): lambda place: made.routes,
        (gateway, "shares"): lambda place: tuple(map(share, made.routes)),
        (gateway, "draining"): lambda place: (),
        (gateway, "in_flight"): lambda place, component, version: 0,
        (gateway, "prune"): lambda place: [],
        (gateway, "apply_routes"): routes,
        (apply, "engine_class"): lambda name: SimulatedEngine,
        (apply, "Supervisor"): SimulatedSupervisor,
    }
    for (owner, name), value in replaced.items():
        monkeypatch.setattr(owner, name, value)
    yield made


def share(backend: gateway.Backend) -> RouteShare:
    return RouteShare(**backend.model_dump(include=set(RouteShare.model_fields)))


@pytest.fixture
def node(tmp_path: Path) -> NodeConfig:
    for name in ("e1", "e2"):
        python = Environment(name=name, variant="cpu", python="python", lock_sha256="0")
        write_json(tmp_path / "environments" / name / "environment.json", python)
    return NodeConfig(
        name="dev-1",
        perimeter="dev",
        folder=tmp_path / "node",
        engine_ports=(49000, 49010),
        supervisor=tmp_path / "sock",
        programs=tmp_path,
        logs=tmp_path,
        environments=tmp_path / "environments",
        java_home=tmp_path,
        trust=tmp_path / "signing.pub",
        predictions=tmp_path / "predictions",
        gateway=GatewayPlace(folder=tmp_path, port=49020, admin_port=49021),
    )


def desired(*versions: str) -> Desired:
    """A desired state of components named like `a-1-e1`: component, version, environment."""
    wanted = []
    for text in versions:
        component, version, environment = text.split("-")
        wanted.append(
            WantedVersion(
                component=component,
                version=version,
                digest=text,
                environment=environment,
                url="http://x",
                workers=1,
                batch_size=1,
                max_batch_delay_ms=1,
                response_timeout_s=1,
                max_body_bytes=1024,
            )
        )
    routes = tuple(RoutedVersion(version=version) for version in wanted)
    return Desired(perimeter="dev", components=tuple(wanted), routes=routes)


def served(world: World) -> set[str]:
    return {backend.digest for backend in world.routes}


MOVES = {
    "a first version": ((), ("a-1-e1",)),
    "the next version": (("a-1-e1",), ("a-2-e1",)),
    "another environment": (("a-1-e1",), ("a-2-e2",)),
    "a second component": (("a-1-e1",), ("a-1-e1", "b-1-e2")),
    "one goes, one comes": (("a-1-e1",), ("b-1-e1",)),
    "everything goes": (("a-1-e1", "b-1-e1"), ()),
}


@pytest.mark.parametrize("move", MOVES)
def test_killed_at_any_boundary_the_rerun_finishes_and_nothing_unproven_was_routed(
    move: str, world: World, node: NodeConfig
) -> None:
    before, after = MOVES[move]
    kill_at = 0
    finished = False
    while not finished:
        world.kill_at = None
        apply.apply(node, desired(*before))
        assert served(world) == set(before)
        kill_at += 1
        world.boundaries, world.kill_at = 0, kill_at
        try:
            apply.apply(node, desired(*after))
            finished = True
        except Killed:
            kept = {one.split("-")[0] for one in served(world)}
            assert {
                one.split("-")[0]
                for one in before
                if one.split("-")[0] in dict.fromkeys(other.split("-")[0] for other in after)
            } <= kept, "a component that stays was without a route"
        world.kill_at = None
        apply.apply(node, desired(*after))
        assert served(world) == set(after)
        held = {digest for models in world.models.values() for digest in models.values()}
        assert held == set(after), "an old version is still loaded"
    assert kill_at > 2


@pytest.mark.parametrize("move", MOVES)
def test_killed_at_any_boundary_the_keeper_mends_the_node_without_undoing_what_was_reached(
    move: str, world: World, node: NodeConfig
) -> None:
    before, after = MOVES[move]
    for kill_at in range(1, 200):
        world.kill_at = None
        apply.apply(node, desired(*before))
        world.boundaries, world.kill_at = 0, kill_at
        try:
            apply.apply(node, desired(*after))
            break
        except Killed:
            world.kill_at = None
        reached = apply.last_desired(node)
        assert reached in (desired(*before), desired(*after))
        apply.apply(node)
        assert served(world) == {one.digest for one in reached.components}
        assert {digest for models in world.models.values() for digest in models.values()} == served(world)
    assert kill_at > 2


def test_what_was_reached_stays_when_the_old_version_cannot_be_taken_away(
    world: World, node: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply.apply(node, desired("a-1-e1"))

    def stuck(_engine: SimulatedEngine, component: str, version: str) -> None:
        raise ServingError(f"{component} {version} does not unload", "unloads", "make status")

    with monkeypatch.context() as patch, pytest.raises(apply.ApplyError, match="does not unload") as caught:
        patch.setattr(SimulatedEngine, "unload", stuck)
        apply.apply(node, desired("a-2-e1"))
    assert [one.version for one in caught.value.report.routed or ()] == ["2"]
    apply.apply(node)
    assert served(world) == {"a-2-e1"}


def test_what_served_stays_when_the_gateway_refuses_the_new_routes(
    world: World, node: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply.apply(node, desired("a-1-e1"))

    def refuse(place: GatewayPlace, routes: gateway.Routes) -> bool:
        raise ServingError("Envoy refuses the new routes", "routes that Envoy takes", "make status")

    with monkeypatch.context() as patch, pytest.raises(apply.ApplyError, match="Envoy refuses") as caught:
        patch.setattr(gateway, "apply_routes", refuse)
        apply.apply(node, desired("a-2-e1"))
    assert [one.version for one in caught.value.report.routed or ()] == ["1"]
    assert apply.last_desired(node) == desired("a-1-e1")


def test_a_version_that_does_not_load_leaves_what_served(world: World, node: NodeConfig) -> None:
    apply.apply(node, desired("a-1-e1", "b-1-e1"))
    world.broken.add("a-2-e1")
    with pytest.raises(apply.ApplyError) as caught:
        apply.apply(node, desired("a-2-e1", "b-2-e1"))
    assert served(world) == {"a-1-e1", "b-2-e1"}
    assert {one.version for one in caught.value.report.routed or () if one.component == "a"} == {"1"}
    assert [(fault.component, fault.version, fault.final) for fault in caught.value.report.faults] == [("a", "2", True)]
    assert apply.last_desired(node) == desired("a-1-e1", "b-2-e1")


def test_an_archive_that_is_not_what_was_signed_is_never_loaded(world: World, node: NodeConfig) -> None:
    apply.apply(node, desired("a-1-e1"))
    world.bad_archives.add("a-2-e1")
    with pytest.raises(apply.ApplyError, match="bad signature"):
        apply.apply(node, desired("a-2-e1"))
    assert served(world) == {"a-1-e1"}
    assert (node.folder / "archives" / "a-2-e1.refused").is_dir()


def test_an_engine_that_came_back_empty_is_loaded_again(world: World, node: NodeConfig) -> None:
    apply.apply(node, desired("a-1-e1"))
    routes, world.routes = world.routes, ()
    for models in world.models.values():
        models.clear()
    world.routes = routes
    report = apply.apply(node)
    assert served(world) == {"a-1-e1"}
    assert report.held[0].changed


def test_an_engine_whose_port_somebody_took_meanwhile_gets_another(world: World, node: NodeConfig) -> None:
    apply.apply(node, desired("a-1-e1"))
    before = world.routes[0].endpoints[0].port
    world.running.clear()
    world.models.clear()
    world.routes = ()
    with socket.socket() as other:
        other.bind(("127.0.0.1", before))
        other.listen()
        apply.apply(node)
    after = world.routes[0].endpoints[0].port
    assert after != before
    apply.apply(node)
    assert world.routes[0].endpoints[0].port == after


def test_nothing_to_do_does_nothing(world: World, node: NodeConfig) -> None:
    apply.apply(node, desired("a-1-e1"))
    world.boundaries = 0
    assert not apply.apply(node, desired("a-1-e1")).held[0].changed
    assert world.boundaries == 0
