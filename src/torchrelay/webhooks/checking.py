"""The known ways in which MLflow drops registry events without a word, each with its remedy."""

import base64
import binascii
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from torchrelay.errors import ConfigError, TrackingError
from torchrelay.rest import AnsweredError
from torchrelay.webhooks.registration import REFUSED_ADDRESS, Trial, Webhook, find_webhooks, try_webhook
from torchrelay.webhooks.signing import read_secrets

KEY = "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"
SCHEMES = "MLFLOW_WEBHOOK_ALLOWED_SCHEMES"
PRIVATE = "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS"
_AGAIN = "make down && make up"
_LOST_KEY = "put the key back that they were encrypted with, or see docs/runbooks/webhooks.md, 'The key is lost'"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `remedy` is what to do when it is not `ok`."""

    name: str
    ok: bool
    found: str
    remedy: str


def findings(
    tracking_url: str, target_url: str, name: str, secrets: Path, environment: Mapping[str, str] | None
) -> list[Finding]:
    """What keeps an alias from waking the orchestrator at `target_url`. Sends it one event for a trial.

    `environment` is that of the running tracking server, None if it cannot be seen from here. The server must be up;
    with nobody listening at `target_url` this takes about 7 s.
    """
    seen = [] if environment is None else [_key(environment), _address(environment, target_url)]
    return [*seen, *_registered(tracking_url, target_url, name, secrets)]


def _key(environment: Mapping[str, str]) -> Finding:
    """Without a key of its own each server process makes one up: at the next start it can read no webhook."""
    value = environment.get(KEY, "")
    found = f"{KEY} is set" if _fernet(value) else f"{KEY} is {'no Fernet key' if value else 'not set'}"
    return Finding("webhook key", _fernet(value), found, f"{_AGAIN} (the role tracking makes the key and sets it)")


def _fernet(value: str) -> bool:
    """Whether `value` is 32 bytes in URL-safe base64, which is what a server starts with."""
    try:
        return len(base64.urlsafe_b64decode(value)) == 32
    except (binascii.Error, ValueError):
        return False


def _address(environment: Mapping[str, str], url: str) -> Finding:
    """MLflow asks these two when a webhook is made and again at every delivery."""
    parts = urlsplit(url)
    schemes = [word.strip() for word in environment.get(SCHEMES, "https").split(",")]
    private = environment.get(PRIVATE, "").lower() in {"true", "1"}
    if parts.scheme not in schemes:
        found = f"{SCHEMES} has no {parts.scheme}"
    elif not private and not _public(parts.hostname or ""):
        found = f"{PRIVATE} is not true, and {parts.hostname} is a private address"
    else:
        return Finding("webhook address", True, f"the tracking server may send to {url}", "")
    return Finding("webhook address", False, found, f"{REFUSED_ADDRESS}, then {_AGAIN}")


def _public(host: str) -> bool:
    """Whether every address of `host` is a public one, as MLflow demands; a name that is unknown here is not."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_global for address in found)


def _registered(tracking_url: str, target_url: str, name: str, secrets: Path) -> list[Finding]:
    try:
        there = find_webhooks(tracking_url, name)
        secret = read_secrets(secrets)[0]
    except AnsweredError as error:
        undecrypted = error.code == "INTERNAL_ERROR"
        found = f"MLflow cannot decrypt its webhooks: {error.found}" if undecrypted else error.found
        return [Finding("webhook", False, found, _LOST_KEY if undecrypted else error.next_command)]
    except (TrackingError, ConfigError) as error:
        return [Finding("webhook", False, error.found, error.next_command)]
    wrong = _wrong(there, target_url, name, secret)
    if wrong:
        return [Finding("webhook", False, wrong, "make up (it registers the webhook anew)")]
    return [Finding("webhook", True, f"{name} → {target_url}", ""), _delivery(tracking_url, there[0])]


def _wrong(there: list[Webhook], url: str, name: str, secret: str) -> str:
    """What is wrong with what is registered; empty if nothing is."""
    if len(there) != 1:
        return f"{len(there)} webhooks are called {name}"
    if not there[0].active:
        return f"{name} is disabled"
    if there[0].url != url:
        return f"{name} points to {there[0].url}, the orchestrator listens at {url}"
    return "" if there[0].fits(url, secret) else f"{name} has other events or an older secret"


def _delivery(tracking_url: str, webhook: Webhook) -> Finding:
    try:
        trial = try_webhook(tracking_url, webhook)
    except TrackingError as error:
        return Finding("webhook delivery", False, error.found, error.next_command)
    if trial.arrived and trial.outcome == "accepted":
        return Finding("webhook delivery", True, f"{webhook.url} took a trial event", "")
    return Finding("webhook delivery", False, _said(webhook, trial), _remedy(trial))


def _said(webhook: Webhook, trial: Trial) -> str:
    status = f"{trial.status} " if trial.status else ""
    return f"a trial event to {webhook.url} failed: {status}{trial.found}"


def _remedy(trial: Trial) -> str:
    if trial.outcome == "stale":
        return "set both clocks (timedatectl set-ntp true)"
    if trial.outcome in {"forged", "unkeyed"}:
        return "make up (it registers the webhook anew)"
    if "scheme" in trial.found or "public IP" in trial.found:
        return f"{REFUSED_ADDRESS}, then {_AGAIN}"
    if trial.arrived:
        return "something else listens there: set port_base in config/local.yaml to a free range, then make up"
    return "read the log of the orchestrator, then make up"
