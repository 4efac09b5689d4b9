"""A perimeter changes its signing key while it serves: at no point is anything that serves signed by a stranger."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import tiny
from torchrelay import archive, config
from torchrelay.archive import rotation
from torchrelay.config import Node, Perimeter, Site, TrackingServer
from torchrelay.delivery import rotation as delivery
from torchrelay.delivery.admission import Trusting, decision
from torchrelay.delivery.store import Rollout, Served, State, Store
from torchrelay.errors import ArchiveError, BusyError, TrackingError
from torchrelay.handover import WantedVersion
from torchrelay.lineage import TAG_DIGEST, TAG_VERDICT
from torchrelay.serving import apply as node_apply
from torchrelay.tracking import ModelVersion

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "/api/2.0/mlflow-artifacts/artifacts/"
FILES = ("model.mar", "manifest.json", "model.sig")


class Server(ThreadingHTTPServer):
    """As much of MLflow as the rotation asks: artifacts, and the registered versions of one model."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.versions: list[ModelVersion] = []
        self.up = True
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if not self.server.up:
            self._answer(503, b"")
        elif self.path.startswith(PREFIX):
            found = self.server.files.get(self.path.removeprefix(PREFIX))
            self._answer(404 if found is None else 200, found or b"")
        else:
            self._answer(200, json.dumps(self._registry()).encode())

    def _registry(self) -> object:
        """MLflow's listings; whatever else is asked gets both."""
        rows = [
            {"name": one.name, "version": one.version, "tags": [{"key": k, "value": v} for k, v in one.tags.items()]}
            for one in self.server.versions
        ]
        models = [{"name": name} for name in sorted({one.name for one in self.server.versions})]
        return {"registered_models": models, "model_versions": rows, "registered_model": {}}

    def do_PUT(self) -> None:
        self.server.files[self.path.removeprefix(PREFIX)] = self.rfile.read(int(self.headers["content-length"]))
        self._answer(200, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@dataclass
class World:
    """Production with one node, as the rotation sees it."""

    folder: Path
    server: Server
    keys: archive.KeyPair
    published: list[int] = field(default_factory=list)

    @property
    def site(self) -> Site:
        node = Node(name="n", folder=self.folder / "node")
        perimeter = Perimeter(alias="production", gateway="http://127.0.0.1:1", nodes=(node,), gateway_node="n", warm=1)
        return Site(
            supervisor=self.folder,
            tracking=TrackingServer(url=self.server.url),
            perimeters={"production": perimeter},
        )

    @property
    def memory(self) -> Store:
        return Store(config.settings().state / "perimeters" / "production" / "control.db")

    @property
    def trust(self) -> Path:
        return self.folder / "node" / "trust.pub"

    def publish(self) -> None:
        """What Ansible does; notes how many keys the node trusts then."""
        self.trust.parent.mkdir(parents=True, exist_ok=True)
        self.trust.write_bytes(self.keys.public.read_bytes())
        self.published.append(self.trust.read_bytes().count(b"BEGIN"))

    def version(self, number: str, *, on_the_node: bool = True, signer: Path | None = None) -> WantedVersion:
        folder = self.folder / "made" / number
        folder.parent.mkdir(parents=True, exist_ok=True)
        manifest = tiny.signed(folder, signer or self.keys.private, number)
        if on_the_node:
            tiny.copy(folder, self.on_node(manifest.digest))
        for name in FILES:
            self.server.files[f"1/{number}/{name}"] = (folder / name).read_bytes()
        return WantedVersion(
            component="tiny",
            version=number,
            digest=manifest.digest,
            environment=tiny.ENVIRONMENT,
            url=f"{self.server.url}{PREFIX}1/{number}",
            workers=1,
            batch_size=1,
            max_batch_delay_ms=1,
            response_timeout_s=1,
            max_body_bytes=1024,
        )

    def on_node(self, digest: str) -> Path:
        return self.folder / "node" / "archives" / digest

    def remember(self, **state: object) -> None:
        memory = self.memory
        with memory.lease(1) as token:
            memory.save(State(component="tiny", **state), token)

    def rotate(self) -> list[str]:
        return delivery.rotate_signing_key(self.site, "production", Trusting(), self.publish)

    def fetched(self, wanted: WantedVersion) -> Path:
        target = self.folder / "fetched" / wanted.version
        archive.fetch(wanted.url, target)
        return target


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("TORCHRELAY_ROOT", str(ROOT))
    monkeypatch.setenv("TORCHRELAY_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("TORCHRELAY_KEYS", str(tmp_path / "keys"))
    config.settings.cache_clear()
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made = World(tmp_path, server, archive.ensure_key(tmp_path / "keys" / "production"))
        made.publish()
        made.published.clear()
        yield made
        server.shutdown()
    config.settings.cache_clear()


def test_what_serves_is_signed_anew_and_the_old_key_is_trusted_no_more(world: World) -> None:
    live, warm = world.version("2"), world.version("1")
    world.remember(live=live, served=(Served(wanted=warm, since=0.0),))
    old_key, old_trust = world.keys.private.read_bytes(), world.folder / "old.pub"
    old_trust.write_bytes(world.keys.public.read_bytes())
    assert world.rotate() == []
    assert world.keys.private.read_bytes() != old_key
    assert world.published == [2, 1]
    assert sorted(path.name for path in world.keys.private.parent.iterdir()) == [
        *("signing.lock", "signing.pem", "signing.pub")
    ]
    for wanted in (live, warm):
        for folder in (world.on_node(wanted.digest), world.fetched(wanted)):
            archive.verify(folder, world.trust, wanted.digest)
            with pytest.raises(ArchiveError):
                archive.verify(folder, old_trust, wanted.digest)
    assert archive.ensure_key(world.keys.private.parent) == world.keys


@pytest.mark.parametrize("point", ["prepare", "publish", "switch", "sign", "upload", "retire", "publish again"])
def test_cut_short_anywhere_it_serves_on_and_the_next_run_completes_it(
    world: World, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = world.version("1")
    world.remember(live=live)
    with monkeypatch.context() as patch:
        cut(patch, world, point)
        with pytest.raises(KeyboardInterrupt):
            world.rotate()
    for folder in (world.on_node(live.digest), world.fetched(live)):
        archive.verify(folder, world.trust, live.digest)
    archive.ensure_key(world.keys.private.parent)
    assert world.rotate() == []
    assert world.trust.read_bytes() == world.keys.public.read_bytes()
    assert world.trust.read_bytes().count(b"BEGIN") == 1
    for folder in (world.on_node(live.digest), world.fetched(live)):
        archive.verify(folder, world.trust, live.digest)


def cut(patch: pytest.MonkeyPatch, world: World, point: str) -> None:
    """Kill the rotation where it comes to `point`."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    places: dict[str, tuple[object, str]] = {
        "prepare": (rotation, "prepare"),
        "publish": (world, "publish"),
        "switch": (rotation, "switch"),
        "sign": (delivery, "_sign_anew"),
        "upload": (node_apply, "resign"),
        "retire": (rotation, "retire"),
    }
    if point == "publish again":
        whole = world.publish
        patch.setattr(world, "publish", lambda: killed() if world.published else whole())
    else:
        patch.setattr(*places[point], killed)


def test_a_switch_that_was_cut_in_two_is_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.keys.private.parent
    rotation.prepare(folder)
    before = archive.key_digest(folder)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rotation, "write_file", killed)
        with pytest.raises(KeyboardInterrupt):
            rotation.switch(folder)
    assert rotation.stage(folder) == "switched"
    archive.ensure_key(folder)  # the new key is among those that signing.pub lists
    rotation.switch(folder)
    assert archive.key_digest(folder) != before
    rotation.retire(folder)
    assert rotation.stage(folder) == "none"


def test_preparing_twice_makes_one_key(world: World) -> None:
    folder = world.keys.private.parent
    rotation.prepare(folder)
    made = (folder / rotation.NEXT).read_bytes()
    before = archive.key_digest(folder)
    rotation.prepare(folder)
    assert (folder / rotation.NEXT).read_bytes() == made
    assert (folder / rotation.NEXT).stat().st_mode & 0o077 == 0
    assert archive.key_digest(folder) == before  # who signs is still the old one


def test_while_two_keys_are_trusted_a_third_is_not(world: World, tmp_path: Path) -> None:
    rotation.prepare(world.keys.private.parent)
    stranger = archive.ensure_key(tmp_path / "keys" / "stranger")
    good, forged = world.version("1"), world.version("2", signer=stranger.private)
    archive.verify(world.on_node(good.digest), world.keys.public, good.digest)
    with pytest.raises(ArchiveError):
        archive.verify(world.on_node(forged.digest), world.keys.public, forged.digest)


def test_nothing_is_countersigned_that_nobody_trusted(world: World, tmp_path: Path) -> None:
    stranger = archive.ensure_key(tmp_path / "keys" / "stranger")
    forged = world.version("1", on_the_node=False, signer=stranger.private)
    world.remember(live=forged)
    with pytest.raises(ArchiveError):
        world.rotate()
    assert world.trust.read_bytes().count(b"BEGIN") == 2  # what did serve goes on serving


def test_an_old_version_that_is_gone_is_reported_and_holds_nobody_up(world: World) -> None:
    live, warm, gone = world.version("3"), world.version("2"), world.version("1")
    world.remember(live=live, served=tuple(Served(wanted=one, since=0.0) for one in (gone, warm)))
    for name in FILES:
        del world.server.files[f"1/1/{name}"]
    (lost,) = world.rotate()
    assert lost.startswith("tiny version 1: ")
    archive.verify(world.fetched(live), world.trust, live.digest)


def test_a_live_version_that_is_gone_keeps_both_keys(world: World) -> None:
    live = world.version("1")
    world.remember(live=live)
    mar = world.server.files.pop("1/1/model.mar")
    with pytest.raises(TrackingError):
        world.rotate()
    archive.verify(world.on_node(live.digest), world.trust, live.digest)
    world.server.files["1/1/model.mar"] = mar
    assert world.rotate() == []


def test_without_the_tracking_server_nothing_is_begun(world: World) -> None:
    world.server.up = False
    with pytest.raises(TrackingError):
        world.rotate()
    assert rotation.stage(world.keys.private.parent) == "none"


def test_during_a_roll_out_the_old_key_goes_on_signing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_PATIENCE_S", 0.2)
    before = world.keys.private.read_bytes()
    with world.memory.lease(1), pytest.raises(BusyError):
        world.rotate()
    assert world.keys.private.read_bytes() == before
    assert world.trust.read_bytes().count(b"BEGIN") == 2
    assert world.rotate() == []
    assert world.trust.read_bytes().count(b"BEGIN") == 1


def test_nodes_are_told_without_holding_up_roll_outs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ansible takes half a minute, in which an operator may have to go back."""
    whole = world.publish

    def publish() -> None:
        with world.memory.lease(1):
            whole()

    monkeypatch.setattr(world, "publish", publish)
    world.rotate()


def test_two_rotations_do_not_mix(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, refused = world.publish, []

    def publish() -> None:
        whole()
        with pytest.raises(BusyError) as caught:
            world.rotate()
        refused.append(caught.value.found)

    monkeypatch.setattr(world, "publish", publish)
    world.rotate()
    assert refused == ["another rotation of this key runs"] * 2


def test_what_is_on_its_way_is_signed_anew_too(world: World) -> None:
    coming = world.version("2")
    rollout = Rollout(
        wanted=coming, kind="rollout", policy="p", who="me", why="test", began=0.0, stage=0, since=0.0, weights=(5,)
    )
    world.remember(live=world.version("1"), rollout=rollout)
    world.rotate()
    archive.verify(world.on_node(coming.digest), world.trust, coming.digest)


def test_what_was_admitted_is_signed_anew_too(world: World) -> None:
    """It comes in without another look when it is asked for again, for example after a rollback from it."""
    admitted, refused = world.version("7", on_the_node=False), world.version("8", on_the_node=False)
    for wanted in (admitted, refused):
        tags = {TAG_DIGEST: wanted.digest, TAG_VERDICT: "pass"}
        version = ModelVersion(
            name="tiny", version=wanted.version, run_id="r", source="", status="READY", tags=tags, aliases=()
        )
        world.server.versions.append(version)
        reason = "" if wanted is admitted else "it is no good"
        with world.memory.lease(1) as token:
            world.memory.decide(decision(version, Trusting().policy(version), reason or None, wanted), token)
    before = world.server.files["1/8/model.sig"]
    assert world.rotate() == []
    archive.verify(world.fetched(admitted), world.trust, admitted.digest)
    assert world.server.files["1/8/model.sig"] == before
