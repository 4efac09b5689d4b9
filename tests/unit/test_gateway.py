"""The gateway's configuration as pure functions, and ports; a real Envoy judges and runs it in tests/e2e."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchrelay.config import GatewayPlace
from torchrelay.errors import BusyError, ServingError
from torchrelay.serving import gateway, ports
from torchrelay.serving.gateway import Backend, Endpoint, Routes
from torchrelay.serving.gateway_config import route_file


def backend(component: str = "digits", version: str = "7", port: int = 9000, **others: Any) -> Backend:
    endpoints = (Endpoint(host="127.0.0.1", port=port),)
    path = f"/predictions/{component}/{version}"
    return Backend(component=component, version=version, digest="ab", endpoints=endpoints, path=path, **others)


def place(folder: Path) -> GatewayPlace:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return GatewayPlace(folder=folder / "gateway", port=one.getsockname()[1], admin_port=other.getsockname()[1])


def envoy_routes(routes: Routes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = route_file(routes)["resources"][0]["virtual_hosts"][0]["routes"]
    return found


def shares(routes: Routes) -> dict[str, float]:
    """The share of requests with a known length that each cluster gets, as Envoy works out fractions."""
    taken, found = 0.0, {}
    for route in envoy_routes(routes):
        fraction = route["match"].get("runtime_fraction")
        if fraction and "route" in route and len(route["match"]["headers"]) == 1:
            upto = fraction["default_value"]["numerator"] / 1_000_000
            found[route["route"]["cluster"]] = upto - taken
            taken = upto
    return found


def test_a_cluster_is_named_by_all_of_its_backend_but_the_weight() -> None:
    assert backend(weight=1).cluster == backend(weight=2).cluster
    others = [backend(port=9001), backend(timeout_s=3), backend(version="8"), backend(component="mail")]
    assert len({found.cluster for found in [backend(), *others]}) == 5


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5))
def test_weights_are_shares_and_add_up(weights: list[int]) -> None:
    backends = tuple(backend(version=str(i), weight=weight) for i, weight in enumerate(weights))
    found = shares(Routes(backends=backends))
    assert sum(found.values()) == pytest.approx(1)
    for one in backends:
        assert found[one.cluster] == pytest.approx(one.weight / sum(weights), abs=3e-6)


def test_versions_of_files_follow_their_content() -> None:
    assert route_file(Routes(backends=(backend(),))) == route_file(Routes(backends=(backend(),)))
    one, other = (route_file(Routes(backends=(backend(weight=w), backend(version="8")))) for w in (1, 2))
    assert one["version_info"] != other["version_info"]


@pytest.mark.parametrize(
    "wrong",
    [{"weight": 0}, {"port": 0}, {"port": 70000}, {"component": "a/b"}, {"version": "1 2"}, {"timeout_s": 0}],
)
def test_impossible_backends_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        backend(**wrong)


def test_bootstrap_is_written_once_and_keeps_routes(tmp_path: Path) -> None:
    where = place(tmp_path)
    assert gateway.write_bootstrap(where)
    assert not gateway.write_bootstrap(where)
    assert gateway.apply_routes(where, Routes(backends=(backend(),)), wait=False)
    assert not gateway.apply_routes(where, Routes(backends=(backend(),)), wait=False)
    assert not gateway.write_bootstrap(where)
    clusters = json.loads((where.folder / "cds.yaml").read_text())["resources"]
    assert [found["name"] for found in clusters] == [backend().cluster]


def test_another_bootstrap_is_another_program(tmp_path: Path) -> None:
    programs = []
    for where in (place(tmp_path), place(tmp_path)):
        gateway.write_bootstrap(where)
        programs.append(gateway.gateway_program(where, tmp_path / "gateway.log"))
    assert programs[0].environment != programs[1].environment
    assert programs[0].name == f"{tmp_path.name}-gateway"


def test_a_gateway_that_does_not_run(tmp_path: Path) -> None:
    where = place(tmp_path)
    gateway.write_bootstrap(where)
    assert not gateway.healthy(where)
    assert gateway.live_backends(where) == ()
    with pytest.raises(ServingError, match=f"admin port {where.admin_port}"):
        gateway.apply_routes(where, Routes(backends=(backend(),)))
    assert not gateway.apply_routes(where, Routes(), wait=False)


def test_a_taken_port_is_reported_with_its_holder() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        assert ports.port_taken(port)
        with pytest.raises(BusyError) as caught:
            ports.check_port(port, "the dev gateway")
    assert f"port {port}, needed for the dev gateway, is taken by" in caught.value.found
    assert f"(pid {os.getpid()})" in caught.value.found
    ports.check_port(port, "the dev gateway")
