"""MLflow's registry webhooks: how they are signed, how ours is registered, and what keeps one from arriving.

A webhook only wakes the orchestrator, which reads the registry itself, so a lost one costs a poll interval and a
forged one nothing. MLflow sends them from memory after the commit, tries each four times within some seconds, and
says nothing when it cannot: that is what `findings` is for.
"""

from torchrelay.webhooks.checking import Finding, findings
from torchrelay.webhooks.keeping import Keeper, Place, change_secret, keep_webhook, webhook_place
from torchrelay.webhooks.registration import (
    Trial,
    ensure_webhook,
    find_webhooks,
    remove_webhooks,
    rotate_webhook,
    try_webhook,
)
from torchrelay.webhooks.signing import ensure_secret, read_secrets, rotate_secret, sign, signed_by_any

__all__ = [
    "Finding",
    "Keeper",
    "Place",
    "Trial",
    "change_secret",
    "ensure_secret",
    "ensure_webhook",
    "find_webhooks",
    "findings",
    "keep_webhook",
    "read_secrets",
    "remove_webhooks",
    "rotate_secret",
    "rotate_webhook",
    "sign",
    "signed_by_any",
    "try_webhook",
    "webhook_place",
]
