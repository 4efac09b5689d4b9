"""A real OpenSSH server on loopback, as the user who runs the tests: machines that are reached as real ones are."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchrelay.config import Ssh

_SBIN = "/usr/sbin"


class SshServer:
    """sshd with a host key of its own, which lets in one key; everything lies under `folder`."""

    def __init__(self, folder: Path, port: int, variables: dict[str, str] | None = None) -> None:
        self.folder, self.port, self.variables = folder, port, variables or {}
        self._process: subprocess.Popen[bytes] | None = None
        self._sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:{_SBIN}")
        if self._sshd is None:
            give_up = pytest.fail if "TORCHRELAY_NEED_SSHD" in os.environ else pytest.skip
            give_up("there is no sshd: apt-get install openssh-server")
        folder.mkdir(parents=True)
        self._key("user")
        self._key("host")
        self.trust_host()

    @property
    def ssh(self) -> Ssh:
        """How it is reached."""
        words = [f"{name}={value}" for name, value in self.variables.items()]
        return Ssh(
            host="127.0.0.1",
            port=self.port,
            user=getpass.getuser(),
            key=self.folder / "user",
            known_hosts=self.folder / "known_hosts",
            command=("env", *words, sys.executable, "-m", "torchrelay"),
        )

    def start(self) -> None:
        """Listen, unless it does; connections are answered once this returns."""
        if self._process is not None:
            return
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd of root insists on it
        config = self.folder / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.folder}/user.pub\nStrictModes no\nPasswordAuthentication no\n"
            "PermitRootLogin prohibit-password\nMaxStartups 100\nMaxSessions 100\n"
        )
        assert self._sshd
        with (self.folder / "sshd.log").open("ab") as log:
            self._process = subprocess.Popen([self._sshd, "-D", "-e", "-f", str(config)], stderr=log)
        end = time.monotonic() + 10
        while not _listens(self.port):
            assert time.monotonic() < end, (self.folder / "sshd.log").read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        """End it with all of its connections, as a machine that is switched off."""
        import psutil

        if self._process is None:
            return
        family = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        for one in family:
            if one.name().startswith("sshd"):
                one.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def change_host_key(self) -> None:
        """As if another machine answered at this address."""
        self.stop()
        (self.folder / "host").unlink()
        self._key("host")
        self.start()

    def trust_host(self) -> None:
        """Write down its host key as the known one."""
        kind, key = (self.folder / "host.pub").read_text().split()[:2]
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def _key(self, name: str) -> None:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
        (self.folder / f"{name}.pub").unlink(missing_ok=True)
        subprocess.run(command, check=True)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
