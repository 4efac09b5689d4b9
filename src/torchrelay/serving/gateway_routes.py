"""What Envoy is told about routes: which backend answers what share of a component's requests, and under which limits.

Pure functions, as in `gateway_config`; the routes themselves, as a value, stand there.
"""

import json

from torchrelay.config import Json
from torchrelay.serving.envoy_config import FILTERS, TYPES, content_version, header
from torchrelay.serving.gateway_config import (
    BUFFER,
    LOCAL_RATE_LIMIT,
    OWN_REPLY,
    RATE_LIMIT,
    REQUEST_TIMEOUT_S,
    ROUTE_NAME,
    Backend,
    Routes,
)

_MILLION = 1_000_000
# Only Envoy can set it: it is taken from callers, and put onto the copies that a mirror gets.
_SHADOW = "x-torchrelay-shadow"
# No handler reads these, each costs a TorchServe worker four system calls, and a caller's secrets need go no further.
_NOT_FOR_ENGINES = (
    "accept",
    "accept-encoding",
    "accept-language",
    "authorization",
    "cookie",
    "user-agent",
    "x-envoy-external-address",
    "x-envoy-internal",
    "x-forwarded-for",
    "x-forwarded-proto",
    _SHADOW,
)


def route_file(routes: Routes) -> Json:
    """`rds.yaml` for these routes. Its version stands in /healthz as well: what a worker thread really routes by."""
    version = content_version(_route_configuration(routes, ""))
    return {
        "version_info": version,
        "resources": [
            {
                "@type": f"{TYPES}envoy.config.route.v3.RouteConfiguration",
                **_route_configuration(routes, version),
            }
        ],
    }


def _route_configuration(routes: Routes, version: str) -> Json:
    by_component = [route for name in routes.components for route in _component_routes(routes.of(name))]
    return {
        "name": ROUTE_NAME,
        # What is routed, readable from a running Envoy's config_dump.
        "metadata": {"filter_metadata": {"torchrelay": {"routes": routes.model_dump_json()}}},
        "max_direct_response_body_size_bytes": 65536,
        "request_headers_to_add": [header("x-torchrelay-request-id", "%REQ(x-request-id)%")],
        "request_headers_to_remove": list(_NOT_FOR_ENGINES),
        # The engine makes a request id anew. Ours is put back here, before the response filter needs it.
        "response_headers_to_add": [header("x-request-id", "%REQ(x-request-id)%")],
        "response_headers_to_remove": [
            "server",
            "x-envoy-upstream-service-time",
            "x-torchrelay-request-id",
            OWN_REPLY,
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
                "typed_per_filter_config": _limits(routes),
            }
        ],
    }


def _limits(routes: Routes) -> Json:
    """One token bucket a component, shared by its routes; each holds the requests of one second."""
    limits = {name: _limit(routes.of(name)) for name in routes.components}
    descriptors = [
        {"entries": [{"key": "component", "value": name}], "token_bucket": _bucket(limit)}
        for name, limit in limits.items()
        if limit is not None
    ]
    if not descriptors:
        return {}
    always = {"default_value": {"numerator": 100}, "runtime_key": "gateway.rate_limit"}
    return {
        RATE_LIMIT: {
            "@type": LOCAL_RATE_LIMIT,
            "stat_prefix": "gateway",
            "filter_enabled": always,
            "filter_enforced": always,
            # Envoy wants one for everything else as well.
            "token_bucket": _bucket(2**31),
            "descriptors": descriptors,
            "response_headers_to_add": [header("retry-after", "1")],
        }
    }


def _limit(backends: tuple[Backend, ...]) -> int | None:
    return max((one.max_requests_per_s for one in backends if one.max_requests_per_s), default=None)


def _bucket(requests_per_s: int) -> Json:
    return {"max_tokens": requests_per_s, "tokens_per_fill": requests_per_s, "fill_interval": "1s"}


def _component_routes(backends: tuple[Backend, ...]) -> list[Json]:
    """The routes of one component: its backends by weight, then 405 for any other method."""
    path = f"/predictions/{backends[0].component}"
    total, below, found = sum(backend.weight for backend in backends), 0, []
    for backend in backends:
        if not backend.weight:
            continue
        below += backend.weight
        # Envoy draws one number a request for all routes, so shares are cumulative and the last takes the rest.
        match = {"path": path, "runtime_fraction": _fraction(below / total)}
        found += _backend_routes(match, backend, [other for other in backends if other.mirror and other != backend])
    return [*found, _wrong_method(path, "POST")]


def _fraction(share: float) -> Json:
    return {"default_value": {"numerator": round(share * _MILLION), "denominator": "MILLION"}}


def _backend_routes(match: Json, backend: Backend, mirrors: list[Backend]) -> list[Json]:
    """A body of known length is refused or streamed at once; only one of unknown length is counted by buffering.

    Streaming keeps every request visible as one of its cluster from the first byte, which `in_flight` relies on.
    """
    post = {"name": ":method", "string_match": {"exact": "POST"}}
    length = "content-length"
    too_long = {"name": length, "range_match": {"start": backend.max_body_bytes + 1, "end": 2**62}}
    unknown = {"name": length, "present_match": False}
    refused = _reply(413, f"the body is larger than the {backend.max_body_bytes} bytes that {backend.component} takes")
    limit = {"@type": f"{FILTERS}buffer.v3.BufferPerRoute", "buffer": {"max_request_bytes": backend.max_body_bytes}}
    # What Envoy keeps of a body, to send it again: as much as may come, else a large one could not be retried.
    action = {"route": _action(backend, mirrors), "request_body_buffer_limit": backend.max_body_bytes}
    return [
        {"match": {**match, "headers": [post, too_long]}, **refused},
        {"match": {**match, "headers": [post, unknown]}, **action, "typed_per_filter_config": {BUFFER: limit}},
        {"match": {**match, "headers": [post]}, **action},
    ]


def _action(backend: Backend, mirrors: list[Backend]) -> Json:
    component = {"generic_key": {"descriptor_key": "component", "descriptor_value": backend.component}}
    return {
        "cluster": backend.cluster,
        "prefix_rewrite": backend.path,
        "timeout": f"{backend.timeout_s}s",
        "idle_timeout": f"{backend.timeout_s + REQUEST_TIMEOUT_S}s",
        "retry_policy": _retries(backend),
        "request_mirror_policies": [_mirrored(mirror) for mirror in mirrors],
        "rate_limits": [{"actions": [component]}],
    }


def _mirrored(mirror: Backend) -> Json:
    """Copies of a share of a route's requests; each may take as long as the version that answers may.

    Envoy appends -shadow to their host. A caller could do that as well, hence the header.
    """
    return {
        "cluster": mirror.copies_cluster,
        "runtime_fraction": _fraction(mirror.copies / 100),
        "request_headers_mutations": [{"append": header(_SHADOW, "1")}],
    }


def _retries(backend: Backend) -> Json:
    """A prediction changes nothing, so a lost one may be asked again.

    What an engine says that is empty (404), lost its worker (500, 503, 507) or has too much to do (503) may be said
    otherwise by another one. The same engine would only have more to do, so that needs a second endpoint. No handler's
    complaint about a request (400, 413, 415, 422) is among them.
    """
    lost = "connect-failure,refused-stream,reset"
    elsewhere = len(backend.endpoints) > 1
    other = "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    predicate = {"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": {"@type": f"{TYPES}{other}"}}
    return {
        "retry_on": f"{lost},retriable-status-codes" if elsewhere else lost,
        "retriable_status_codes": [404, 500, 503, 507] if elsewhere else [],
        "num_retries": 2,
        "retry_host_predicate": [predicate],
        "host_selection_retry_max_attempts": 3,
    }


def _fixed_routes(routes: Routes, version: str) -> list[Json]:
    """/healthz, and a reply that names what there is for everything else."""
    health = json.dumps({"status": "ok", "components": routes.components, "routes": version})
    known = f"POST /predictions/<component>, where component is one of: {', '.join(routes.components) or 'none yet'}"
    get = {"name": ":method", "string_match": {"safe_regex": {"regex": "GET|HEAD"}}}
    as_json = [header("content-type", "application/json")]
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
    return {"match": {"path": path}, "response_headers_to_add": [header("allow", allowed)], **reply}


def _reply(status: int, text: str) -> Json:
    return {"direct_response": {"status": status, "body": {"inline_string": text}}}
