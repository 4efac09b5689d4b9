"""The tracking server's door for other machines: a small Envoy that asks for a client certificate of our own CA.

Whoever reaches the registry may move an alias, which is a roll-out. MLflow itself stays on loopback.
"""

import hashlib

from torchrelay.config import Json, TrackingFront
from torchrelay.serving.engine import Program
from torchrelay.serving.envoy_config import (
    AUTHORITY,
    BOOTSTRAP,
    CERTIFICATE,
    TYPES,
    address,
    authority_file,
    certificate_file,
    connection_limit,
    envoy_binary,
    listener,
    router,
    server_tls,
    write_config,
)
from torchrelay.serving.ports import HOST

PROGRAM = "tracking-front"
_UPSTREAM = "tracking"


def write_front(front: TrackingFront) -> None:
    """Write all that Envoy reads: the certificates' names first, since the bootstrap points at them."""
    write_config(front.folder / CERTIFICATE, certificate_file(front.public))
    write_config(front.folder / AUTHORITY, authority_file(front.authority))
    write_config(front.folder / BOOTSTRAP, front_bootstrap(front))


def front_program(front: TrackingFront) -> Program:
    """How to run it; another bootstrap makes it another program, which a supervisor starts anew."""
    bootstrap = front.folder.absolute() / BOOTSTRAP
    command = (str(envoy_binary()), "-c", str(bootstrap), "--disable-hot-restart", "--concurrency", "1")
    quiet = ("--log-level", "warning", "--file-flush-interval-msec", "1000")
    return Program(
        name=PROGRAM,
        command=(*command, *quiet),
        environment={"TORCHRELAY_BOOTSTRAP": hashlib.sha256(bootstrap.read_bytes()).hexdigest()[:16]},
        directory=front.folder,
        log=front.log,
    )


def front_bootstrap(front: TrackingFront) -> Json:
    """`envoy.yaml`: one listener with mutual TLS, and the tracking server behind it. It has no admin interface."""
    tls = server_tls(front.folder, clients=True)
    door = listener(PROGRAM, front.public.address, front.public.port, _connection_manager(), tls)
    return {
        "node": {"id": PROGRAM, "cluster": PROGRAM},
        "static_resources": {"listeners": [door], "clusters": [_upstream(front.upstream_port)]},
        "overload_manager": connection_limit(1_000),
    }


def _connection_manager() -> Json:
    """Artifacts are large and take their time, so only silence is limited, no request as a whole."""
    return {
        "@type": f"{TYPES}envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": PROGRAM,
        "route_config": {"virtual_hosts": [_all_requests()]},
        "http_filters": [router()],
        "access_log": [_access_log()],
        "use_remote_address": True,
        "normalize_path": True,
        "request_headers_timeout": "10s",
        "stream_idle_timeout": "300s",
        "common_http_protocol_options": {"idle_timeout": "600s"},
    }


def _all_requests() -> Json:
    route = {"match": {"prefix": "/"}, "route": {"cluster": _UPSTREAM, "timeout": "0s"}}
    return {"name": "all", "domains": ["*"], "routes": [route]}


def _upstream(port: int) -> Json:
    points = [{"endpoint": {"address": address(HOST, port)}}]
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    # uvicorn closes idle connections after 5 s: a request must not meet one that is just being closed.
    http = {
        "@type": f"{TYPES}{options}",
        "explicit_http_config": {"http_protocol_options": {}},
        "common_http_protocol_options": {"idle_timeout": "3s"},
    }
    return {
        "name": _UPSTREAM,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": _UPSTREAM, "endpoints": [{"lb_endpoints": points}]},
        "typed_extension_protocol_options": {options: http},
    }


def _access_log() -> Json:
    """One JSON line a request on stdout, with the certificate that it came with."""
    fields = {
        "time": "%START_TIME%",
        "client": "%DOWNSTREAM_PEER_SUBJECT%",
        "certificate": "%DOWNSTREAM_PEER_FINGERPRINT_256%",
        "address": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(:PATH)%",
        "status": "%RESPONSE_CODE%",
        "duration_ms": "%DURATION%",
    }
    return {
        "name": "envoy.access_loggers.stdout",
        "typed_config": {
            "@type": f"{TYPES}envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
            "log_format": {"json_format": fields},
        },
    }
