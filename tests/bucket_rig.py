"""A bucket on this machine: gcp-storage-emulator, which Google's library, gcsfs, MLflow and Litestream take for GCS."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import urllib3

BUCKET = "relay"
EMULATOR = Path(sys.executable).with_name("gcp-storage-emulator")


@contextmanager
def bucket(folder: Path, port: int) -> Iterator[str]:
    """The emulator with one bucket, on this port of loopback; its URL, for STORAGE_EMULATOR_HOST."""
    command = [EMULATOR, "-d", folder, "start", "--host", "127.0.0.1", "--port", str(port), "--default-bucket", BUCKET]
    url = f"http://127.0.0.1:{port}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "emulator.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        _await_answer(url, server)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _await_answer(url: str, server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib3.request("GET", f"{url}/storage/v1/b/{BUCKET}", retries=False, timeout=5)
        except urllib3.exceptions.HTTPError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the emulator of a bucket did not come up at {url}")
