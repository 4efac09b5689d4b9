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

from torchrelay.config import GatewayPlace, PublicPlace
from torchrelay.errors import BusyError, ServingError
from torchrelay.serving import gateway, ports
from torchrelay.serving.gateway import Backend, Endpoint, Routes
from torchrelay.serving.gateway_config import bootstrap, clusters
from torchrelay.serving.gateway_routes import route_file


def backend(component: str = "digits", version: str = "7", port: int = 9000, **others: Any) -> Backend:
    fields = {"endpoints": (Endpoint(host="127.0.0.1", port=port),), "path": f"/predictions/{component}/{version}"}
    return Backend.model_validate({"component": component, "version": version, "digest": "ab"} | fields | others)


def place(folder: Path) -> GatewayPlace:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return GatewayPlace(folder=folder / "gateway", port=one.getsockname()[1], admin_port=other.getsockname()[1])


def envoy_routes(routes: Routes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = route_file(routes)["resources"][0]["virtual_hosts"][0]["routes"]
    return found


def actions(routes: Routes) -> list[dict[str, Any]]:
    """The routes that lead to a backend."""
    return [route for route in envoy_routes(routes) if "route" in route]


def shares(routes: Routes) -> dict[str, float]:
    """The share of requests with a known length that each cluster gets, as Envoy works out fractions."""
    taken, found = 0.0, {}
    for route in actions(routes):
        fraction = route["match"]["runtime_fraction"]
        if len(route["match"]["headers"]) == 1:
            upto = fraction["default_value"]["numerator"] / 1_000_000
            found[route["route"]["cluster"]] = upto - taken
            taken = upto
    return found


def test_a_cluster_is_named_by_all_of_its_backend_but_its_share_of_requests() -> None:
    assert backend(weight=1).cluster == backend(weight=2).cluster == backend(weight=0, mirror=True).cluster
    assert backend(max_requests_per_s=5).cluster == backend().cluster
    others = [backend(port=9001), backend(timeout_s=3), backend(version="8"), backend(component="mail")]
    assert len({found.cluster for found in [backend(), *others]}) == 5


@given(st.lists(st.integers(0, 100), min_size=1, max_size=5).filter(any))
def test_weights_are_shares_and_add_up(weights: list[int]) -> None:
    backends = tuple(backend(version=str(i), weight=weight) for i, weight in enumerate(weights))
    found = shares(Routes(backends=backends))
    assert sum(found.values()) == pytest.approx(1)
    for one in backends:
        assert found.get(one.cluster, 0) == pytest.approx(one.weight / sum(weights), abs=3e-6)
        assert (one.cluster in found) == (one.weight > 0)


def test_a_mirror_gets_a_copy_of_every_request_and_no_share() -> None:
    mirror = backend(version="9", weight=0, mirror=True)
    others = backend(weight=30), mirror, backend(version="8", weight=70), backend(component="mail", version="1")
    found = actions(Routes(backends=others))
    assert len(found) == 6
    for route in found:
        assert route["route"]["cluster"] != mirror.cluster
        policies = route["route"]["request_mirror_policies"]
        of_digits = route["match"]["path"] == "/predictions/digits"
        assert [one["cluster"] for one in policies] == ([mirror.copies_cluster] if of_digits else [])
        assert all(one["runtime_fraction"]["default_value"]["numerator"] == 1_000_000 for one in policies)


def test_a_mirror_that_answers_callers_gets_copies_of_what_the_others_answer() -> None:
    mirror, new = backend(weight=95, mirror=True), backend(version="8", weight=5)
    for route in actions(Routes(backends=(mirror, new))):
        copied = [one["cluster"] for one in route["route"]["request_mirror_policies"]]
        assert copied == ([] if route["route"]["cluster"] == mirror.cluster else [mirror.copies_cluster])


def test_a_shadow_gets_as_many_copies_as_its_stage_says() -> None:
    live, shadow = backend(), backend(version="8", weight=0, mirror=True, copies=20)
    assert shadow.cluster == backend(version="8").cluster
    (policy,) = actions(Routes(backends=(live, shadow)))[0]["route"]["request_mirror_policies"]
    assert policy["runtime_fraction"]["default_value"]["numerator"] == 200_000


def test_only_copies_pay_for_a_path_of_their_own() -> None:
    def filters(one: dict[str, Any]) -> list[str]:
        (options,) = one["typed_extension_protocol_options"].values()
        return [found["name"].rpartition(".")[2] for found in options["http_filters"]]

    assert [filters(one) for one in clusters(backend(mirror=True))] == [["upstream_codec"], ["lua", "upstream_codec"]]
    assert [filters(one) for one in clusters(backend())] == [["upstream_codec"]]


def test_a_component_without_any_weight_is_refused() -> None:
    with pytest.raises(ValidationError, match="no backend of mail has any weight"):
        Routes(backends=(backend(), backend(component="mail", weight=0)))


def test_endpoints_of_one_backend_are_asked_for_their_health_in_one_way() -> None:
    points = [Endpoint(host="127.0.0.1", port=1, health_port=2), Endpoint(host="127.0.0.1", port=3, health_port=4)]
    content = backend().model_dump(exclude={"endpoints"})
    assert Backend(**content, endpoints=tuple(points))
    for other in ({"health_path": "/models"}, {"health_text": "READY"}):
        with pytest.raises(ValidationError, match="different health checks"):
            Backend(**content, endpoints=(points[0], points[1].model_copy(update=other)))


def test_a_health_check_looks_for_the_text_at_the_port_that_knows() -> None:
    point = Endpoint(host="127.0.0.1", port=1, health_port=2, health_path="/models/digits/7", health_text='"a": é')
    (found,) = clusters(Backend(**backend().model_dump(exclude={"endpoints"}), endpoints=(point,)))
    (endpoint,) = found["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert endpoint["endpoint"]["health_check_config"] == {"port_value": 2}
    (check,) = found["health_checks"]
    assert check["http_health_check"]["path"] == "/models/digits/7"
    assert bytes.fromhex(check["http_health_check"]["receive"][0]["text"]).decode() == '"a": é'


def test_the_limit_of_a_component_is_the_largest_of_its_backends() -> None:
    mail = backend(component="mail")
    backends = backend(max_requests_per_s=5), backend(version="8", max_requests_per_s=9), backend(version="9"), mail
    (host,) = route_file(Routes(backends=backends))["resources"][0]["virtual_hosts"]
    (limits,) = host["typed_per_filter_config"].values()
    (limit,) = limits["descriptors"]
    assert limit["entries"] == [{"key": "component", "value": "digits"}]
    assert limit["token_bucket"]["tokens_per_fill"] == 9
    (host,) = route_file(Routes(backends=(mail,)))["resources"][0]["virtual_hosts"]
    assert host["typed_per_filter_config"] == {}


def test_retries_go_elsewhere_for_what_only_an_engine_says() -> None:
    alone, two = backend(), backend(endpoints=(*backend().endpoints, Endpoint(host="127.0.0.1", port=9001)))
    policies = [actions(Routes(backends=(one,)))[0]["route"]["retry_policy"] for one in (alone, two)]
    assert [policy["retriable_status_codes"] for policy in policies] == [[], [404, 500, 503, 507]]
    assert [("retriable-status-codes" in policy["retry_on"]) for policy in policies] == [False, True]


def test_versions_of_files_follow_their_content() -> None:
    assert route_file(Routes(backends=(backend(),))) == route_file(Routes(backends=(backend(),)))
    one, other = (route_file(Routes(backends=(backend(weight=w), backend(version="8")))) for w in (1, 2))
    assert one["version_info"] != other["version_info"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": -1},
        {"weight": 101},
        {"max_requests_per_s": 0},
        {"port": 0},
        {"port": 70000},
        {"component": "a/b"},
        {"version": "1 2"},
        {"timeout_s": 0},
        {"health_path": "/ping"},
    ],
)
def test_impossible_backends_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        backend(**wrong)


PUBLIC = {"address": "0.0.0.0", "port": 9443, "certificate": "/tls/server.crt", "key": "/tls/server.key"}


def with_public(where: GatewayPlace) -> GatewayPlace:
    return GatewayPlace(**where.model_dump(exclude={"public"}), public=PublicPlace.model_validate(PUBLIC))


@pytest.mark.parametrize("missing", ["certificate", "key"])
def test_nothing_listens_beyond_loopback_without_certificate_and_key(missing: str) -> None:
    with pytest.raises(ValidationError, match=missing):
        PublicPlace.model_validate(PUBLIC | {missing: None})
    with pytest.raises(ValidationError, match=missing):
        PublicPlace.model_validate({key: value for key, value in PUBLIC.items() if key != missing})


@pytest.mark.parametrize("wrong", [{"address": "relay.example.org"}, {"address": ""}, {"port": 443}])
def test_a_public_place_has_an_ip_address_and_a_port_that_is_ours(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PublicPlace.model_validate(PUBLIC | wrong)


def test_without_a_public_place_the_gateway_listens_on_loopback_alone(tmp_path: Path) -> None:
    (door,) = bootstrap(place(tmp_path))["static_resources"]["listeners"]
    assert door["address"]["socket_address"]["address"] == "127.0.0.1"
    assert "transport_socket" not in door["filter_chains"][0]


def test_the_public_door_is_the_same_gateway_behind_tls(tmp_path: Path) -> None:
    where = place(tmp_path)
    inner, outer = bootstrap(with_public(where))["static_resources"]["listeners"]
    assert [inner] == bootstrap(where)["static_resources"]["listeners"]
    assert outer["address"]["socket_address"] == {"address": "0.0.0.0", "port_value": 9443}
    assert outer["filter_chains"][0]["filters"] == inner["filter_chains"][0]["filters"]
    tls = outer["filter_chains"][0]["transport_socket"]["typed_config"]
    assert tls["common_tls_context"]["tls_params"] == {"tls_minimum_protocol_version": "TLSv1_2"}
    (secret,) = tls["common_tls_context"]["tls_certificate_sds_secret_configs"]
    gateway.write_bootstrap(with_public(where))
    named = json.loads(Path(secret["sds_config"]["path_config_source"]["path"]).read_text())["resources"][0]
    assert named["name"] == secret["name"]
    assert named["tls_certificate"]["private_key"] == {"filename": "/tls/server.key"}


def test_another_certificate_needs_no_restart_and_another_door_does(tmp_path: Path) -> None:
    where = with_public(place(tmp_path))
    gateway.write_bootstrap(where)
    before = gateway.gateway_program(where, tmp_path / "log")
    other = where.model_copy(update={"public": PublicPlace.model_validate(PUBLIC | {"certificate": "/tls/own.crt"})})
    assert not gateway.write_bootstrap(other)
    assert "own.crt" in (where.folder / "certificate.yaml").read_text()
    assert gateway.gateway_program(other, tmp_path / "log") == before
    closed = where.model_copy(update={"public": None})
    assert gateway.write_bootstrap(closed)
    assert gateway.gateway_program(closed, tmp_path / "log") != before


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
    assert gateway.live_backends(where) == gateway.shares(where) == gateway.draining(where) == ()
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
