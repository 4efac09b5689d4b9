"""Packing, signing, verifying, fetching and proving archives."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from zipfile import ZipFile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from torchrelay import archive
from torchrelay.archive.mar import BASE_HANDLER, REQUIRED
from torchrelay.errors import ArchiveError, TrackingError
from torchrelay.handover import Registration
from torchrelay.rest import NOT_THERE
from torchrelay.serving.golden import largest_difference


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> archive.KeyPair:
    return archive.ensure_key(tmp_path_factory.mktemp("keys") / "dev")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, keys: archive.KeyPair) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "archive"
    tiny.signed(folder, keys.private)
    return folder


def test_what_is_packed_is_what_is_verified(packed: Path, keys: archive.KeyPair) -> None:
    manifest = archive.verify(packed, keys.public)
    assert archive.verify(packed, keys.public, manifest.digest) == manifest
    assert (manifest.component, manifest.version, manifest.environment) == ("tiny", "1", tiny.ENVIRONMENT)
    assert manifest.digest == archive.digest(packed / "model.mar")


def test_an_archive_may_lie_in_a_folder_of_any_name(packed: Path, keys: archive.KeyPair, tmp_path: Path) -> None:
    archive.verify(tiny.copy(packed, tmp_path / "0123abcd"), keys.public)


def test_only_what_the_handler_imports_travels(packed: Path) -> None:
    names = set(ZipFile(packed / "model.mar").namelist())
    assert names == REQUIRED | {"scale.py"}


def test_the_base_handler_is_the_one_of_this_package(packed: Path) -> None:
    from torchrelay.serving import handler

    assert ZipFile(packed / "model.mar").read(BASE_HANDLER) == Path(str(handler.__file__)).read_bytes()


def test_unpack_brings_back_every_byte(packed: Path, tmp_path: Path) -> None:
    archive.unpack(packed / "model.mar", tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "handler.py").read_bytes() == (tiny.COMPONENT / "handler.py").read_bytes()
    assert (tmp_path / "unpacked" / "model.safetensors").read_bytes() == tiny.weights()
    assert json.loads((tmp_path / "unpacked" / "release.json").read_bytes())["run_id"] == "run1"


def test_unpack_never_writes_into_a_folder_that_is_there(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="exists already"):
        archive.unpack(packed / "model.mar", tmp_path)


def test_golden_set(packed: Path) -> None:
    assert archive.golden_set(packed / "model.mar").instances == tiny.INSTANCES


FILES = sorted(path.name for path in tiny.COMPONENT.glob("*.py"))


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(FILES),
    times=st.lists(st.integers(0, 2**31), min_size=len(FILES), max_size=len(FILES)),
    umask=st.sampled_from([0o000, 0o022, 0o027, 0o077]),
    mode=st.sampled_from([0o400, 0o600, 0o644, 0o755]),
)
def test_the_same_inputs_give_the_same_bytes(
    order: list[str], times: list[int], umask: int, mode: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("again")
    before = os.umask(umask)
    try:
        (folder / "tiny").mkdir()
        for name, time in zip(order, times, strict=True):
            (folder / "tiny" / name).write_bytes((tiny.COMPONENT / name).read_bytes())
            (folder / "tiny" / name).chmod(mode)
            os.utime(folder / "tiny" / name, (time, time))
        registration = Registration(component="tiny", version="1", run_id="run1")
        trained = tiny.train(folder / "train")
        manifest = archive.pack(folder / "tiny", trained, registration, tiny.ENVIRONMENT, folder / "archive")
    finally:
        os.umask(before)
    assert manifest == tiny.pack(folder / "reference")


def test_another_process_with_another_locale_packs_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; import tiny; print(tiny.pack(Path(sys.argv[1])).digest)"
    environment = {"PATH": os.environ["PATH"], "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", program, str(tmp_path / "archive")]
    there = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=there, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == archive.digest(packed / "model.mar")


def test_packing_again_replaces_the_folder_whole(packed: Path, tmp_path: Path, keys: archive.KeyPair) -> None:
    copy = tiny.copy(packed, tmp_path / "archive")
    tiny.pack(copy, version="2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive", "archive-train"]
    assert not (copy / "model.sig").exists()  # the old signature does not outlive what it signed
    archive.sign(copy, keys.private)
    assert archive.verify(copy, keys.public).version == "2"


def test_signing_again_is_possible(packed: Path, tmp_path: Path, keys: archive.KeyPair) -> None:
    copy = tiny.copy(packed, tmp_path / "archive")
    archive.sign(copy, keys.private)
    archive.verify(copy, keys.public)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("golden.json", None, "golden.json: No such file"),
        ("golden.json", b"{}", "not a golden set"),
        ("golden.json", b'{"instances": [[1]], "predictions": [], "tolerance": 0}', "1 instances and 0 predictions"),
        ("model.safetensors", None, "no such file"),
        ("model.safetensors", b"\x80\x04pickle, which may run code", "safetensors"),
        ("model.safetensors", b"", "safetensors"),
    ],
)
def test_packing_refuses_what_training_did_not_finish(
    name: str, content: bytes | None, expected: str, tmp_path: Path
) -> None:
    trained = tiny.train(tmp_path / "train")
    (trained / name).unlink()
    if content is not None:
        (trained / name).write_bytes(content)
    registration = Registration(component="tiny", version="1", run_id="r")
    with pytest.raises(ArchiveError, match=expected):
        archive.pack(tiny.COMPONENT, trained, registration, "env", tmp_path / "archive")
    assert not (tmp_path / "archive").exists()


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (None, "handler.py does not exist"),
        ("from .model import Tiny", "relative import"),
        ("def broken(", "is not Python"),
        ("import package", "imports the package"),
        ("import torchrelay_handler", "name of the base handler"),
    ],
)
def test_packing_refuses_a_component_that_cannot_travel(handler: str | None, expected: str, tmp_path: Path) -> None:
    component = tmp_path / "tiny"
    (component / "package").mkdir(parents=True)
    (component / "package" / "__init__.py").touch()
    (component / "model.py").touch()
    (component / BASE_HANDLER).touch()
    if handler is not None:
        (component / "handler.py").write_text(handler)
    registration = Registration(component="tiny", version="1", run_id="r")
    with pytest.raises(ArchiveError, match=expected):
        archive.pack(component, tiny.train(tmp_path / "train"), registration, "env", tmp_path / "archive")


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    keys = archive.ensure_key(tmp_path / "keys" / "dev")
    assert stat.S_IMODE(keys.private.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "keys" / "dev").stat().st_mode) == 0o700
    assert b"PRIVATE" not in keys.public.read_bytes()


def test_keys_are_made_once(tmp_path: Path) -> None:
    first = archive.ensure_key(tmp_path / "dev")
    private = first.private.read_bytes()
    first.public.unlink()
    assert archive.ensure_key(tmp_path / "dev") == first
    assert first.private.read_bytes() == private
    assert sorted(path.name for path in (tmp_path / "dev").iterdir()) == ["signing.pem", "signing.pub"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_private_key_that_others_can_read_is_refused(mode: int, packed: Path, tmp_path: Path) -> None:
    keys = archive.ensure_key(tmp_path / "dev")
    keys.private.chmod(mode)
    with pytest.raises(ArchiveError, match="has mode") as caught:
        archive.ensure_key(tmp_path / "dev")
    assert caught.value.next_command == f"chmod 600 {keys.private}"
    with pytest.raises(ArchiveError, match="has mode"):
        archive.sign(packed, keys.private)


def test_a_key_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    archive.ensure_key(tmp_path / "dev")
    (tmp_path / "dev").chmod(0o777)
    with pytest.raises(ArchiveError, match="mode 0700"):
        archive.ensure_key(tmp_path / "dev")


def test_a_public_key_of_another_pair_is_refused(tmp_path: Path, keys: archive.KeyPair) -> None:
    mixed = archive.ensure_key(tmp_path / "dev")
    mixed.public.write_bytes(keys.public.read_bytes())
    with pytest.raises(ArchiveError, match="does not belong"):
        archive.ensure_key(tmp_path / "dev")


def test_a_broken_private_key_is_never_overwritten(tmp_path: Path) -> None:
    keys = archive.ensure_key(tmp_path / "dev")
    keys.private.write_bytes(b"half a key")
    with pytest.raises(ArchiveError, match="not a private key"):
        archive.ensure_key(tmp_path / "dev")
    assert keys.private.read_bytes() == b"half a key"


def test_a_key_of_another_kind_is_refused(packed: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    keys = archive.ensure_key(tmp_path / "dev")
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    keys.private.write_bytes(pem)
    for use in (lambda: archive.sign(packed, keys.private), lambda: archive.ensure_key(tmp_path / "dev")):
        with pytest.raises(ArchiveError, match="another kind"):
            use()


def test_processes_that_race_for_the_first_key_agree_on_one(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from torchrelay import archive; import cryptography.x509;"
        "print('ready', flush=True); sys.stdin.readline();"
        "print(archive.ensure_key(Path(sys.argv[1])).private.read_text())"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "dev")]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:  # all at once, before anyone waits for the first to end
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    made = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0] * 4
    assert len(set(made)) == 1
    assert "PRIVATE KEY" in made[0]


class _Files(BaseHTTPRequestHandler):
    """A file server that can also misbehave; `served` maps paths to (status, body, announced length)."""

    served: ClassVar[dict[str, tuple[int, bytes, int]]] = {}

    def do_GET(self) -> None:
        status, body, length = self.served.get(self.path, (404, b"no such file", 12))
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Files) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()
    _Files.served.clear()


def _serve(folder: Path) -> None:
    for path in folder.iterdir():
        _Files.served[f"/v1/{path.name}"] = (200, path.read_bytes(), path.stat().st_size)


def test_fetch_brings_what_can_be_verified(packed: Path, keys: archive.KeyPair, server: str, tmp_path: Path) -> None:
    _serve(packed)
    archive.fetch(f"{server}/v1/", tmp_path / "nodes" / "digest")
    archive.verify(tmp_path / "nodes" / "digest", keys.public)


@pytest.mark.parametrize("what", ["missing", "truncated", "failing"])
def test_a_failed_fetch_leaves_nothing_behind(what: str, packed: Path, server: str, tmp_path: Path) -> None:
    _serve(packed)
    body = (packed / "manifest.json").read_bytes()
    _Files.served["/v1/manifest.json"] = {
        "missing": (404, b"", 0),
        "truncated": (200, body[:10], len(body)),
        "failing": (500, b"", 0),
    }[what]
    with pytest.raises(TrackingError) as caught:
        archive.fetch(f"{server}/v1", tmp_path / "digest")
    assert getattr(caught.value, "code", None) == (NOT_THERE if what == "missing" else None)
    assert list(tmp_path.iterdir()) == []


def test_fetch_stops_at_the_size_limit(
    packed: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve(packed)
    monkeypatch.setattr("torchrelay.archive.transfer._SMALL", 100)
    with pytest.raises(ArchiveError, match="larger than 100 bytes"):
        archive.fetch(f"{server}/v1", tmp_path / "digest")
    assert list(tmp_path.iterdir()) == []


def test_fetch_from_nobody(tmp_path: Path, server: str) -> None:
    with pytest.raises(TrackingError) as caught:
        archive.fetch("http://127.0.0.1:1/v1", tmp_path / "digest")
    assert caught.value.next_command == "make up"


def test_the_golden_proof(packed: Path, component_python: str) -> None:
    proof = archive.prove(packed / "model.mar", component_python)
    assert (proof.component, proof.version, proof.samples) == ("tiny", "1", 3)
    assert proof.digest == archive.digest(packed / "model.mar")
    assert proof.largest_difference <= 1e-6


def test_the_golden_proof_fails_over_the_tolerance(tmp_path: Path, component_python: str) -> None:
    tiny.pack(tmp_path / "archive", spoil=0.5)
    with pytest.raises(ArchiveError, match=r"differ from its golden outputs by 0\.(5|4999)") as caught:
        archive.prove(tmp_path / "archive" / "model.mar", component_python)
    assert caught.value.expected == "at most 0.0001"


def test_the_golden_proof_needs_an_environment_that_can_run_the_archive(packed: Path) -> None:
    with pytest.raises(ArchiveError, match="ModuleNotFoundError"):
        archive.prove(packed / "model.mar", sys.executable)
    with pytest.raises(ArchiveError, match="does not start"):
        archive.prove(packed / "model.mar", "no/such/python")


def test_what_is_not_admitted_is_never_named_to_the_program(packed: Path, tmp_path: Path) -> None:
    program, heard = tmp_path / "python", tmp_path / "heard"
    program.write_text(f"#!/bin/sh\nread line && echo heard $line > {heard}\n")
    program.chmod(0o755)

    def refuse() -> None:
        raise ArchiveError("not signed", "signed", "make deploy-dev")

    with pytest.raises(ArchiveError, match="not signed"):
        archive.prove(packed / "model.mar", str(program), admit=refuse)
    assert not heard.exists()
    with pytest.raises(ArchiveError):
        archive.prove(packed / "model.mar", str(program))
    assert str(packed / "model.mar") in heard.read_text()


def test_the_golden_proof_ends(packed: Path, component_python: str) -> None:
    with pytest.raises(ArchiveError, match="without an end"):
        archive.prove(packed / "model.mar", component_python, timeout_s=0.01)


def test_the_archive_is_scored_on_a_frozen_test_set(packed: Path, tmp_path: Path, component_python: str) -> None:
    import numpy as np

    instances = np.array(tiny.INSTANCES * 200)
    labels = np.array([tiny.predict(row)["class"] for row in tiny.INSTANCES] * 200)
    labels[7] = 1 - labels[7]
    np.savez(tmp_path / "test.npz", instances=instances, labels=labels)
    found = archive.evaluate(packed / "model.mar", component_python, tmp_path / "test.npz", "classification")
    assert found.test_set == archive.digest(tmp_path / "test.npz")
    assert [index for index, score in enumerate(found.scores) if score == 0] == [7]
    assert len(found.scores) == len(found.slices["class"]) == 600


def test_a_regression_is_scored_by_its_error(packed: Path, tmp_path: Path, component_python: str) -> None:
    import numpy as np

    np.savez(tmp_path / "test.npz", instances=np.array(tiny.INSTANCES), labels=np.array([0.0, 0.5, 2.0]))
    found = archive.evaluate(packed / "model.mar", component_python, tmp_path / "test.npz", "regression")
    values = [tiny.predict(instance)["probabilities"][0] for instance in tiny.INSTANCES]  # type: ignore[index]
    assert found.scores == pytest.approx([-abs(values[0]), -abs(values[1] - 0.5), -abs(values[2] - 2.0)], abs=1e-6)
    assert found.slices == {}


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        ({"a": [1, 2.0]}, {"a": [1, 2.5]}, 0.5),
        ({"a": 1}, {"b": 1}, float("inf")),
        ([1, 2], [1], float("inf")),
        ("cat", "dog", float("inf")),
        (True, 1, float("inf")),
        (None, None, 0.0),
        (float("nan"), float("nan"), 0.0),
        (float("nan"), 1.0, float("inf")),
        (float("inf"), float("inf"), 0.0),
        ([], [], 0.0),
    ],
)
def test_largest_difference(expected: object, found: object, difference: float) -> None:
    assert largest_difference(expected, found) == difference


def test_importing_the_package_is_cheap() -> None:
    program = "import sys, torchrelay.archive; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["model_signing", "sigstore", "urllib3", "cryptography", "torch", "numpy"]
    done = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_logged_requests_are_answered_again_each_with_its_own_status(packed: Path, component_python: str) -> None:
    requests = [{"id": "a", "inputs": tiny.INSTANCES[:1]}, {"id": "b", "inputs": [["no", "numbers", "here"]]}]
    good, bad = archive.replay(packed / "model.mar", component_python, requests, patience_s=30)
    assert (good["id"], good["status"], bad["id"]) == ("a", 200, "b")
    assert good["output"]["predictions"][0]["class"] == tiny.predict(tiny.INSTANCES[0])["class"]
    assert bad["status"] in (400, 500)
    assert good["milliseconds"] > 0


def test_all_is_tried_in_one_run_and_gives_what_it_gives_alone(
    packed: Path, tmp_path: Path, component_python: str
) -> None:
    import numpy as np

    tests, mar = tmp_path / "test.npz", packed / "model.mar"
    np.savez(tests, instances=np.array(tiny.INSTANCES), labels=np.array([0, 1, 0]))
    requests = [{"id": "a", "inputs": tiny.INSTANCES[:1]}]
    asked = {"test_set": tests, "task": "classification", "requests": requests, "patience_s": 30.0}
    found = archive.examine(mar, component_python, **asked, timeout_s=120)  # type: ignore[arg-type]
    assert found.proof == archive.prove(mar, component_python)
    assert found.evaluation == archive.evaluate(mar, component_python, tests, "classification")
    (alone,) = archive.replay(mar, component_python, requests, patience_s=30)
    assert [{**one, "milliseconds": 0} for one in found.answers] == [{**alone, "milliseconds": 0}]
    tiny.pack(tmp_path / "archive", spoil=0.5)
    with pytest.raises(ArchiveError, match="differ from its golden outputs"):
        archive.examine(tmp_path / "archive" / "model.mar", component_python, **asked, timeout_s=120)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts how long a thread waits for a processor")
def test_a_replayed_request_does_not_pay_for_a_busy_machine(packed: Path, component_python: str) -> None:
    """On one processor, beside a program that never rests and comes first."""
    requests = [{"id": str(number), "inputs": tiny.INSTANCES * 2000} for number in range(30)]

    def slowest(niceness: int) -> float:
        lower = partial(os.setpriority, os.PRIO_PROCESS, 0, niceness)  # of this thread, and of what it starts
        with ThreadPoolExecutor(1, initializer=lower) as aside:
            answers = aside.submit(archive.replay, packed / "model.mar", component_python, requests, 30).result()
        return sorted(one["milliseconds"] for one in answers)[len(answers) // 2]

    mask = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mask)})
    try:
        alone = slowest(0)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
            try:
                beside = slowest(5)
            finally:
                busy.kill()
    finally:
        os.sched_setaffinity(0, mask)
    assert beside < 2 * alone


def test_a_replay_that_hangs_is_not_sat_out(packed: Path, component_python: str) -> None:
    requests = [{"id": str(number), "inputs": tiny.INSTANCES[:1]} for number in range(40)]
    answers = archive.replay(packed / "model.mar", component_python, requests, patience_s=0)
    assert [one["status"] for one in answers] == [504] * 40
    assert [one["output"] is None for one in answers] == [False] * 20 + [True] * 20
