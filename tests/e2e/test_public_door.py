"""The doors for other machines, real ones: TLS at the gateway, mutual TLS before the tracking server."""

import http.client
import os
import socket
import ssl
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import urllib3

import certificates_rig
import gateway_rig as rig
from certificates_rig import CLIENT, Authority, Pair, https, shown, trusting
from torchrelay.config import GatewayPlace, PublicPlace, TrackingFront
from torchrelay.serving import gateway
from torchrelay.serving.gateway import Routes
from torchrelay.serving.tracking_front import front_program, write_front

pytestmark = pytest.mark.real
NAMES = ("127.0.0.1", "relay.example.org")


@dataclass(frozen=True)
class Door:
    """A server's door for others, who is believed there, and what it shows."""

    port: int
    authority: Authority
    pair: Pair

    def ask(self, path: str = "/predictions/digits") -> rig.Reply:
        """A request of a caller who trusts the CA alone."""
        connection = https(self.port, trusting(self.authority.certificate))
        connection.request("POST", path, body=b"{}")
        try:
            return rig.Reply(connection.getresponse())
        finally:
            connection.close()

    def shows(self) -> bool:
        """Whether a new caller is shown what lies on the disk now."""
        return shown(self.port, trusting(self.authority.certificate)) == self.pair.certificate.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("public")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


def public(pair: Pair) -> PublicPlace:
    # All addresses of the machine, as a user sets it; the tests come by loopback.
    return PublicPlace(address="0.0.0.0", port=rig.free_port(), certificate=pair.certificate, key=pair.key)


@pytest.fixture(scope="module")
def running(folder: Path, authority: Authority) -> Iterator[tuple[GatewayPlace, Door]]:
    pair = authority.issue("server", NAMES)
    with rig.upstream(folder) as port, rig.envoy(folder, public(pair)) as place:
        gateway.apply_routes(place, Routes(backends=(rig.backend(port),)))
        yield place, Door(place.public.port, authority, pair)


@pytest.fixture
def place(running: tuple[GatewayPlace, Door]) -> GatewayPlace:
    return running[0]


@pytest.fixture
def door(running: tuple[GatewayPlace, Door]) -> Door:
    return running[1]


def test_a_caller_who_trusts_the_ca_is_answered(door: Door) -> None:
    reply = door.ask()
    assert (reply.status, reply.header("x-model-version")) == (200, "7")
    assert shown(door.port, trusting(door.authority.certificate), "relay.example.org")


def test_who_does_not_trust_the_ca_or_asks_for_another_name_turns_away(door: Door, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shown(door.port, ssl.create_default_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        shown(door.port, trusting(Authority(tmp_path, "another").certificate))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shown(door.port, trusting(door.authority.certificate), "other.example.org")


def test_plain_http_gets_no_answer(door: Door) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=20)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        connection.request("GET", "/healthz")
        connection.getresponse()
    connection.close()
    assert door.ask().status == 200


def handshake(port: int, version: ssl.TLSVersion) -> str | None:
    """The TLS version that a caller agrees on who can do nothing else, whatever its own policy is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="x") as secure,
    ):
        return secure.version()


def test_tls_before_1_2_is_refused(door: Door) -> None:
    assert handshake(door.port, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    assert handshake(door.port, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    # The alert is the server's: the caller would have gone on.
    with pytest.raises(ssl.SSLError, match="TLSV1_ALERT_PROTOCOL_VERSION"):
        handshake(door.port, ssl.TLSVersion.TLSv1_1)


def test_the_door_on_loopback_is_as_it_was(place: GatewayPlace, door: Door) -> None:
    assert rig.ask(place).status == 200
    assert gateway.healthy(place)
    with pytest.raises(ssl.SSLError):
        shown(place.port, trusting(door.authority.certificate))


def test_a_change_of_routes_reaches_both_doors(place: GatewayPlace, door: Door, folder: Path) -> None:
    before = gateway.live_backends(place)
    with rig.upstream(folder, "8") as port:
        gateway.apply_routes(place, Routes(backends=(rig.backend(port, "8"),)))
        assert [rig.ask(place).header("x-model-version"), door.ask().header("x-model-version")] == ["8", "8"]
        gateway.apply_routes(place, Routes(backends=before))
        gateway.prune(place)
    assert door.ask().header("x-model-version") == "7"


def test_limits_are_those_of_the_gateway(door: Door, place: GatewayPlace) -> None:
    before = gateway.live_backends(place)
    gateway.apply_routes(place, Routes(backends=(before[0].model_copy(update={"max_requests_per_s": 1}),)))
    seen = [door.ask().status for _ in range(5)]
    assert (seen[0], seen[-1]) == (200, 429)
    assert rig.ask(place).status == 429
    gateway.apply_routes(place, Routes(backends=before))


def test_a_renewed_certificate_is_served_while_clients_loop(place: GatewayPlace, door: Door) -> None:
    context = trusting(door.authority.certificate)
    clients = rig.Clients(place, 6, connect=lambda: https(door.port, context))
    envoy = gateway_pid(place)
    with clients.looping():
        rig.until(lambda: clients.answers["7"] > 50)
        for _ in range(3):
            before = shown(door.port, context)
            door.authority.issue("server", NAMES)
            rig.until(door.shows, 15)
            assert shown(door.port, context) != before
            answered = clients.answers["7"]
            rig.until(lambda seen=answered: clients.answers["7"] > seen + 50)
    assert clients.failures == []
    assert gateway_pid(place) == envoy


def gateway_pid(place: GatewayPlace) -> tuple[int, float]:
    """The gateway's process, and when it began."""
    import psutil

    (envoy,) = [one for one in psutil.Process().children() if str(place.folder) in " ".join(one.cmdline())]
    return envoy.pid, envoy.create_time()


def test_a_broken_certificate_leaves_what_was_served(place: GatewayPlace, door: Door) -> None:
    context = trusting(door.authority.certificate)
    before = shown(door.port, context)
    for file, content in ((door.pair.certificate, b"broken"), (door.pair.key, b""), (door.pair.certificate, b"")):
        certificates_rig.replace(file, content)
        time.sleep(0.3)
        assert shown(door.port, context) == before
    assert door.ask().status == 200
    door.authority.issue("server", NAMES)
    rig.until(door.shows, 15)


def test_another_file_is_taken_up_as_well(place: GatewayPlace, door: Door) -> None:
    """As when the user's own certificate takes the place of ours: `apply` writes its name, and nothing restarts."""
    own = door.authority.issue("own", NAMES)
    for pair in (own, door.pair):
        changed = place.public.model_copy(update={"certificate": pair.certificate, "key": pair.key})
        gateway.write_bootstrap(place.model_copy(update={"public": changed}))
        rig.until(Door(door.port, door.authority, pair).shows, 15)


def test_a_gateway_without_a_public_place_has_one_door(tmp_path: Path) -> None:
    with rig.envoy(tmp_path) as place:
        assert listening(gateway_pid(place)[0]) == {("127.0.0.1", place.port), ("127.0.0.1", place.admin_port)}


def listening(pid: int) -> set[tuple[str, int]]:
    import psutil

    found = psutil.Process(pid).net_connections(kind="tcp")
    return {(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="module")
def front(folder: Path, authority: Authority, mlflow_server: str) -> Iterator[TrackingFront]:
    """The door of a real tracking server."""
    place = TrackingFront(
        folder=folder / "front",
        public=public(authority.issue("tracking", NAMES)),
        authority=authority.certificate,
        upstream_port=int(mlflow_server.rpartition(":")[2]),
        log=folder / "front.log",
    )
    write_front(place)
    with rig.running(list(front_program(place).command), place.log):
        rig.wait_for_port(place.public.port)
        yield place


def experiments(front: TrackingFront, authority: Authority, client: Pair | None) -> int:
    """Ask the registry something, with this certificate or none; the status of the answer."""
    connection = https(front.public.port, trusting(authority.certificate, client))
    try:
        connection.request("GET", "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default")
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_client_with_a_certificate_reaches_the_registry(front: TrackingFront, authority: Authority) -> None:
    assert experiments(front, authority, authority.issue("client", usage=CLIENT)) == 200


def nobody(_: Authority, __: Path) -> Pair | None:
    return None


def stranger(_: Authority, folder: Path) -> Pair | None:
    return Authority(folder, "another").issue("client", usage=CLIENT)


def namesake(_: Authority, folder: Path) -> Pair | None:
    return Authority(folder, "ca").issue("client", usage=CLIENT)


def server(authority: Authority, _: Path) -> Pair | None:
    return authority.issue("no-client", NAMES)


def ended(authority: Authority, _: Path) -> Pair | None:
    return authority.issue("ended", days=-1, usage=CLIENT)


@pytest.mark.parametrize("who", [nobody, stranger, namesake, server, ended])
def test_without_a_good_certificate_nobody_reaches_the_registry(
    front: TrackingFront,
    authority: Authority,
    tmp_path: Path,
    who: Callable[[Authority, Path], Pair | None],
) -> None:
    # With TLS 1.3 a caller hears of the refusal only after its own part of the handshake.
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
        experiments(front, authority, who(authority, tmp_path))


def test_another_ca_shuts_out_whom_the_one_before_let_in(
    front: TrackingFront, authority: Authority, tmp_path: Path
) -> None:
    """Without a restart, as when a client's certificate got into wrong hands."""
    before, other = authority.certificate.read_bytes(), Authority(tmp_path, "another")
    trusted = tmp_path / "trusted.crt"  # the server itself still shows a certificate by the CA before
    trusted.write_bytes(before)
    old, new = authority.issue("client", usage=CLIENT), other.issue("client", usage=CLIENT)
    try:
        certificates_rig.replace(front.authority, other.certificate.read_bytes())
        rig.until(lambda: let_in(front, trusted, new) and not let_in(front, trusted, old))
    finally:
        certificates_rig.replace(front.authority, before)
    rig.until(lambda: let_in(front, trusted, old) and not let_in(front, trusted, new))


def let_in(front: TrackingFront, trusted: Path, client: Pair) -> bool:
    connection = https(front.public.port, trusting(trusted, client))
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (ssl.SSLError, ConnectionError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def test_the_registrys_door_on_loopback_is_as_it_was(front: TrackingFront, mlflow_server: str) -> None:
    assert urllib3.request("GET", f"{mlflow_server}/health", retries=False).status == 200


def test_mlflows_own_client_comes_in_by_its_settings(
    front: TrackingFront, authority: Authority, tmp_path: Path
) -> None:
    """It moves an alias and brings a large artifact there and back, as docs/how-to/leave-loopback.md tells it to."""
    client = authority.issue("client", usage=CLIENT)
    both = tmp_path / "client.pem"
    both.write_bytes(client.key.read_bytes() + client.certificate.read_bytes())
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
        "MLFLOW_TRACKING_URI": f"https://127.0.0.1:{front.public.port}",
        "MLFLOW_TRACKING_SERVER_CERT_PATH": str(authority.certificate),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    refused = run_client(environment, tmp_path)
    assert refused.returncode != 0 and "Traceback" in refused.stderr
    let_in = run_client({**environment, "MLFLOW_TRACKING_CLIENT_CERT_PATH": str(both)}, tmp_path)
    assert (let_in.returncode, let_in.stdout.split()) == (0, ["1", "20971520"]), let_in.stderr


def run_client(environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MLFLOW_CLIENT, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


MLFLOW_CLIENT = """
import pathlib, sys
from mlflow import MlflowClient
client, folder = MlflowClient(), pathlib.Path(sys.argv[1])
(folder / "large").write_bytes(b"x" * 20 * 2**20)
run = client.create_run(client.get_experiment_by_name("Default").experiment_id)
client.log_artifact(run.info.run_id, str(folder / "large"))
client.create_registered_model("from-afar")
client.create_model_version("from-afar", run.info.artifact_uri, run.info.run_id)
client.set_registered_model_alias("from-afar", "dev", "1")
back = client.download_artifacts(run.info.run_id, "large", str(folder))
print(client.get_model_version_by_alias("from-afar", "dev").version, pathlib.Path(back).stat().st_size)
"""


def test_who_came_is_written_down(front: TrackingFront, authority: Authority) -> None:
    assert experiments(front, authority, authority.issue("auditor", usage=CLIENT)) == 200
    rig.until(lambda: '"client":"CN=a auditor"' in front.log.read_text())
