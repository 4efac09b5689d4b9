"""A site of two perimeters as files on the disk, with archives everywhere and nothing that runs."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from torchrelay import config
from torchrelay.config import Node, NodeConfig, Perimeter, Site, TrackingServer, write_json
from torchrelay.delivery import reach, survey
from torchrelay.delivery.store import State, store
from torchrelay.handover import Desired, HeldVersion, Manifest, NodeReport, WantedVersion
from torchrelay.lineage import TAG_DIGEST, TAG_ENVIRONMENT
from torchrelay.tracking import ModelVersion

OLD = time.time() - 1000 * 86400
NODES = {"dev": ("dev-1",), "production": ("production-1", "production-2")}
VERSIONS = tuple(str(number) for number in range(1, 9))


def digest(version: str) -> str:
    return f"{int(version):064x}"


def environment(version: str) -> str:
    """Two versions share one."""
    return f"py311-cpu-{int(version) // 2:012x}"


def wanted(version: str) -> WantedVersion:
    return WantedVersion(
        component="tiny",
        version=version,
        digest=digest(version),
        environment=environment(version),
        url="http://nowhere",
        workers=1,
        batch_size=1,
        max_batch_delay_ms=1,
        response_timeout_s=1,
        max_body_bytes=1024,
    )


def archive(folder: Path, version: str, changed: float = OLD) -> Path:
    """A folder as an archive's is, though nobody could load it."""
    folder.mkdir(parents=True)
    manifest = Manifest(
        component="tiny",
        version=version,
        digest=digest(version),
        environment=environment(version),
        golden="",
        run_id=f"run{version}",
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    for name in ("model.mar", "model.sig"):
        (folder / name).write_bytes(b"x" * 5000)
    os.utime(folder, (changed, changed))
    return folder


def whole(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} == {"manifest.json", "model.mar", "model.sig"}


@dataclass
class FakeTracking:
    """The registry; None: it is down."""

    known: dict[str, str] | None = field(default_factory=dict)

    @property
    def url(self) -> str:
        return "http://127.0.0.1:9"

    def healthy(self) -> bool:
        return self.known is not None

    def models(self) -> dict[str, dict[str, str]]:
        return {"tiny": self.known or {}}

    def version(self, name: str, version: str) -> ModelVersion | None:
        return next(one for one in self.versions(name) if one.version == version)

    def versions(self, name: str) -> list[ModelVersion]:
        return [
            ModelVersion(
                name=name,
                version=one,
                run_id=f"run{one}",
                source="",
                status="READY",
                tags={TAG_DIGEST: digest(one), TAG_ENVIRONMENT: environment(one)},
                aliases=(),
            )
            for one in VERSIONS
        ]


@dataclass
class Rig:
    """The site; `tracking` and `held` (by node) say what the registry and the engines tell."""

    root: Path
    tracking: FakeTracking = field(default_factory=FakeTracking)
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def site(self) -> Site:
        return Site(
            supervisor=self.state / "s.sock",
            tracking=TrackingServer(url=self.tracking.url),
            perimeters={name: self._perimeter(name, nodes) for name, nodes in NODES.items()},
        )

    def _perimeter(self, name: str, nodes: Iterable[str]) -> Perimeter:
        found = tuple(Node(name=one, folder=self.node(one)) for one in nodes)
        return Perimeter(alias=name, gateway="http://127.0.0.1:9", nodes=found, gateway_node=found[0].name)

    def node(self, name: str) -> Path:
        return self.state / "perimeters" / name.partition("-")[0] / "nodes" / name

    def archive_folders(self) -> list[Path]:
        """Every folder that holds archives."""
        nodes = [self.node(name) / "archives" for names in NODES.values() for name in names]
        return [*nodes, self.state / "perimeters" / "production" / "admission", self.state / "archives"]

    def fill(self) -> None:
        """Every version everywhere, every environment, all of it old."""
        for folder in self.archive_folders():
            for version in VERSIONS:
                archive(folder / digest(version), version)
        for version in VERSIONS:
            folder = self.state / "environments" / environment(version)
            if not folder.exists():
                (folder / "bin").mkdir(parents=True)
                (folder / "environment.json").write_text("{}")
                os.utime(folder, (OLD, OLD))
        for name in (one for names in NODES.values() for one in names):
            write_json(self.node(name) / "node.json", self._config(name))

    def _config(self, name: str) -> NodeConfig:
        folder = self.node(name)
        return NodeConfig(
            name=name,
            perimeter=name.partition("-")[0],
            folder=folder,
            engine_ports=(1, 2),
            supervisor=self.state / "s.sock",
            programs=self.state / "supervisor" / "programs",
            logs=self.state / "logs",
            environments=self.state / "environments",
            java_home=self.root,
            trust=self.root,
            predictions=folder / "predictions",
        )

    def remember(self, perimeter: str, state: State) -> None:
        memory = store(perimeter)
        with memory.lease(5) as token:
            memory.save(state, token)

    def tell(self, node: str, versions: Iterable[str]) -> None:
        """What the node goes back to by itself."""
        components = tuple(wanted(version) for version in versions)
        write_json(self.node(node) / "desired.json", Desired(perimeter=node.partition("-")[0], components=components))

    def observe(self, node: Node) -> NodeReport:
        endpoint = {"host": "127.0.0.1", "port": 1}
        held = [
            HeldVersion.model_validate(
                {"component": "tiny", "version": one, "digest": digest(one), "healthy": True,
                 "endpoint": endpoint, "path": "/"}
            )
            for one in self.held.get(node.name, ())
        ]  # fmt: skip
        return NodeReport(node=node.name, held=tuple(held))

    def there(self, folder: Path) -> set[str]:
        """The versions whose archives lie in the folder, each whole."""
        found = {version for version in VERSIONS if (folder / digest(version)).is_dir()}
        assert all(whole(folder / digest(version)) for version in found)
        return found

    def asides(self) -> list[Path]:
        """What was renamed and not deleted."""
        return [path for path in self.state.rglob(".*") if path.is_dir()]


def rig(root: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A new one, which `settings()` and the code under test now mean."""
    for name in ("components", "config"):
        (root / name).mkdir(parents=True)
    (root / "Snakefile").touch()
    (root / "config/defaults.yaml").write_text("state: state\nkeys: keys\nport_base: 19000\n")
    for name in ("STATE", "CONFIG", "KEYS", "PORT_BASE"):
        monkeypatch.delenv(f"TORCHRELAY_{name}", raising=False)
    monkeypatch.setenv("TORCHRELAY_ROOT", str(root))
    config.settings.cache_clear()
    made = Rig(root)
    monkeypatch.setattr(reach, "observe_on", made.observe)
    monkeypatch.setattr(survey, "Tracking", lambda url: made.tracking)
    made.fill()
    return made
