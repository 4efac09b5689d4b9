"""What Envoy is told, as plain dicts: pure functions from places and backends to Envoy's own configuration.

Envoy reads three files. `envoy.yaml` (the bootstrap) says where it listens and what holds for every request and
never changes while it runs. `cds.yaml` names the backends as clusters, `rds.yaml` the routes to them (see
`gateway_routes`); both are replaced atomically and taken up without a restart. JSON is YAML, so they are written as
JSON.

A cluster's name ends in a hash of its backend: whatever changes in a backend but its share of requests makes another
cluster, so that a swap is always new cluster first, then routes, then the old cluster once it has drained.
"""

import hashlib
from typing import Annotated, Self

from pydantic import Field, model_validator

from torchrelay.config import Frozen, GatewayPlace, Json, Name, is_ip
from torchrelay.handover import Endpoint
from torchrelay.serving.envoy_config import (
    FILTERS,
    TYPES,
    address,
    connection_limit,
    header,
    listener,
    router,
    server_tls,
    typed_file,
    watched,
)
from torchrelay.serving.gateway_errors import SCRIPT, TOO_MANY, path_script
from torchrelay.serving.ports import HOST

CLUSTERS, ROUTES = "cds.yaml", "rds.yaml"
ROUTE_NAME = "predictions"
STAT_PREFIX = "gateway"

BUFFER = "envoy.filters.http.buffer"
RATE_LIMIT = "envoy.filters.http.local_ratelimit"
LOCAL_RATE_LIMIT = f"{FILTERS}local_ratelimit.v3.LocalRateLimit"
# The response filter takes this off again: by it, it tells Envoy's own replies from the engine's.
OWN_REPLY = "x-torchrelay-own-reply"
COPIES = "~copies"
_REQUEST_HEADERS_TIMEOUT_S = 10
REQUEST_TIMEOUT_S = 120


class Backend(Frozen):
    """One version of one component, and where it is served."""

    component: Name
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    digest: str = Field(description="sha256 of the archive.")
    endpoints: tuple[Endpoint, ...] = Field(min_length=1)
    path: str = Field(description="What the engine calls it: the request's path is rewritten to this.")
    weight: int = Field(100, ge=0, le=100, description="Its share of the component's requests, relative; 0: none.")
    mirror: bool = Field(
        False,
        description="It gets copies of what the other backends answer, and nobody gets its answers to them.",
    )
    copies: int = Field(100, ge=1, le=100, description="Percent of those that a mirror gets copies of.")
    max_body_bytes: int = Field(4 * 2**20, ge=1, description="Larger request bodies get a 413.")
    timeout_s: int = Field(30, ge=1, description="After this a request is answered with 504, retries included.")
    max_pending: int = Field(1024, ge=1, description="Requests that may wait for a connection; more get a 503.")
    max_requests_per_s: int | None = Field(
        None, ge=1, description="More requests a second to the component get a 429; the largest of its backends holds."
    )

    @model_validator(mode="after")
    def _one_health_check(self) -> Self:
        """Envoy asks all endpoints of a cluster in one way; only the port may differ."""
        checks = {(point.health_path, point.health_text) for point in self.endpoints}
        if len(checks) > 1:
            raise ValueError(f"endpoints with different health checks: {sorted(checks)}; expected one for all")
        return self

    @property
    def cluster(self) -> str:
        """Name of its Envoy cluster; it keeps name, connections and counters whatever its share of requests is."""
        content = self.model_dump_json(exclude={"weight", "mirror", "copies", "max_requests_per_s"})
        return f"{self.component}@{self.version}@{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    @property
    def copies_cluster(self) -> str:
        """Name of the cluster that copies go to: apart, so that nobody takes them for callers' requests."""
        return f"{self.cluster}{COPIES}"

    @property
    def clusters(self) -> tuple[str, ...]:
        """Names of all clusters that routes to it need."""
        return (self.cluster, self.copies_cluster) if self.mirror else (self.cluster,)


class Routes(Frozen):
    """All that the gateway routes. Several backends of one component share its requests by weight.

    One without weight that is no mirror gets no request: Envoy keeps it warm, with its health known, for a fast swap.
    """

    backends: tuple[Backend, ...] = ()

    @model_validator(mode="after")
    def _all_requests_have_a_backend(self) -> Self:
        for name in self.components:
            if not any(backend.weight for backend in self.of(name)):
                raise ValueError(f"no backend of {name} has any weight; expected one that answers its requests")
        return self

    def of(self, component: str) -> tuple[Backend, ...]:
        """The backends of one component, in their order."""
        return tuple(backend for backend in self.backends if backend.component == component)

    @property
    def components(self) -> list[str]:
        """The routed components, sorted."""
        return sorted({backend.component for backend in self.backends})


def bootstrap(place: GatewayPlace) -> Json:
    """`envoy.yaml`: its listeners, the filters that every request passes, and where clusters and routes come from."""
    return {
        "node": {"id": "gateway", "cluster": place.folder.absolute().parent.name},
        "admin": {"address": address(HOST, place.admin_port)},
        "dynamic_resources": {"cds_config": watched(place.folder / CLUSTERS)},
        "static_resources": {"listeners": _listeners(place)},
        "overload_manager": connection_limit(10_000),
        # Histograms are merged only then: five seconds by default, too late for whoever watches a canary.
        "stats_flush_interval": "1s",
    }


def cluster_file(clusters: list[Json]) -> Json:
    """`cds.yaml` with these clusters."""
    return typed_file("envoy.config.cluster.v3.Cluster", clusters)


def _listeners(place: GatewayPlace) -> list[Json]:
    """The door on loopback, which `apply` and probes use as well, and that for other machines if there is one.

    Both take their routes from one file by the same words, so Envoy keeps them once: a swap is one for both.
    """
    manager = _connection_manager(place)
    doors = [listener("gateway", HOST, place.port, manager)]
    if public := place.public:
        tls = server_tls(place.folder)
        doors.append(listener("public", public.address, public.port, manager, tls))
    return doors


def _connection_manager(place: GatewayPlace) -> Json:
    return {
        "@type": f"{TYPES}envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": STAT_PREFIX,
        "rds": {"route_config_name": ROUTE_NAME, "config_source": watched(place.folder / ROUTES)},
        "http_filters": [_rate_limit(), _buffer(), _engine_errors(), router()],
        "local_reply_config": _own_errors(),
        "access_log": [_access_log()],
        "use_remote_address": True,
        "normalize_path": True,
        "server_header_transformation": "PASS_THROUGH",
        **_request_ids(),
        "request_headers_timeout": f"{_REQUEST_HEADERS_TIMEOUT_S}s",
        "request_timeout": f"{REQUEST_TIMEOUT_S}s",
        "stream_idle_timeout": "60s",
        # How long a client that still sends a refused body has to read why, before its connection is reset.
        "delayed_close_timeout": "1s",
        "common_http_protocol_options": {"idle_timeout": "600s", "headers_with_underscores_action": "DROP_HEADER"},
    }


def _request_ids() -> Json:
    """Keep the caller's id if it is well-formed; else Envoy makes one, as it does where there is none."""
    kind = "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
    given = "request.headers['x-request-id']"
    # The length stands apart: {1,128} makes a larger regular expression than Envoy takes.
    well_formed = f"{given}.matches('^[A-Za-z0-9._:-]+$') && size({given}) <= 128"
    kept = f"%CEL('x-request-id' in request.headers && {well_formed} ? {given} : '')%"
    mutations = [
        {"remove": "x-torchrelay-request-id"},
        {"append": header("x-torchrelay-request-id", kept)},
        {"remove": "x-request-id"},
        {"append": header("x-request-id", "%REQ(x-torchrelay-request-id)%")},
        {"remove": "x-torchrelay-request-id"},
    ]
    uuid = "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig"
    return {
        "early_header_mutation_extensions": [
            {
                "name": "envoy.http.early_header_mutation.header_mutation",
                "typed_config": {"@type": f"{TYPES}{kind}", "mutations": mutations},
            }
        ],
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        # By default Envoy packs its trace decision into a digit of the id, and so changes the caller's.
        "request_id_extension": {"typed_config": {"@type": f"{TYPES}{uuid}", "pack_trace_reason": False}},
    }


def _rate_limit() -> Json:
    """Off but where a component has a limit: see `_limits`. Before the buffer, so that no refused body is kept."""
    return {"name": RATE_LIMIT, "typed_config": {"@type": LOCAL_RATE_LIMIT, "stat_prefix": "gateway"}}


def _buffer() -> Json:
    """Off but where a route turns it on: see `_component_routes`."""
    config = {"@type": f"{FILTERS}buffer.v3.Buffer", "max_request_bytes": 1}
    return {"name": BUFFER, "disabled": True, "typed_config": config}


def _engine_errors() -> Json:
    """Rewrites errors that no handler made (TorchServe's own 404, 503, …) to our form."""
    config = {"@type": f"{FILTERS}lua.v3.Lua", "default_source_code": {"inline_string": SCRIPT}}
    return {"name": "envoy.filters.http.lua", "typed_config": config}


def _own_errors() -> Json:
    """Envoy's own errors in our form. A request that could not even be parsed has no id yet, so it gets one here."""
    too_many = _mapper(_status("EQ", 429), "%REQ(x-request-id)%", [])
    return {
        "mappers": [
            {**too_many, "body": {"inline_string": TOO_MANY}},
            _mapper(_all_of(_status("GE", 400), _has_header("x-request-id")), "%REQ(x-request-id)%", []),
            _mapper(_status("GE", 400), "%RESP(x-request-id)%", [header("x-request-id", "%UNIQUE_ID%")]),
        ]
    }


def _mapper(condition: Json, request_id: str, headers: list[Json]) -> Json:
    return {
        "filter": condition,
        "headers_to_add": [*headers, header(OWN_REPLY, "1")],
        "body_format_override": {"json_format": {"error": "%LOCAL_REPLY_BODY%", "request_id": request_id}},
    }


def _status(op: str, status: int) -> Json:
    value = {"default_value": status, "runtime_key": f"gateway.status_{op}_{status}"}
    return {"status_code_filter": {"comparison": {"op": op, "value": value}}}


def _has_header(name: str) -> Json:
    return {"header_filter": {"header": {"name": name, "present_match": True}}}


def _all_of(*conditions: Json) -> Json:
    return {"and_filter": {"filters": list(conditions)}}


def _access_log() -> Json:
    """One JSON line a request on stdout, which whoever keeps Envoy up captures and rotates; probes are left out."""
    fields = {
        "time": "%START_TIME%",
        "request_id": "%REQ(x-request-id)%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(:PATH)%",
        "status": "%RESPONSE_CODE%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "flags": "%RESPONSE_FLAGS%",
        "component": "%RESP(x-component)%",
        "version": "%RESP(x-model-version)%",
        "digest": "%RESP(x-archive-digest)%",
        "cluster": "%UPSTREAM_CLUSTER_RAW%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "duration_ms": "%DURATION%",
        "received_bytes": "%BYTES_RECEIVED%",
        "sent_bytes": "%BYTES_SENT%",
    }
    probe = {"name": ":path", "string_match": {"exact": "/healthz"}, "invert_match": True}
    return {
        "name": "envoy.access_loggers.stdout",
        "filter": {"header_filter": {"header": probe}},
        "typed_config": {
            "@type": f"{TYPES}envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
            "log_format": {"json_format": fields},
        },
    }


def clusters(backend: Backend) -> list[Json]:
    """The backend's clusters: one for callers' requests and, for a mirror, one for copies of them.

    A copy comes with the path of the version that answers, which a filter must replace: callers' requests, whose route
    has done so, need not pay for that.
    """
    copies = [_cluster(backend, backend.copies_cluster, [_own_path(backend)])] if backend.mirror else []
    return [_cluster(backend, backend.cluster, []), *copies]


def _cluster(backend: Backend, name: str, filters: list[Json]) -> Json:
    """Health-checked, its failing endpoints put aside, its keep-alive shorter than theirs."""
    points = [{"endpoint": _endpoint(point)} for point in backend.endpoints]
    return {
        "name": name,
        "type": "STATIC" if all(is_ip(point.host) for point in backend.endpoints) else "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": points}]},
        # Sick endpoints are asked only where all are sick; by default as soon as more than half of them are.
        "common_lb_config": {"healthy_panic_threshold": {"value": 1}},
        "health_checks": [_health_check(backend.endpoints[0])],
        "outlier_detection": _outlier_detection(),
        "circuit_breakers": {"thresholds": [_thresholds(backend)]},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _upstream_http(filters)
        },
    }


def _endpoint(point: Endpoint) -> Json:
    health = {"port_value": point.health_port} if point.health_port else {}
    return {"address": address(point.host, point.port), "health_check_config": health}


def _own_path(backend: Backend) -> Json:
    """The filter that gives a copy the backend's own path."""
    lua = {"@type": f"{FILTERS}lua.v3.Lua", "default_source_code": {"inline_string": path_script(backend.path)}}
    return {"name": "envoy.filters.http.lua", "typed_config": lua}


def _upstream_http(filters: list[Json]) -> Json:
    """HTTP/1.1, through these filters."""
    codec = {"@type": f"{FILTERS}upstream_codec.v3.UpstreamCodec"}
    return {
        "@type": f"{TYPES}envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http_protocol_options": {}},
        "common_http_protocol_options": {"idle_timeout": "60s"},
        "http_filters": [*filters, {"name": "envoy.filters.http.upstream_codec", "typed_config": codec}],
    }


def _health_check(point: Endpoint) -> Json:
    """A wrong answer puts an endpoint aside at once, a late or missing one at the second time."""
    content = {"receive": [{"text": point.health_text.encode().hex()}]} if point.health_text else {}
    return {
        "timeout": "1s",
        "interval": "1s",
        "interval_jitter": "0.1s",
        # Else a backend without traffic yet, a warm one, would be asked once a minute.
        "no_traffic_interval": "1s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "http_health_check": {"path": point.health_path, "response_buffer_size": 8192, **content},
    }


def _outlier_detection() -> Json:
    """Five failed connections or gateway errors (502-504) in a row; a handler's own 500 does not count."""
    return {
        "consecutive_gateway_failure": 5,
        "enforcing_consecutive_gateway_failure": 100,
        "enforcing_consecutive_5xx": 0,
        "enforcing_success_rate": 0,
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 5,
        "enforcing_local_origin_success_rate": 0,
        "base_ejection_time": "5s",
        "max_ejection_percent": 50,
    }


def _thresholds(backend: Backend) -> Json:
    """The retries that one dying endpoint causes pass; a storm of them, of more than a fifth of all requests, not."""
    return {
        "max_connections": 1024,
        "max_pending_requests": backend.max_pending,
        "max_requests": 4096,
        "retry_budget": {"budget_percent": {"value": 20}, "min_retry_concurrency": 100},
    }


def static_bootstrap(place: GatewayPlace, clusters: Json, routes: Json) -> Json:
    """The same gateway with these two files built in, so that `envoy --mode validate` judges them in full."""
    door = _listeners(place.model_copy(update={"public": None}))[0]
    manager = door["filter_chains"][0]["filters"][0]["typed_config"]
    del manager["rds"]
    manager["route_config"] = _untyped(routes)[0]
    return {"static_resources": {"listeners": [door], "clusters": _untyped(clusters)}}


def _untyped(file: Json) -> list[Json]:
    return [{key: value for key, value in resource.items() if key != "@type"} for resource in file["resources"]]
