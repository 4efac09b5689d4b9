"""One wrk client: so many open connections, each sending its next request when the last one is answered."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from torchrelay.errors import ConfigError

_SCRIPT = Path(__file__).with_name("post.lua")


@dataclass(frozen=True)
class Shot:
    """What one client saw in one stretch. `errors` counts answers above 399 and connections lost."""

    rate: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    requests: int
    errors: int


def require_wrk() -> None:
    """ConfigError where there is no wrk."""
    if not shutil.which("wrk"):
        raise ConfigError("there is no wrk on PATH", "wrk 4, the load generator", "apt-get install wrk")


def shoot(url: str, body: Path, concurrency: int, seconds: float) -> Shot:
    """Send `body` to `url` over `concurrency` connections for that long; wrk counts in whole seconds."""
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
    done = subprocess.run(
        [*command, "-s", str(_SCRIPT), url],
        env={**os.environ, "BODY": str(body)},
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stderr.strip().splitlines()[-1])
    return Shot(
        rate=said["requests"] / said["seconds"],
        p50_ms=said["p50_ms"],
        p99_ms=said["p99_ms"],
        max_ms=said["max_ms"],
        requests=said["requests"],
        errors=said["refused"] + said["lost"],
    )
