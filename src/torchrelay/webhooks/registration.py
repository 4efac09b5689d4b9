"""Our webhook in MLflow: made, mended, tried and taken away over REST.

MLflow never hands a secret out again, so the webhook's description carries the secret's fingerprint. Names are not
unique there: of several webhooks with our name one is kept. Two processes that register at once must share a file
lock, which the caller holds.
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import Field

from torchrelay.config import Frozen, Json
from torchrelay.errors import TrackingError
from torchrelay.rest import NOT_THERE, AnsweredError, Rest
from torchrelay.webhooks.signing import fingerprint, rotate_secret

# Moving an alias is `created` to MLflow. Deleting a version that carries one fires nothing: the poll sees to that.
EVENTS = frozenset({("MODEL_VERSION_ALIAS", "CREATED"), ("MODEL_VERSION_ALIAS", "DELETED")})
REFUSED_ADDRESS = "set MLFLOW_WEBHOOK_ALLOWED_SCHEMES and MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS for the tracking server"


class Webhook(Frozen):
    """One webhook as MLflow lists it."""

    webhook_id: str
    name: str
    url: str
    description: str
    events: frozenset[tuple[str, str]] = Field(description="Pairs such as (MODEL_VERSION_ALIAS, CREATED).")
    active: bool

    def fits(self, url: str, secret: str) -> bool:
        """Whether it is what `ensure_webhook` would make of it."""
        description = _description(secret)
        return (self.url, self.description, self.events, self.active) == (url, description, EVENTS, True)


class Trial(Frozen):
    """What came of a delivery that MLflow was asked to try."""

    arrived: bool = Field(description="Whether the receiver took it.")
    status: int | None = Field(description="HTTP status of the receiver's answer, None if there was none.")
    outcome: str = Field(description="What our receiver calls it; empty if nothing of ours answered.")
    found: str = Field(description="The answer, or why there was none.")


def find_webhooks(tracking_url: str, name: str) -> list[Webhook]:
    """The webhooks of this name, newest first. Raises TrackingError, also when the server cannot decrypt any one."""
    return _named(Rest(tracking_url), name)


def ensure_webhook(
    tracking_url: str, target_url: str, secret: str, name: str
) -> Literal["created", "updated", "present"]:
    """Have MLflow tell `target_url` of every alias that is set or deleted, signed with `secret`.

    Leaves exactly one webhook of this name. Raises TrackingError when the server will not send to that address.
    """
    rest = Rest(tracking_url)
    there = _named(rest, name)
    for extra in there[1:]:
        _delete(rest, extra)
    if not there:
        _put(rest, "", "POST", _body(target_url, secret, name))
        return "created"
    if there[0].fits(target_url, secret):
        return "updated" if there[1:] else "present"
    _put(rest, f"/{there[0].webhook_id}", "PATCH", _body(target_url, secret, name))
    return "updated"


def rotate_webhook(tracking_url: str, target_url: str, folder: Path, name: str) -> None:
    """Put a new secret into `folder` and into MLflow; the one before it stays good while deliveries still carry it.

    Killed or refused in between, `ensure_webhook` with the secret in `folder` completes it.
    """
    ensure_webhook(tracking_url, target_url, rotate_secret(folder), name)


def remove_webhooks(tracking_url: str, name: str) -> int:
    """Delete the webhooks of this name; how many there were."""
    rest = Rest(tracking_url)
    there = _named(rest, name)
    for webhook in there:
        _delete(rest, webhook)
    return len(there)


def try_webhook(tracking_url: str, webhook: Webhook) -> Trial:
    """Have MLflow send a made-up event now; takes about 7 s if nobody listens, since it tries four times.

    MLflow reads the webhook anew for this. A registry event meets what it read some seconds ago.
    """
    row = Rest(tracking_url).create(f"webhooks/{webhook.webhook_id}/test", {})["result"]
    answer = row.get("response_body", "")
    return Trial(
        arrived=bool(row.get("success")),
        status=row.get("response_status"),
        outcome=_outcome(answer),
        found=row.get("error_message") or answer[:300],
    )


def _named(rest: Rest, name: str) -> list[Webhook]:
    found: list[Json] = []
    fields = {"max_results": "1000"}
    while True:
        page = rest.get("webhooks", fields)
        found += [row for row in page.get("webhooks", []) if row["name"] == name]
        if not page.get("next_page_token"):
            return [_webhook(row) for row in found]
        fields = {**fields, "page_token": page["next_page_token"]}


def _webhook(row: Json) -> Webhook:
    return Webhook(
        webhook_id=row["webhook_id"],
        name=row["name"],
        url=row["url"],
        description=row.get("description", ""),
        events=frozenset((event["entity"], event["action"]) for event in row["events"]),
        active=row["status"] == "ACTIVE",
    )


def _body(url: str, secret: str, name: str) -> Json:
    events = [{"entity": entity, "action": action} for entity, action in sorted(EVENTS)]
    return {
        "name": name,
        "url": url,
        "secret": secret,
        "description": _description(secret),
        "events": events,
        "status": "ACTIVE",
    }


def _description(secret: str) -> str:
    return f"Wakes Torchrelay's orchestrator. Secret {fingerprint(secret)}"


def _put(rest: Rest, path: str, method: str, body: Json) -> None:
    try:
        if method == "POST":
            rest.create("webhooks" + path, body)
        else:
            rest.repeat("webhooks" + path, body, method=method)
    except AnsweredError as error:
        if error.code != "INVALID_PARAMETER_VALUE":
            raise
        raise TrackingError(
            error.found, f"a tracking server that may send to {body['url']}", REFUSED_ADDRESS
        ) from error


def _delete(rest: Rest, webhook: Webhook) -> None:
    try:
        rest.repeat(f"webhooks/{webhook.webhook_id}", {}, method="DELETE")
    except AnsweredError as error:
        if error.code != NOT_THERE:
            raise


def _outcome(answer: str) -> str:
    try:
        content = json.loads(answer)
    except ValueError:
        return ""
    return str(content.get("outcome", "")) if isinstance(content, dict) else ""
