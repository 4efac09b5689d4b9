"""Asking a running gateway: its callers' port and Envoy's admin interface."""

from typing import Any
from urllib.parse import urlencode

from torchrelay.config import GatewayPlace
from torchrelay.errors import ServingError
from torchrelay.serving.ports import HOST


class NobodyListensError(ServingError):
    """Nothing listens on the gateway's admin port: it does not run."""


def get(port: int, path: str) -> Any:
    """One GET on this machine, without retry; urllib3's own errors."""
    import urllib3

    with urllib3.PoolManager(timeout=urllib3.Timeout(2), retries=False) as http:
        return http.request("GET", f"http://{HOST}:{port}{path}")


def admin(place: GatewayPlace, path: str) -> bytes:
    """What the admin interface says; NobodyListensError where no gateway runs, ServingError if it does not answer."""
    import urllib3

    try:
        answer = get(place.admin_port, path)
    except urllib3.exceptions.NewConnectionError as error:
        raise NobodyListensError(
            f"no gateway runs: nobody listens on its admin port {place.admin_port}", "a running gateway", "make up"
        ) from error
    except urllib3.exceptions.HTTPError as error:
        raise ServingError(f"the gateway's admin port {place.admin_port}: {error}", "an answer", "make up") from error
    return bytes(answer.data)


def statistics(place: GatewayPlace, pattern: str) -> dict[str, str]:
    """Envoy's counters, gauges and texts whose whole name matches, by name."""
    answer = admin(place, f"/stats?{urlencode({'filter': pattern})}").decode()
    return dict(line.split(": ", 1) for line in answer.splitlines() if ": " in line)
