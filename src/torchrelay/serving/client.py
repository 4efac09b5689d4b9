"""A caller of the gateway, as a user's program would be one: plain HTTP, no retries."""

import json
from dataclasses import dataclass
from typing import Any

from torchrelay.config import read_json, root
from torchrelay.errors import ServingError
from torchrelay.handover import GoldenSet

_SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_HEADERS = ("x-request-id", "x-component", "x-model-version", "x-archive-digest")


@dataclass(frozen=True)
class Answer:
    """One answer of the gateway: status, the headers that trace it, and the body."""

    status: int
    headers: dict[str, str]
    body: Any


def first_golden(component: str) -> bytes:
    """A request with one golden input of the component's last training."""
    path = root() / "results" / component / "train" / "golden.json"
    found = read_json(GoldenSet, path, f"make deploy-dev COMPONENT={component}")
    return json.dumps({"instances": found.instances[:1]}).encode()


def content_type(body: bytes) -> str:
    """The media type of a body, by its first bytes; JSON unless it is a PNG or JPEG."""
    return next((kind for start, kind in _SIGNATURES.items() if body.startswith(start)), "application/json")


def send(gateway: str, component: str, body: bytes) -> Answer:
    """POST `body` to the gateway; a ServingError where nobody answers."""
    import urllib3

    url = f"{gateway}/predictions/{component}"
    try:
        found = urllib3.request(
            "POST", url, body=body, headers={"content-type": content_type(body)}, retries=False, timeout=60
        )
    except urllib3.exceptions.HTTPError as error:
        raise ServingError(f"{url} did not answer: {error}", "an answer of the gateway", "make up") from error
    headers = {name: found.headers[name] for name in _HEADERS if name in found.headers}
    text = found.data.decode(errors="replace")
    return Answer(found.status, headers, json.loads(text) if text.startswith(("{", "[")) else text)
