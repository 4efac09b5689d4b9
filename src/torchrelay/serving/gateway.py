"""The gateway of a perimeter: Envoy from its wheel, and changing what it routes without losing a request.

A swap adds the new clusters, waits until Envoy has warmed them, then replaces the routes, and waits until the thread
that answers requests routes by them. Old clusters stay until `prune`. Every step writes one file atomically, so being
killed anywhere leaves something that serves, and the next run goes on from there.

Known limit: a request whose body has no announced length is buffered first and counts as in flight only once it is
whole. One that is still being sent when its backend is stopped after a swap gets a 503.
"""

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from torchrelay.config import GatewayPlace, Json, write_file
from torchrelay.errors import ServingError
from torchrelay.handover import Endpoint, RouteShare
from torchrelay.serving.engine import Program
from torchrelay.serving.envoy_config import (
    BOOTSTRAP,
    CERTIFICATE,
    certificate_file,
    encoded,
    envoy_binary,
    stands,
    write_config,
)
from torchrelay.serving.gateway_admin import NobodyListensError, admin, get, statistics
from torchrelay.serving.gateway_config import (
    CLUSTERS,
    REQUEST_TIMEOUT_S,
    ROUTE_NAME,
    ROUTES,
    STAT_PREFIX,
    Backend,
    Routes,
    bootstrap,
    cluster_file,
    clusters,
    static_bootstrap,
)
from torchrelay.serving.gateway_routes import route_file

__all__ = [
    "REQUEST_TIMEOUT_S",
    "Backend",
    "Endpoint",
    "Routes",
    "apply_routes",
    "draining",
    "envoy_binary",
    "gateway_program",
    "healthy",
    "in_flight",
    "live_backends",
    "prune",
    "retries",
    "shares",
    "write_bootstrap",
]

_TIMEOUT_S: Final = 15.0
_POLL_S: Final = 0.01
# Envoy's name for the watcher of each file, under which its statistics stand.
_WATCHERS: Final = {CLUSTERS: "cluster_manager.cds", ROUTES: f"http.{STAT_PREFIX}.rds.{ROUTE_NAME}"}


def write_bootstrap(place: GatewayPlace) -> bool:
    """Write `envoy.yaml`, empty routes where there are none yet, and which certificate a public door shows.

    Envoy reads the bootstrap only when it starts: `gateway_program` then differs as well, so that a supervisor which
    compares programs restarts it. Whether anything was written is returned.
    """
    if place.public:
        write_config(place.folder / CERTIFICATE, certificate_file(place.public))
    changed = write_config(place.folder / BOOTSTRAP, bootstrap(place))
    for name, empty in ((CLUSTERS, cluster_file([])), (ROUTES, route_file(Routes()))):
        if not (place.folder / name).is_file():
            changed |= write_config(place.folder / name, empty)
    return changed


def gateway_program(place: GatewayPlace, log: Path) -> Program:
    """How to run the gateway. One worker thread: it costs less than the engine and makes swaps observable.

    The access log goes to stdout as JSON lines; the supervisor rotates `log`.
    """
    folder = place.folder.absolute()
    command = (str(envoy_binary()), "-c", str(folder / BOOTSTRAP), "--disable-hot-restart", "--concurrency", "1")
    quiet = ("--log-level", "warning", "--file-flush-interval-msec", "1000")
    return Program(
        name=f"{folder.parent.name}-gateway",
        command=(*command, *quiet),
        environment={"TORCHRELAY_BOOTSTRAP": hashlib.sha256((folder / BOOTSTRAP).read_bytes()).hexdigest()[:16]},
        directory=folder,
        log=log,
    )


def apply_routes(place: GatewayPlace, routes: Routes, wait: bool = True) -> bool:
    """Route exactly `routes`; whether anything had to change. Clusters that are routed no more stay: see `prune`.

    With `wait` it returns when the running gateway routes by them, without it (the gateway is not up yet) when the
    files are written. ServingError with Envoy's own words when it refuses; what it had before then stands again.
    """
    wanted = route_file(routes)
    if stands(place.folder / ROUTES, wanted) and (not wait or _routed_version(place) == wanted["version_info"]):
        return False
    new = {one["name"]: one for backend in routes.backends for one in clusters(backend)}
    there = {one["name"]: one for one in _clusters(place)}
    _deliver(place, CLUSTERS, cluster_file(list((there | new).values())), wait)
    if wait:
        names = new.keys()
        _until(lambda: names <= _active_clusters(place), "did not warm the new backends")
    _deliver(place, ROUTES, wanted, wait)
    if wait:
        _until(lambda: _routed_version(place) == wanted["version_info"], "did not route by the new routes")
    return True


def prune(place: GatewayPlace) -> list[str]:
    """Take away the clusters that no route names and that have no request in flight; their names."""
    kept = _kept(place)
    there = _clusters(place)
    idle = {found["name"] for found in there if found["name"] not in kept}
    idle -= {name for name, requests in _settled(place).items() if requests}
    if idle:
        _deliver(place, CLUSTERS, cluster_file([found for found in there if found["name"] not in idle]), wait=True)
    return sorted(idle)


def in_flight(place: GatewayPlace, component: str, version: str) -> int:
    """Requests still in flight to this version's backends that are routed no more; 0 when they may be stopped."""
    prefix = f"{component}@{version}@"
    return sum(requests for name, requests in _leaving(place).items() if name.startswith(prefix))


def draining(place: GatewayPlace) -> tuple[str, ...]:
    """`component@version` of each that is routed no more and still has requests in flight; none where no gateway runs.

    A version whose endpoints have changed is among them while the old ones still answer.
    """
    try:
        found = _leaving(place)
    except NobodyListensError:
        return ()
    return tuple(sorted({name.rpartition("@")[0] for name, requests in found.items() if requests}))


def live_backends(place: GatewayPlace) -> tuple[Backend, ...]:
    """What the running gateway routes or keeps warm, asked of Envoy itself; nothing where no gateway runs.

    Nothing as well where its routes were written by another release, which described them otherwise.
    """
    try:
        dump = json.loads(admin(place, "/config_dump?resource=dynamic_route_configs"))
    except NobodyListensError:
        return ()
    for found in dump.get("configs", []):
        metadata = found.get("route_config", {}).get("metadata", {}).get("filter_metadata", {})
        if "torchrelay" in metadata:
            return _described(metadata["torchrelay"]["routes"])
    return ()


def _described(routes: str) -> tuple[Backend, ...]:
    try:
        return Routes.model_validate_json(routes).backends
    except ValidationError:
        return ()


def shares(place: GatewayPlace) -> tuple[RouteShare, ...]:
    """What the running gateway does with each version; nothing where no gateway runs.

    Weights as they were applied: relative to the sum of the component's.
    """
    return tuple(
        RouteShare(
            component=backend.component,
            version=backend.version,
            digest=backend.digest,
            weight=backend.weight,
            mirror=backend.mirror,
            endpoints=backend.endpoints,
        )
        for backend in live_backends(place)
    )


def healthy(place: GatewayPlace) -> bool:
    """Whether the gateway answers callers."""
    return _routed_version(place) is not None


def retries(place: GatewayPlace) -> int:
    """How often the gateway has asked a backend again since it started, over all backends that it ever had."""
    counters = statistics(place, rf"^vhost\.gateway\.vcluster\.{ROUTE_NAME}\.upstream_rq_retry$")
    return sum(int(value) for value in counters.values())


def _routed_version(place: GatewayPlace) -> str | None:
    """The version of the routes by which the gateway's worker answers; None when it does not answer."""
    import urllib3

    try:
        answer = get(place.port, "/healthz")
        return str(answer.json()["routes"]) if answer.status == 200 else None
    except (urllib3.exceptions.HTTPError, ValueError, KeyError):
        return None


def _active_clusters(place: GatewayPlace) -> set[str]:
    """Names of the clusters that Envoy has warmed; one still warming has statistics, but does not stand here."""
    return {found["name"] for found in json.loads(admin(place, "/clusters?format=json")).get("cluster_statuses", [])}


def _in_flight(place: GatewayPlace) -> dict[str, int]:
    """Requests in flight or waiting for a connection, by the name of each cluster."""
    pattern = re.compile(r"cluster\.(.+)\.upstream_rq_(?:pending_)?active")
    found: dict[str, int] = {}
    for name, value in statistics(place, r"^cluster\..+@.+\.upstream_rq_(pending_)?active$").items():
        if matched := pattern.fullmatch(name):
            found[matched[1]] = found.get(matched[1], 0) + int(value)
    return found


def _settled(place: GatewayPlace) -> dict[str, int]:
    """The larger of two looks: between two gauges a request can step from waiting to active unseen."""
    first = _in_flight(place)
    time.sleep(_POLL_S)
    return {name: max(requests, first.get(name, 0)) for name, requests in _in_flight(place).items()}


def _leaving(place: GatewayPlace) -> dict[str, int]:
    """Requests in flight to backends that are routed no more, by the name of each cluster."""
    kept = _kept(place)
    return {name: requests for name, requests in _settled(place).items() if name not in kept}


def _kept(place: GatewayPlace) -> set[str]:
    """Names of the clusters that the running routes need."""
    return {name for backend in live_backends(place) for name in backend.clusters}


def _clusters(place: GatewayPlace) -> list[Json]:
    found: list[Json] = json.loads((place.folder / CLUSTERS).read_bytes())["resources"]
    return [{key: value for key, value in resource.items() if key != "@type"} for resource in found]


def _deliver(place: GatewayPlace, name: str, content: Json, wait: bool) -> None:
    """Replace one of the two files and see that Envoy takes it up; if it does not, put the old one back."""
    path, version = place.folder / name, content["version_info"]
    if not wait:
        write_config(path, content)
        return
    accepted, rejected = _versions(place, name)
    if stands(path, content) and accepted == version:
        return
    before = path.read_bytes()
    write_file(path, encoded(content))
    try:
        _until(lambda: _taken_up(place, name, version, rejected), f"did not take up {path}")
    except ServingError:
        write_file(path, before)
        raise


def _versions(place: GatewayPlace, name: str) -> tuple[str, int]:
    """The version of this file that Envoy runs, and how many it has rejected."""
    watcher = _WATCHERS[name]
    found = statistics(place, rf"^{re.escape(watcher)}\.(version_text|update_rejected)$")
    return found.get(f"{watcher}.version_text", "").strip('"'), int(found.get(f"{watcher}.update_rejected", "0"))


def _taken_up(place: GatewayPlace, name: str, version: str, rejected_before: int) -> bool:
    accepted, rejected = _versions(place, name)
    if rejected > rejected_before:
        raise ServingError(
            f"Envoy refuses the new {name}: {_rejection(place)}",
            "routes that Envoy takes; it goes on with those it had",
            "mend the component's serving settings, then make deploy-dev",
        )
    return accepted == version


def _rejection(place: GatewayPlace) -> str:
    """Envoy's own words about the files that stand. A running Envoy says them nowhere but in its log."""
    clusters, routes = (json.loads((place.folder / name).read_bytes()) for name in (CLUSTERS, ROUTES))
    path = place.folder / "rejected.json"
    write_config(path, static_bootstrap(place, clusters, routes))
    command = [str(envoy_binary()), "-c", str(path), "--mode", "validate", "--log-level", "critical"]
    words = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stderr
    return words.strip().rsplit("\n", 1)[-1].removeprefix(": ") or f"see {path}"


def _until(condition: Callable[[], bool], failure: str) -> None:
    end = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > end:
            raise ServingError(
                f"the gateway {failure} within {_TIMEOUT_S:.0f} s", "a gateway that follows its files", "make up"
            )
        time.sleep(_POLL_S)
