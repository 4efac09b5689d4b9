"""The secret that MLflow signs webhooks with, and the signature itself.

The secret lies in a perimeter's key folder as `webhook.secret`, mode 0600. During a rotation the one before it lies
beside it as `webhook.secret.previous`: MLflow keeps what it read of a webhook for a minute, and a delivery that it
repeats carries the signature of its first attempt.
"""

import base64
import hashlib
import hmac
import secrets
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from torchrelay.config import write_file
from torchrelay.errors import ConfigError

SECRET = "webhook.secret"  # noqa: S105  (a file's name)
PREVIOUS = SECRET + ".previous"
# MLflow's cache (60 s as it comes) and its last attempt (30 s for each of four, and the pauses) fit in well.
ROTATION_S = 600
_SHORTEST = 32


def sign(secret: str, delivery_id: str, timestamp: str, body: bytes) -> str:
    """The value of X-MLflow-Signature: HMAC-SHA256 over `<id>.<timestamp>.<body>`.

    Source: `_generate_hmac_signature` in mlflow/webhooks/delivery.py, which follows standardwebhooks.com.
    """
    content = f"{delivery_id}.{timestamp}.".encode() + body
    digest = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def signed_by_any(keys: Iterable[str], delivery_id: str, timestamp: str, body: bytes, signature: str) -> bool:
    """Whether one of the secrets made this signature; takes as long whether none, the first or the last did."""
    given = signature.encode()
    matches = [hmac.compare_digest(sign(key, delivery_id, timestamp, body).encode(), given) for key in keys]
    return any(matches)


def ensure_secret(folder: Path) -> str:
    """The secret in `folder`, made if there is none; two processes that may come first must share a file lock.

    Raises ConfigError when it cannot be used as it lies there.
    """
    if not (folder / SECRET).exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(folder / SECRET, _new(), mode=0o600)
    return _read(folder / SECRET)


def rotate_secret(folder: Path) -> str:
    """Make a new secret; the one before it stays good for ROTATION_S seconds. Killed at any point, one is in force."""
    write_file(folder / PREVIOUS, ensure_secret(folder).encode(), mode=0o600)
    write_file(folder / SECRET, _new(), mode=0o600)
    return _read(folder / SECRET)


def read_secrets(folder: Path) -> tuple[str, ...]:
    """The secrets that count now: the present one, and the one before it for ROTATION_S after a rotation.

    Raises ConfigError when there is none, or when others may read one that counts.
    """
    current, previous = folder / SECRET, folder / PREVIOUS
    if previous.exists() and time.time() - previous.stat().st_mtime < ROTATION_S:
        return _read(current), _read(previous)
    return (_read(current),)


def fingerprint(secret: str) -> str:
    """What tells two secrets apart and gives neither away."""
    return hashlib.sha256(b"torchrelay webhook " + secret.encode()).hexdigest()[:16]


def _new() -> bytes:
    return secrets.token_urlsafe(32).encode()


def _read(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"there is no {path}", "the secret that webhooks are signed with", "make up")
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        raise ConfigError(f"{path} has mode {mode:04o}", "mode 0600: its owner alone", f"chmod 600 {path}")
    secret = path.read_text(encoding="utf-8").strip()
    if len(secret) < _SHORTEST:
        raise ConfigError(
            f"{path} holds {len(secret)} characters", f"{_SHORTEST} or more", f"rm {path}, then make up makes a new one"
        )
    return secret
