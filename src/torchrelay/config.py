"""Every setting of the project, described once.

Three kinds of file are read here: `config/defaults.yaml` with its git-ignored overlay `config/local.yaml`
(`Settings`), `components/<name>/component.yaml` (`Component`), and `site.json`, which the `control` role
writes and which says where things run (`Site`).
"""

import ipaddress
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from torchrelay.errors import ConfigError

Json = dict[str, Any]
M = TypeVar("M", bound=BaseModel)
# What TORCHRELAY_<NAME> sets besides the parts of `listen` and `backup`.
_FROM_ENVIRONMENT = (
    *("component", "state", "keys", "port_base", "inventory"),
    *("variant", "production_nodes", "poll_s", "bucket"),
)
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}$)(?!(.*\.)?[0-9]+$){_LABEL}(\.{_LABEL})*")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_RECIPIENT = re.compile(r"age1[02-9ac-hj-np-z]{58}")


class Frozen(BaseModel):
    """A model that cannot change and that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(Frozen):
    """The figure that decides whether a version may be deployed."""

    name: str = Field(
        "accuracy", description="Name under which training logs the mean score of the test set; higher is better."
    )
    floor: float = Field(description="A candidate below this is refused.")
    allowed_regression: float | None = Field(
        0.0,
        ge=0,
        description="How far below the version in service a candidate may fall; null: the two are not compared.",
    )
    allowed_slice_regression: float | None = Field(
        0.05,
        ge=0,
        description="How far any slice of the test set (each class at least) may fall at a promotion; null: any.",
    )


class Golden(Frozen):
    """Inputs whose outputs are recorded at training time and must be reproduced wherever the archive runs."""

    samples: int = Field(16, ge=1, le=256, description="How many golden inputs to keep.")
    tolerance: float = Field(1e-4, ge=0, description="Largest absolute difference of any number in an output.")


class Training(Frozen):
    """What `mlflow run` is given, as `-P name=value`."""

    parameters: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="Parameters of the MLproject's `main` entry point."
    )


class Serving(Frozen):
    """How an engine instance runs this component."""

    workers: int = Field(1, ge=1, le=64, description="Worker processes, one torch thread each.")
    batch_size: int = Field(8, ge=1, le=1024, description="Requests that one forward pass may take together.")
    max_batch_delay_ms: int = Field(1, ge=1, description="Longest wait for a batch to fill, in milliseconds.")
    response_timeout_s: int = Field(30, ge=1, description="After this a request is given up, in seconds.")
    max_body_bytes: int = Field(4 * 2**20, ge=1024, description="Larger request bodies get a 413.")
    max_requests_per_s: int | None = Field(
        None, ge=1, description="More requests a second than this get a 429, at once; null: no limit."
    )
    max_memory_mb: int = Field(
        4096, ge=256, description="A worker that has grown beyond this ends, and another one starts: against leaks."
    )


class Latency(Frozen):
    """The latency objective."""

    p99_ms: float = Field(100.0, gt=0, description="99th percentile at the gateway, in milliseconds.")


class Stage(Frozen):
    """One step on a candidate's way to all requests."""

    weight: int = Field(ge=0, le=99, description="Percent of the requests that the candidate answers; 0: shadow.")
    bake_s: float = Field(20.0, ge=0, description="Shortest stay in this stage, in seconds.")
    min_requests: int = Field(50, ge=0, description="Requests to the candidate that a decision needs.")
    copies: int = Field(
        100,
        ge=1,
        le=100,
        description="Percent of the requests that a shadow gets copies of: less where traffic is more than a decision "
        "needs, since all of them double the engines' work.",
    )

    @property
    def shadow(self) -> bool:
        """Whether the candidate gets copies of requests, whose answers nobody but us sees."""
        return self.weight == 0


class Rollout(Frozen):
    """Progressive delivery in production: stages, then all requests. A breach of any rule reverts by itself."""

    stages: tuple[Stage, ...] = Field(
        (Stage(weight=0), Stage(weight=5), Stage(weight=25)),
        description="In this order, before all requests; none: at once, when it is loaded and proven.",
    )
    max_error_excess: float = Field(
        0.01, ge=0, le=1, description="How much larger its share of failed requests may be than the live version's."
    )
    max_slow_excess: float = Field(
        0.05,
        ge=0,
        le=1,
        description="How much larger its share of requests over latency.p99_ms may be than the live version's.",
    )
    max_disagreement: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of compared answers that may differ from the live version's: in a shadow stage to copies of "
        "its requests, in one with a weight to those that the candidate answers.",
    )
    alpha: float = Field(
        1e-4, gt=0, lt=1, description="Chance that a rule ever stops a candidate that keeps it, over a whole roll-out."
    )
    little_traffic: Literal["replay", "wait"] = Field(
        "replay",
        description="When a stage has baked with fewer than min_requests: replay logged requests and go on, or wait.",
    )
    replay_requests: int = Field(200, ge=0, description="Logged production requests that are replayed, at most.")


class Monitoring(Frozen):
    """Hints for the monitor."""

    keep_inputs: bool = Field(False, description="Whether the prediction log may keep inputs.")


class Component(Frozen):
    """`components/<name>/component.yaml`: what the rest of the system knows of one ML component."""

    name: Name = Field(description="Equal to the folder's name.")
    description: str = Field(description="One sentence for people.")
    task: Literal["classification", "regression"] = Field(description="Decides how a prediction is scored.")
    data: str = Field(description="Where the data come from, and their licence.")
    metric: Metric
    golden: Golden = Golden()
    training: Training = Training()
    serving: Serving = Serving()
    latency: Latency = Latency()
    rollout: Rollout = Rollout()
    monitoring: Monitoring = Monitoring()


class Retention(Frozen):
    """How long things are kept that the rollback window does not keep anyway."""

    versions: int | None = Field(
        None, ge=1, description="Newest versions of a component that the registry keeps; null: all of them."
    )
    served: int = Field(
        10, ge=1, description="How many versions that served before a component remembers: its rollback window."
    )
    archives: int = Field(
        2, ge=0, description="Newest archives of a component that each folder keeps beside those that may serve again."
    )
    refused_days: float = Field(7.0, ge=0, description="Days for which archives that did not come in are kept.")
    evaluations_days: float = Field(30.0, ge=0, description="Days for which production keeps its own test scores.")
    environments_days: float = Field(30.0, ge=0, description="Days for which an environment that nobody needs is kept.")
    predictions_days: float = Field(30.0, ge=0, description="Days for which the prediction log is kept.")
    logs_days: float = Field(14.0, ge=0, description="Days for which rotated logs, and those of old engines, are kept.")
    dvc_cache: bool = Field(
        False, description="Whether DVC's cache loses what neither the workspace nor any commit uses."
    )


class Listen(Frozen):
    """Where callers reach the gateways and the tracking server: on this machine alone, or by TLS from others."""

    address: str = Field(
        "127.0.0.1", description="IP address to listen on with TLS for other machines; a loopback address: for none."
    )
    names: tuple[str, ...] = Field(
        (), description="DNS names and IP addresses under which callers reach this machine; the first is shown in URLs."
    )
    certificate: Path | None = Field(
        None, description="The user's own certificate with its chain (PEM); null: one by the CA of this installation."
    )
    key: Path | None = Field(None, description="The private key of that certificate (PEM), without a passphrase.")

    @model_validator(mode="after")
    def _can_be_reached_safely(self) -> Self:
        if wrong := self._wrong():
            raise ConfigError(*wrong)
        return self

    def _wrong(self) -> tuple[str, str, str] | None:
        """What no certificate can be made for: found, expected, next command."""
        where = "in config/local.yaml (TORCHRELAY_LISTEN_{})"
        if not is_ip(self.address):
            expected = "an IP address of this machine, or 0.0.0.0 for all of them"
            return f"listen.address is {self.address!r}", expected, f"set listen.address {where.format('ADDRESS')}"
        if strange := [name for name in self.names if not (is_ip(name) or _HOST_NAME.fullmatch(name))]:
            found = f"listen.names has {', '.join(map(repr, strange))}"
            return found, "DNS names and IP addresses, without port", f"set listen.names {where.format('NAMES')}"
        if self.beyond_loopback and not self.names:
            found = f"listen.address is {self.address}, beyond loopback, and listen.names is empty"
            expected = "the DNS names or IP addresses under which callers reach this machine, for its certificate"
            return found, expected, f"set listen.names {where.format('NAMES')}, or listen.address to 127.0.0.1"
        if (self.certificate is None) != (self.key is None):
            has, lacks = ("key", "certificate") if self.certificate is None else ("certificate", "key")
            next_command = f"set listen.{lacks} {where.format(lacks.upper())}"
            return f"listen.{has} is set, and listen.{lacks} is not", "both, or neither", next_command
        return None

    @property
    def beyond_loopback(self) -> bool:
        """Whether other machines are to reach this one."""
        return not is_loopback(self.address)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names as they stand in a URL."""
        return tuple(f"[{name}]" if ":" in name else name for name in self.names)


def is_ip(name: str) -> bool:
    """Whether this is an IP address and no name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches this IP address."""
    return ipaddress.ip_address(address).is_loopback


class Backup(Frozen):
    """What is kept a second time: the registry, artifacts that lie in a local folder, and keys."""

    folder: Path | None = Field(
        None,
        description="Folder that backups go to where there is no bucket, best on another disk; null: none are made.",
    )
    recipient: str | None = Field(
        None,
        description="Public age key (age1…, see make recovery-key) that a backup's private keys are encrypted for; "
        "null: keys are left out.",
    )

    @model_validator(mode="after")
    def _can_be_written(self) -> Self:
        if self.recipient is not None and not _RECIPIENT.fullmatch(self.recipient):
            raise ConfigError(
                f"backup.recipient is {self.recipient!r}",
                "a public age key: age1 and 58 more characters",
                "make recovery-key, and set backup.recipient to what it prints",
            )
        return self


class Settings(Frozen):
    """`config/defaults.yaml` under `config/local.yaml` under the environment."""

    component: Name = Field("fashion_mnist", description="The component that a verb means when none is named.")
    state: Path = Field(Path(".torchrelay"), description="Folder for everything that runs or is written.")
    keys: Path = Field(
        Path("~/.config/torchrelay/keys"), description="Folder of the private signing keys, outside the checkout."
    )
    port_base: int = Field(18500, ge=1024, le=65000, description="First of the 100 ports this checkout may use.")
    inventory: Path = Field(Path("inventory/local"), description="The Ansible inventory of the site.")
    variant: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Which lock a component's environment is built from; auto looks for an NVIDIA GPU."
    )
    torch_index: str | None = Field(
        None, description="Package index asked for torch when pip's own configuration has no build for the variant."
    )
    production_nodes: int = Field(2, ge=1, le=2, description="Serving nodes of local production; 1 on a small laptop.")
    poll_s: int = Field(30, ge=1, description="How often production looks at the registry when nothing wakes it.")
    bucket: str | None = Field(
        None,
        description="gs://name[/prefix], for artifacts, DVC's remote and backups; null: folders of this machine.",
    )
    backup: Backup = Backup()
    listen: Listen = Listen()
    retention: Retention = Retention()
    components: dict[Name, Json] = Field(
        default_factory=dict, description="Overrides laid over a component's component.yaml, by name."
    )

    @model_validator(mode="after")
    def _has_one_place_for_backups(self) -> Self:
        if self.bucket is not None and not _BUCKET.fullmatch(self.bucket):
            raise ConfigError(
                f"bucket is {self.bucket!r}",
                "gs://name or gs://name/prefix, without a trailing slash",
                "set bucket in config/local.yaml (TORCHRELAY_BUCKET)",
            )
        if self.bucket and self.backup.folder:
            raise ConfigError(
                f"bucket is {self.bucket} and backup.folder is {self.backup.folder}",
                "one of the two: with a bucket, backups go there",
                "set backup.folder to null in config/local.yaml (and unset TORCHRELAY_BACKUP_FOLDER)",
            )
        return self

    @property
    def artifacts(self) -> str:
        """Where the tracking server keeps artifacts: a gs:// URL, or a folder."""
        return f"{self.bucket}/artifacts" if self.bucket else str(self.state / "tracking" / "artifacts")

    @property
    def backups(self) -> str | None:
        """Where backups go: a gs:// URL, a folder, or None."""
        if self.bucket:
            return f"{self.bucket}/backup"
        return str(self.backup.folder) if self.backup.folder else None


class Ssh(Frozen):
    """How a machine is reached: by OpenSSH, with this key, and only if its host key is the one that is known."""

    host: str
    user: str
    port: int = Field(22, ge=1, le=65535)
    key: Path = Field(description="Private key.")
    known_hosts: Path = Field(description="Its host key; no other file is asked.")
    options: tuple[str, ...] = Field((), description="More of ssh's options, as ProxyCommand=….")
    command: tuple[str, ...] = Field(("torchrelay",), description="What torchrelay is called over there.")


class Node(Frozen):
    """One serving node, as the control node sees it."""

    name: str
    folder: Path = Field(description="The node's own folder, on the node.")
    ssh: Ssh | None = Field(None, description="How it is reached; None: the folder is on this machine.")
    holds: bool = Field(True, description="Whether engines run there.")


class Perimeter(Frozen):
    """A perimeter: one gateway in front of some serving nodes, steered by one alias."""

    alias: str = Field(description="The MLflow alias that is this perimeter's request.")
    gateway: str = Field(description="URL that callers use, without a trailing slash.")
    public: str | None = Field(None, description="URL for callers on other machines, if they may reach it.")
    nodes: tuple[Node, ...] = Field(description="The machines that hold versions; one may be the gateway's as well.")
    gateway_node: str = Field(description="Name of the node whose `apply` renders the gateway's routes.")
    progressive: bool = Field(False, description="Whether versions come in by the stages of their roll-out policy.")
    keeps_last: bool = Field(
        False, description="Whether what serves goes on serving when the alias, or its version, is deleted."
    )
    warm: int = Field(0, ge=0, description="How many versions that served before stay loaded, for a fast rollback.")
    orchestrator: str | None = Field(None, description="URL of the service that alone converges it, if one does.")
    poll_s: int = Field(30, ge=1, description="How often that service looks, unless something wakes it.")
    admits: Path | None = Field(None, description="Public key that an archive must carry to be considered at all.")

    @model_validator(mode="after")
    def _has_its_gateway(self) -> Self:
        if self.gateway_node not in [node.name for node in self.nodes]:
            raise ValueError(f"gateway_node {self.gateway_node!r} is none of the perimeter's nodes")
        return self


class TrackingServer(Frozen):
    """Where the tracking server listens."""

    url: str
    public: str | None = Field(None, description="URL for clients on other machines, if they may reach it.")


class Site(Frozen):
    """`<state>/site.json`, written by the role `control`: what runs where."""

    supervisor: Path = Field(description="Control socket of supervisord.")
    tracking: TrackingServer
    perimeters: dict[str, Perimeter]


class TrackingStore(Frozen):
    """`store.json` beside the tracking server's files, written by the role `tracking`: where its data are."""

    database: Path = Field(description="The registry, in SQLite.")
    artifacts: str = Field(description="A folder, or a gs:// URL.")
    backup: str | None = Field(None, description="Folder or gs:// URL that the registry is replicated to, if it is.")

    @property
    def beside(self) -> bool:
        """Whether the artifacts lie beside the registry, and move with it when the whole folder moves."""
        return self.artifacts == str(self.database.with_name("artifacts"))


class BackupPlan(Frozen):
    """`backup/plan.json`, written by the role `control`: which files are kept a second time, and where."""

    place: str = Field(description="Folder or gs:// URL.")
    artifacts: Path | None = Field(None, description="Folder of artifacts; None: they are in a bucket already.")
    keys: Path = Field(description="Folder of the private keys.")
    recipient: str | None = Field(None, description="Public age key that they are encrypted for; None: left out.")


class PublicPlace(Frozen):
    """Where other machines reach a server, always by TLS: there is none without a certificate and its key."""

    address: str
    port: int = Field(ge=1024, le=65535)
    certificate: Path = Field(description="Certificate with its chain (PEM); a renewed one is taken up at once.")
    key: Path = Field(description="Its private key (PEM).")

    @model_validator(mode="after")
    def _at_an_address(self) -> Self:
        if not is_ip(self.address):
            raise ValueError(f"address {self.address!r}; expected an IP address")
        return self


class TrackingFront(Frozen):
    """`front/front.json` beside the tracking server's files, written by the role `tracking`: its door for others."""

    folder: Path = Field(description="Holds envoy.yaml and the names of the certificates.")
    public: PublicPlace
    authority: Path = Field(description="Certificate (PEM) of the CA that a client's certificate must come from.")
    upstream_port: int = Field(description="Port of the tracking server on loopback.")
    log: Path


class GatewayPlace(Frozen):
    """Where a node's `apply` finds the gateway whose routes it renders."""

    folder: Path = Field(description="Holds envoy.yaml, cds.yaml and rds.yaml.")
    port: int
    admin_port: int
    public: PublicPlace | None = Field(None, description="Where callers on other machines reach it, if they may.")


class NodeConfig(Frozen):
    """`node.json` in a serving node's folder, written by the role `serving`: all that `apply` must know."""

    name: str
    perimeter: str
    folder: Path
    engine: str = Field("torchserve", description="Name of the engine adapter.")
    engine_ports: tuple[int, int] = Field(description="First and last port that engine instances may use.")
    supervisor: Path = Field(description="Control socket of supervisord.")
    programs: Path = Field(description="Folder that supervisord includes.")
    logs: Path
    environments: Path = Field(description="Folder of the component environments, by name.")
    java_home: Path
    trust: Path = Field(description="Public key (PEM) that archives must be signed for.")
    predictions: Path = Field(description="Folder of the prediction log, a folder a component.")
    gateway: GatewayPlace | None = Field(None, description="Where this node renders a gateway's routes, if it does.")
    holds: bool = Field(True, description="Whether engines run on this node.")


def root() -> Path:
    """The checkout: the nearest folder upwards that holds a Snakefile and components/."""
    start = Path(os.environ.get("TORCHRELAY_ROOT", Path.cwd())).absolute()
    for folder in (start, *start.parents):
        if (folder / "Snakefile").is_file() and (folder / "components").is_dir():
            return folder
    raise ConfigError(
        f"{start} is not inside a Torchrelay checkout",
        "a folder that holds Snakefile and components/",
        "cd into the checkout, or set TORCHRELAY_ROOT",
    )


def merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> Json:
    """Lay `overlay` over `base`, key by key, as deep as both are mappings."""
    merged = dict(base)
    for key, value in overlay.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_yaml(path: Path) -> Json:
    """Read a YAML mapping; a missing file, broken YAML or another type is a ConfigError."""
    import yaml

    try:
        # The one in C takes a tenth of the time, where PyYAML was built with it.
        content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - safe both
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "a readable YAML file", f"git checkout -- {path}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", "a YAML mapping", f"edit {path}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}", "a YAML mapping", f"edit {path}")
    return content


def validated(model: type[M], content: Json, origin: Path) -> M:
    """Validate `content` against `model`; each wrong key is named with the file it stands in."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors())
        raise ConfigError(f"{origin}: {wrong}", f"keys and types of {model.__name__}", f"edit {origin}") from error


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The merged settings: defaults, then `config/local.yaml` (or TORCHRELAY_CONFIG), then the environment."""
    folder = root() / "config"
    overlay = Path(os.environ.get("TORCHRELAY_CONFIG", folder / "local.yaml"))
    merged = read_yaml(folder / "defaults.yaml")
    if overlay.is_file() or "TORCHRELAY_CONFIG" in os.environ:
        merged = merge(merged, read_yaml(overlay))
    for key in _FROM_ENVIRONMENT:
        if value := os.environ.get(f"TORCHRELAY_{key.upper()}"):
            merged[key] = value
    merged = merge(merged, {"listen": _listen_of_environment(), "backup": _of_environment("backup", Backup)})
    found = validated(Settings, merged, overlay if overlay.is_file() else folder / "defaults.yaml")
    absolute = {
        "state": root() / found.state,
        "keys": found.keys.expanduser(),
        "inventory": root() / found.inventory,
        "listen": _absolute(found.listen),
        "backup": found.backup.model_copy(
            update={"folder": root() / found.backup.folder.expanduser() if found.backup.folder else None}
        ),
    }
    return found.model_copy(update=absolute)


def _of_environment(part: str, model: type[BaseModel]) -> Json:
    """TORCHRELAY_<PART>_<FIELD> for each field of that part of the settings."""
    given = {key: os.environ.get(f"TORCHRELAY_{part}_{key}".upper()) for key in model.model_fields}
    return {key: value for key, value in given.items() if value}


def _listen_of_environment() -> Json:
    """TORCHRELAY_LISTEN_ADDRESS, _NAMES (with commas between them), _CERTIFICATE and _KEY."""
    found = _of_environment("listen", Listen)
    if "names" in found:
        found["names"] = [name.strip() for name in found["names"].split(",")]
    return found


def _absolute(listen: Listen) -> Listen:
    files = {"certificate": listen.certificate, "key": listen.key}
    return listen.model_copy(update={name: root() / path.expanduser() for name, path in files.items() if path})


def component(name: str) -> Component:
    """The component's `component.yaml` with the overrides of the settings laid over it."""
    path = root() / "components" / name / "component.yaml"
    if not path.is_file():
        raise ConfigError(
            f"there is no component {name!r}",
            f"one of: {', '.join(component_names()) or 'none yet'}",
            f"make new-component NAME={name}",
        )
    found = validated(Component, merge(read_yaml(path), settings().components.get(name, {})), path)
    if found.name != name:
        raise ConfigError(f"{path} names itself {found.name!r}", f"name: {name}", f"edit {path}")
    return found


def component_names() -> list[str]:
    """Every folder under components/ that has a component.yaml, sorted."""
    return sorted(path.parent.name for path in (root() / "components").glob("*/component.yaml"))


def site() -> Site:
    """Where things run; a ConfigError before the first `make up`."""
    return read_json(Site, settings().state / "site.json", "make up")


def read_json(model: type[M], path: Path, next_command: str) -> M:
    """Read one hand-over file; a missing or broken one names the command that writes it."""
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", f"a {model.__name__} file", next_command) from error
    except ValidationError as error:
        raise ConfigError(f"{path} is not a {model.__name__}: {error}", f"a {model.__name__}", next_command) from error


def write_json(path: Path, content: BaseModel) -> None:
    """Write aside, fsync, rename: a reader sees the old file or the new one, never half of one."""
    write_file(path, (content.model_dump_json(indent=2) + "\n").encode())


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Replace `path` atomically by `content`; the file is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
