"""What Envoy is told, as plain dicts: pure functions from places and routes to Envoy's own configuration.

Envoy reads three files. `envoy.yaml` (the bootstrap) says where it listens and what holds for every request and
never changes while it runs. `cds.yaml` names the backends as clusters, `rds.yaml` the routes to them; both are
replaced atomically and taken up without a restart. JSON is YAML, so they are written as JSON.

A cluster's name ends in a hash of its backend: whatever changes in a backend makes another cluster, so that a swap is
always new cluster first, then routes, then the old cluster once it has drained.
"""

import hashlib
import ipaddress
import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from torchrelay.config import Frozen, GatewayPlace, Json, Name
from torchrelay.serving.gateway_errors import SCRIPT
from torchrelay.serving.ports import HOST

BOOTSTRAP, CLUSTERS, ROUTES = "envoy.yaml", "cds.yaml", "rds.yaml"
ROUTE_NAME = "predictions"
STAT_PREFIX = "gateway"

_TYPES = "type.googleapis.com/"
_FILTERS = f"{_TYPES}envoy.extensions.filters.http."
_BUFFER = "envoy.filters.http.buffer"
_MILLION = 1_000_000
# The response filter takes this off again: by it, it tells Envoy's own replies from the engine's.
_OWN_REPLY = "x-torchrelay-own-reply"
_OVERWRITE = "OVERWRITE_IF_EXISTS_OR_ADD"
# No handler reads these, each costs a TorchServe worker four system calls, and a caller's secrets need go no further.
_NOT_FOR_ENGINES = (
    "accept",
    "accept-encoding",
    "accept-language",
    "authorization",
    "cookie",
    "user-agent",
    "x-envoy-external-address",
    "x-forwarded-for",
    "x-forwarded-proto",
)
_REQUEST_HEADERS_TIMEOUT_S = 10
REQUEST_TIMEOUT_S = 120


class Endpoint(Frozen):
    """Where one engine instance answers."""

    host: str
    port: int = Field(ge=1, le=65535)


class Backend(Frozen):
    """One version of one component, and where it is served."""

    component: Name
    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    digest: str = Field(description="sha256 of the archive.")
    endpoints: tuple[Endpoint, ...] = Field(min_length=1)
    path: str = Field(description="What the engine calls it: the request's path is rewritten to this.")
    weight: int = Field(100, ge=1, le=_MILLION, description="Its share of the component's requests, relative.")
    max_body_bytes: int = Field(4 * 2**20, ge=1, description="Larger request bodies get a 413.")
    timeout_s: int = Field(30, ge=1, description="After this a request is answered with 504, retries included.")
    max_pending: int = Field(1024, ge=1, description="Requests that may wait for a connection; more get a 503.")
    health_path: str = Field("/ping", description="GET of this path on an endpoint says whether it is healthy.")

    @property
    def cluster(self) -> str:
        """Name of its Envoy cluster; another backend in any but its weight has another name."""
        content = self.model_dump_json(exclude={"weight"})
        return f"{self.component}@{self.version}@{hashlib.sha256(content.encode()).hexdigest()[:12]}"


class Routes(Frozen):
    """All that the gateway routes. Several backends of one component share its requests by weight."""

    backends: tuple[Backend, ...] = ()

    @property
    def components(self) -> list[str]:
        """The routed components, sorted."""
        return sorted({backend.component for backend in self.backends})


def bootstrap(place: GatewayPlace) -> Json:
    """`envoy.yaml`: both listeners, the filters that every request passes, and where clusters and routes come from."""
    return {
        "node": {"id": "gateway", "cluster": place.folder.absolute().parent.name},
        "admin": {"address": _address(HOST, place.admin_port)},
        "dynamic_resources": {"cds_config": _watched(place.folder / CLUSTERS)},
        "static_resources": {"listeners": [_listener(place)]},
        "overload_manager": _connection_limit(10_000),
    }


def cluster_file(clusters: list[Json]) -> Json:
    """`cds.yaml` with these clusters."""
    typed = [{"@type": f"{_TYPES}envoy.config.cluster.v3.Cluster", **cluster} for cluster in clusters]
    return {"version_info": _version(typed), "resources": typed}


def route_file(routes: Routes) -> Json:
    """`rds.yaml` for these routes. Its version stands in /healthz as well: what a worker thread really routes by."""
    version = _version(_route_configuration(routes, ""))
    return {
        "version_info": version,
        "resources": [
            {
                "@type": f"{_TYPES}envoy.config.route.v3.RouteConfiguration",
                **_route_configuration(routes, version),
            }
        ],
    }


def _version(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _watched(path: Path) -> Json:
    # Envoy looks for renames onto exactly this path; a `watched_directory` would reload both files for each rename.
    return {"resource_api_version": "V3", "path_config_source": {"path": str(path.absolute())}}


def _connection_limit(connections: int) -> Json:
    monitor = "envoy.resource_monitors.global_downstream_max_connections"
    kind = "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"
    config = {"@type": f"{_TYPES}{kind}", "max_active_downstream_connections": connections}
    return {"resource_monitors": [{"name": monitor, "typed_config": config}]}


def _listener(place: GatewayPlace) -> Json:
    manager = {"name": "envoy.filters.network.http_connection_manager", "typed_config": _connection_manager(place)}
    return {
        "name": "gateway",
        "address": _address(HOST, place.port),
        # With SO_REUSEPORT a second gateway on this port would start without a word and take half of the requests.
        "enable_reuse_port": False,
        "filter_chains": [{"filters": [manager]}],
    }


def _connection_manager(place: GatewayPlace) -> Json:
    return {
        "@type": f"{_TYPES}envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": STAT_PREFIX,
        "rds": {"route_config_name": ROUTE_NAME, "config_source": _watched(place.folder / ROUTES)},
        "http_filters": [_buffer(), _engine_errors(), _router()],
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
        {"append": _header("x-torchrelay-request-id", kept)},
        {"remove": "x-request-id"},
        {"append": _header("x-request-id", "%REQ(x-torchrelay-request-id)%")},
        {"remove": "x-torchrelay-request-id"},
    ]
    uuid = "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig"
    return {
        "early_header_mutation_extensions": [
            {
                "name": "envoy.http.early_header_mutation.header_mutation",
                "typed_config": {"@type": f"{_TYPES}{kind}", "mutations": mutations},
            }
        ],
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        # By default Envoy packs its trace decision into a digit of the id, and so changes the caller's.
        "request_id_extension": {"typed_config": {"@type": f"{_TYPES}{uuid}", "pack_trace_reason": False}},
    }


def _header(name: str, value: str) -> Json:
    return {"header": {"key": name, "value": value}, "append_action": _OVERWRITE}


def _buffer() -> Json:
    """Off but where a route turns it on: see `_component_routes`."""
    config = {"@type": f"{_FILTERS}buffer.v3.Buffer", "max_request_bytes": 1}
    return {"name": _BUFFER, "disabled": True, "typed_config": config}


def _engine_errors() -> Json:
    """Rewrites errors that no handler made (TorchServe's own 404, 503, …) to our form."""
    config = {"@type": f"{_FILTERS}lua.v3.Lua", "default_source_code": {"inline_string": SCRIPT}}
    return {"name": "envoy.filters.http.lua", "typed_config": config}


def _router() -> Json:
    config = {"@type": f"{_FILTERS}router.v3.Router", "suppress_envoy_headers": True}
    return {"name": "envoy.filters.http.router", "typed_config": config}


def _own_errors() -> Json:
    """Envoy's own errors in our form. A request that could not even be parsed has no id yet, so it gets one here."""
    return {
        "mappers": [
            _mapper(_all_of(_failed(), _has_header("x-request-id")), "%REQ(x-request-id)%", []),
            _mapper(_failed(), "%RESP(x-request-id)%", [_header("x-request-id", "%UNIQUE_ID%")]),
        ]
    }


def _mapper(condition: Json, request_id: str, headers: list[Json]) -> Json:
    return {
        "filter": condition,
        "headers_to_add": [*headers, _header(_OWN_REPLY, "1")],
        "body_format_override": {"json_format": {"error": "%LOCAL_REPLY_BODY%", "request_id": request_id}},
    }


def _failed() -> Json:
    threshold = {"default_value": 400, "runtime_key": "gateway.errors_from"}
    return {"status_code_filter": {"comparison": {"op": "GE", "value": threshold}}}


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
            "@type": f"{_TYPES}envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
            "log_format": {"json_format": fields},
        },
    }


def cluster(backend: Backend) -> Json:
    """The backend as a cluster: health-checked, its failing endpoints put aside, its keep-alive shorter than theirs."""
    http = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    addresses = [{"endpoint": {"address": _address(point.host, point.port)}} for point in backend.endpoints]
    return {
        "name": backend.cluster,
        "type": "STATIC" if all(_is_ip(point.host) for point in backend.endpoints) else "STRICT_DNS",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": backend.cluster, "endpoints": [{"lb_endpoints": addresses}]},
        "health_checks": [_health_check(backend)],
        "outlier_detection": _outlier_detection(),
        "circuit_breakers": {"thresholds": [_limits(backend)]},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPES}{http}",
                "explicit_http_config": {"http_protocol_options": {}},
                "common_http_protocol_options": {"idle_timeout": "60s"},
            }
        },
    }


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _health_check(backend: Backend) -> Json:
    return {
        "timeout": "2s",
        "interval": "2s",
        "interval_jitter": "0.2s",
        "no_traffic_interval": "2s",
        "unhealthy_threshold": 3,
        "healthy_threshold": 1,
        "http_health_check": {"path": backend.health_path},
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


def _limits(backend: Backend) -> Json:
    return {
        "max_connections": 1024,
        "max_pending_requests": backend.max_pending,
        "max_requests": 4096,
        "retry_budget": {"budget_percent": {"value": 20}, "min_retry_concurrency": 10},
    }


def _route_configuration(routes: Routes, version: str) -> Json:
    by_component = [
        route
        for name in routes.components
        for route in _component_routes([backend for backend in routes.backends if backend.component == name])
    ]
    return {
        "name": ROUTE_NAME,
        # What is routed, readable from a running Envoy's config_dump.
        "metadata": {"filter_metadata": {"torchrelay": {"routes": routes.model_dump_json()}}},
        "max_direct_response_body_size_bytes": 65536,
        "request_headers_to_add": [_header("x-torchrelay-request-id", "%REQ(x-request-id)%")],
        "request_headers_to_remove": list(_NOT_FOR_ENGINES),
        # The engine makes a request id anew. Ours is put back here, before the response filter needs it.
        "response_headers_to_add": [_header("x-request-id", "%REQ(x-request-id)%")],
        "response_headers_to_remove": [
            "server",
            "x-envoy-upstream-service-time",
            "x-torchrelay-request-id",
            _OWN_REPLY,
        ],
        "virtual_hosts": [
            {
                "name": "gateway",
                "domains": ["*"],
                # Its counters outlive every cluster: retries over many swaps can be counted.
                "virtual_clusters": [
                    {"name": ROUTE_NAME, "headers": [{"name": ":path", "string_match": {"prefix": "/predictions/"}}]}
                ],
                "routes": [*by_component, *_fixed_routes(routes, version)],
            }
        ],
    }


def _component_routes(backends: list[Backend]) -> list[Json]:
    """The routes of one component: its backends by weight, then 405 for any other method."""
    path = f"/predictions/{backends[0].component}"
    total, below, found = sum(backend.weight for backend in backends), 0, []
    for backend in backends:
        below += backend.weight
        # Envoy draws one number a request for all routes, so shares are cumulative and the last takes the rest.
        match = {"path": path, "runtime_fraction": _fraction(below / total)}
        found += _backend_routes(match, backend)
    return [*found, _wrong_method(path, "POST")]


def _fraction(share: float) -> Json:
    return {"default_value": {"numerator": round(share * _MILLION), "denominator": "MILLION"}}


def _backend_routes(match: Json, backend: Backend) -> list[Json]:
    """A body of known length is refused or streamed at once; only one of unknown length is counted by buffering.

    Streaming keeps every request visible as one of its cluster from the first byte, which `in_flight` relies on.
    """
    post = {"name": ":method", "string_match": {"exact": "POST"}}
    length = "content-length"
    too_long = {"name": length, "range_match": {"start": backend.max_body_bytes + 1, "end": 2**62}}
    unknown = {"name": length, "present_match": False}
    refused = _reply(413, f"the body is larger than the {backend.max_body_bytes} bytes that {backend.component} takes")
    limit = {"@type": f"{_FILTERS}buffer.v3.BufferPerRoute", "buffer": {"max_request_bytes": backend.max_body_bytes}}
    return [
        {"match": {**match, "headers": [post, too_long]}, **refused},
        {
            "match": {**match, "headers": [post, unknown]},
            "route": _action(backend),
            "typed_per_filter_config": {_BUFFER: limit},
        },
        {"match": {**match, "headers": [post]}, "route": _action(backend)},
    ]


def _action(backend: Backend) -> Json:
    return {
        "cluster": backend.cluster,
        "prefix_rewrite": backend.path,
        "timeout": f"{backend.timeout_s}s",
        "idle_timeout": f"{backend.timeout_s + REQUEST_TIMEOUT_S}s",
        "retry_policy": _retries(backend),
    }


def _retries(backend: Backend) -> Json:
    """A prediction changes nothing, so a lost one may be asked again.

    A 503 means overload or no worker: asking the same engine again only adds to it, so that needs a second endpoint.
    """
    lost = "connect-failure,refused-stream,reset"
    elsewhere = len(backend.endpoints) > 1
    other = "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    predicate = {"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": {"@type": f"{_TYPES}{other}"}}
    return {
        "retry_on": f"{lost},retriable-status-codes" if elsewhere else lost,
        "retriable_status_codes": [503] if elsewhere else [],
        "num_retries": 2,
        "retry_host_predicate": [predicate],
        "host_selection_retry_max_attempts": 3,
    }


def _fixed_routes(routes: Routes, version: str) -> list[Json]:
    """/healthz, and a reply that names what there is for everything else."""
    health = json.dumps({"status": "ok", "components": routes.components, "routes": version})
    known = f"POST /predictions/<component>, where component is one of: {', '.join(routes.components) or 'none yet'}"
    get = {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|HEAD"}}}
    as_json = [_header("content-type", "application/json")]
    return [
        {
            "match": {"path": "/healthz", "headers": [get]},
            "response_headers_to_add": as_json,
            **_reply(200, health),
        },
        _wrong_method("/healthz", "GET, HEAD"),
        {"match": {"prefix": "/predictions/"}, **_reply(404, f"no such component is served here; expected {known}")},
        {"match": {"prefix": "/"}, **_reply(404, f"nothing is served at this path; expected {known}")},
    ]


def _wrong_method(path: str, allowed: str) -> Json:
    reply = _reply(405, f"this path takes {allowed} only")
    return {"match": {"path": path}, "response_headers_to_add": [_header("allow", allowed)], **reply}


def _reply(status: int, text: str) -> Json:
    return {"direct_response": {"status": status, "body": {"inline_string": text}}}


def static_bootstrap(place: GatewayPlace, clusters: Json, routes: Json) -> Json:
    """The same gateway with these two files built in, so that `envoy --mode validate` judges them in full."""
    listener = _listener(place)
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    del manager["rds"]
    manager["route_config"] = _untyped(routes)[0]
    return {"static_resources": {"listeners": [listener], "clusters": _untyped(clusters)}}


def _untyped(file: Json) -> list[Json]:
    return [{key: value for key, value in resource.items() if key != "@type"} for resource in file["resources"]]
