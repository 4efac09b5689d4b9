"""Secrets on disk, and what the tracking server's environment says; registering is tests/e2e/test_webhook.py."""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from torchrelay import webhooks
from torchrelay.errors import ConfigError, TrackingError
from torchrelay.webhooks import checking, registration, signing
from torchrelay.webhooks.registration import EVENTS, Trial, Webhook

URL = "http://127.0.0.1:18543/webhook"
GOOD = {checking.KEY: Fernet.generate_key().decode(), checking.SCHEMES: "http,https", checking.PRIVATE: "true"}


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_secret_is_made_once_and_is_its_owners_alone(tmp_path: Path, umask: None) -> None:
    folder = tmp_path / "keys" / "production"
    made = webhooks.ensure_secret(folder)
    assert len(made) >= 43
    assert webhooks.ensure_secret(folder) == made
    assert webhooks.read_secrets(folder) == (made,)
    new = webhooks.rotate_secret(folder)
    assert webhooks.read_secrets(folder) == (new, made)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_one_before_counts_for_ten_minutes(tmp_path: Path) -> None:
    old, new = webhooks.ensure_secret(tmp_path), webhooks.rotate_secret(tmp_path)
    for age, expected in ((signing.ROTATION_S - 30, (new, old)), (signing.ROTATION_S + 30, (new,))):
        then = time.time() - age
        os.utime(tmp_path / signing.PREVIOUS, (then, then))
        assert webhooks.read_secrets(tmp_path) == expected


def test_a_rotation_that_is_killed_half_way_loses_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = webhooks.ensure_secret(tmp_path)

    def killed() -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(signing, "_new", killed)
    with pytest.raises(KeyboardInterrupt):
        webhooks.rotate_secret(tmp_path)
    assert set(webhooks.read_secrets(tmp_path)) == {secret}


@pytest.mark.parametrize("name", [signing.SECRET, signing.PREVIOUS])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, name: str) -> None:
    webhooks.ensure_secret(tmp_path)
    webhooks.rotate_secret(tmp_path)
    (tmp_path / name).chmod(0o644)
    with pytest.raises(ConfigError, match="0644") as caught:
        webhooks.read_secrets(tmp_path)
    assert caught.value.next_command == f"chmod 600 {tmp_path / name}"


def test_secrets_are_told_apart_without_being_told() -> None:
    assert signing.fingerprint("a" * 43) != signing.fingerprint("b" * 43)
    assert len(signing.fingerprint("a" * 43)) == 16


def environment(without: str = "", **changes: str) -> dict[str, str]:
    return {key: value for key, value in {**GOOD, **changes}.items() if key != without}


@pytest.mark.parametrize(
    ("seen", "url", "name", "says"),
    [
        (environment(), URL, "", ""),
        (environment(checking.KEY), URL, "webhook key", "is not set"),
        (environment(**{checking.KEY: "secret"}), URL, "webhook key", "no Fernet key"),
        (environment(checking.SCHEMES), URL, "webhook address", "has no http"),
        (environment(checking.PRIVATE), URL, "webhook address", "127.0.0.1 is a private address"),
        (environment(checking.PRIVATE), URL.replace("127.0.0.1", "[::1]"), "webhook address", "private"),
        (environment(checking.PRIVATE), "http://8.8.8.8/webhook", "", ""),
        (environment(checking.SCHEMES), "https://127.0.0.1/webhook", "", ""),
        (environment(**{checking.PRIVATE: "false"}), URL, "webhook address", "private"),
    ],
)
def test_the_servers_environment(
    seen: dict[str, str], url: str, name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhooks.ensure_secret(tmp_path)
    hook = webhook(tmp_path, url)
    monkeypatch.setattr(checking, "find_webhooks", lambda *_: [hook])
    monkeypatch.setattr(
        checking, "try_webhook", lambda *_: Trial(arrived=True, status=200, outcome="accepted", found="")
    )
    found = webhooks.findings("http://127.0.0.1:1", url, "torchrelay", tmp_path, seen)
    assert len(found) == 4
    assert [finding.name for finding in found if not finding.ok] == ([name] if name else [])
    assert all(says in finding.found and finding.remedy for finding in found if not finding.ok)


def webhook(keys: Path, url: str) -> Webhook:
    description = registration._description(webhooks.read_secrets(keys)[0])
    return Webhook(webhook_id="1", name="torchrelay", url=url, description=description, events=EVENTS, active=True)


@pytest.mark.parametrize(
    ("outcome", "status", "text", "remedy"),
    [
        ("stale", 401, "", "clocks"),
        ("forged", 401, "", "make up"),
        ("unkeyed", 503, "", "make up"),
        ("", 200, "<html>", "something else listens there"),
        ("", None, "Connection refused", "log of the orchestrator"),
        ("", None, "must not resolve to a non-public IP address", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS"),
    ],
)
def test_a_failed_trial_says_what_to_do(
    outcome: str, status: int | None, text: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhooks.ensure_secret(tmp_path)
    trial = Trial(arrived=status == 200, status=status, outcome=outcome, found=text)
    hook = webhook(tmp_path, URL)
    monkeypatch.setattr(checking, "find_webhooks", lambda *_: [hook])
    monkeypatch.setattr(checking, "try_webhook", lambda *_: trial)
    registered, delivery = webhooks.findings("http://127.0.0.1:1", URL, "torchrelay", tmp_path, None)
    assert registered.ok and not delivery.ok
    assert remedy in delivery.remedy


def test_a_server_that_is_down_is_one_finding(tmp_path: Path) -> None:
    (found,) = webhooks.findings("http://127.0.0.1:1", URL, "torchrelay", tmp_path, None)
    assert not found.ok and "127.0.0.1:1" in found.found and found.remedy == "make up"
    with pytest.raises(TrackingError):
        webhooks.ensure_webhook("http://127.0.0.1:1", URL, "y" * 43, "torchrelay")
