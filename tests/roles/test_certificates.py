"""The role `certificates` by itself: what it makes, when it makes it anew, what it refuses."""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from certificates_rig import Authority
from torchrelay.serving.certificates import read_certificate

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("relay.example.org", "192.0.2.7", "2001:db8::7")
KEYS = ("ca.key", "server.key", "client.key", "client.pem")
PLAY = [{"hosts": "localhost", "gather_facts": False, "roles": [{"role": "certificates"}]}]
PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")
Run = Callable[..., int]


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "tls"


def play(tmp_path: Path, tls: Path, **inputs: object) -> subprocess.CompletedProcess[str]:
    tls.parent.mkdir(exist_ok=True)
    (tmp_path / "play.yml").write_text(json.dumps(PLAY))
    given: dict[str, object] = {"certificates_folder": str(tls), "certificates_names": NAMES}
    given |= {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    given |= {f"certificates_{name}": value for name, value in inputs.items()}
    home = {f"ANSIBLE_{name}": str(tmp_path / "ansible") for name in ("HOME", "LOCAL_TEMP", "REMOTE_TEMP")}
    return subprocess.run(
        [PLAYBOOK, "-i", "localhost,", "-e", json.dumps(given), tmp_path / "play.yml"],
        env={**os.environ, **home, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def run(tmp_path: Path, tls: Path) -> Run:
    """Run the role with these inputs; how many tasks changed something."""

    def run(**inputs: object) -> int:
        done = play(tmp_path, tls, **inputs)
        assert done.returncode == 0, done.stdout + done.stderr
        (changed,) = re.findall(r"^localhost +: ok=\d+ +changed=(\d+)", done.stdout, re.MULTILINE)
        return int(changed)

    return run


def openssl(*arguments: object) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_makes_what_callers_believe_once(run: Run, tls: Path) -> None:
    assert run() > 0
    made = content(tls)
    assert stat.S_IMODE(tls.stat().st_mode) == 0o700
    assert [stat.S_IMODE((tls / name).stat().st_mode) for name in KEYS] == [0o600] * len(KEYS)
    assert read_certificate(tls / "server.crt").uncovered(NAMES) == []
    for name, purpose in (("server", "sslserver"), ("client", "sslclient")):
        assert "OK" in openssl(
            *("verify", "-x509_strict", "-CAfile", tls / "ca.crt", "-purpose", purpose, tls / f"{name}.crt")
        )
        left = read_certificate(tls / f"{name}.crt").ends - datetime.now(UTC)
        assert timedelta(364) < left < timedelta(366)
    assert made["client.pem"] == made["client.key"] + made["client.crt"]
    assert run() == 0
    assert content(tls) == made


def test_without_names_there_is_nothing_to_do(run: Run, tls: Path) -> None:
    assert run(names=[]) == 0
    assert not tls.exists()


def test_certificates_are_renewed_a_month_before_their_end_and_keep_their_keys(run: Run, tls: Path) -> None:
    run(days=31)
    made = content(tls)
    assert run() == 0  # a day is left yet
    for name in ("server", "client"):
        shortened(tls, name)
    assert run() > 0
    assert not any(read_certificate(tls / f"{name}.crt").ends_within(360) for name in ("server", "client"))
    after = content(tls)
    assert after["client.pem"] == after["client.key"] + after["client.crt"]
    assert {name for name in made if after[name] != made[name]} == {"server.crt", "client.crt", "client.pem"}


def shortened(tls: Path, name: str) -> None:
    """The same certificate once more, with 29 days left."""
    copy = ("-copy_extensions", "copyall")
    request, certificate, key = (tls / f"{name}.{kind}" for kind in ("csr", "crt", "key"))
    openssl("x509", "-x509toreq", *copy, "-in", certificate, "-key", key, "-out", request)
    authority = ("-CA", tls / "ca.crt", "-CAkey", tls / "ca.key")
    openssl("x509", "-req", *copy, "-in", request, *authority, "-days", 29, "-out", certificate)
    request.unlink()


def test_a_broken_certificate_is_made_anew(run: Run, tls: Path) -> None:
    run()
    (tls / "server.crt").write_text("broken")
    assert run() > 0
    assert read_certificate(tls / "server.crt").uncovered(NAMES) == []


def test_other_names_are_another_certificate_by_the_same_ca(run: Run, tls: Path) -> None:
    run()
    made = content(tls)
    assert run(names=["other.example.org"]) > 0
    assert read_certificate(tls / "server.crt").names == {"other.example.org"}
    assert [name for name, before in made.items() if (tls / name).read_bytes() != before] == ["server.crt"]


def test_the_users_own_certificate_is_copied_beside(run: Run, tls: Path, tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("mine", NAMES)
    own = {"own_certificate": str(pair.certificate), "own_key": str(pair.key)}
    assert run(**own) > 0
    assert (tls / "own.crt").read_bytes() == pair.certificate.read_bytes()
    assert stat.S_IMODE((tls / "own.key").stat().st_mode) == 0o600
    assert {"ca.crt", "client.pem"} < set(content(tls)) and "server.crt" not in content(tls)
    assert run(**own) == 0


@pytest.mark.parametrize(
    ("days", "key", "says"),
    [(-1, "mine", "has ended"), (90, "other", "is not its key"), (90, "none", "comes with its key")],
)
def test_an_own_certificate_that_cannot_work_is_refused(
    tls: Path, tmp_path: Path, days: int, key: str, says: str
) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("mine", NAMES, days=days)
    keys = {"mine": str(pair.key), "other": str(authority.issue("other").key), "none": ""}
    done = play(tmp_path, tls, own_certificate=str(pair.certificate), own_key=keys[key])
    assert done.returncode == 2
    assert says in " ".join(done.stdout.split() + done.stderr.split())
    assert not tls.exists()


def test_certificates_that_would_be_renewed_at_every_run_are_refused(tls: Path, tmp_path: Path) -> None:
    done = play(tmp_path, tls, days=30)
    assert done.returncode == 2
    assert "Certificates must be good for longer" in " ".join(done.stdout.split() + done.stderr.split())
