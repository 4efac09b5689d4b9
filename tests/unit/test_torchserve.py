"""The TorchServe adapter without a TorchServe: what it writes, and what it refuses."""

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from torchrelay.errors import ServingError
from torchrelay.handover import WantedVersion
from torchrelay.serving.engine import Instance, Program
from torchrelay.serving.torchserve import TorchServe, worker_lines

WANTED = WantedVersion(
    component="tiny",
    version="3",
    digest="d" * 64,
    environment="e",
    url="",
    workers=1,
    batch_size=8,
    max_batch_delay_ms=1,
    response_timeout_s=10,
    max_body_bytes=1024,
)


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    """An instance whose Java and environment are stand-ins that are never run for real."""
    java = tmp_path / "java" / "bin" / "java"
    python = tmp_path / "python"
    for file, content in ((java, "#!/bin/sh\n"), (python, f"#!/bin/sh\necho '{tmp_path}/site packages/ts'\n")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(0o755)
    return Instance(
        name="dev-1-tiny",
        folder=tmp_path / "in stance",
        python=str(python),
        ports=(18512, 18513, 18514),
        java_home=tmp_path / "java",
        log=tmp_path / "tiny.log",
        response_timeout_s=17,
        max_body_bytes=5_000_000,
    )


def properties(instance: Instance) -> dict[str, str]:
    lines = (instance.folder / "config.properties").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)  # type: ignore[misc]


def test_everything_listens_on_loopback_and_nothing_may_be_fetched(instance: Instance) -> None:
    TorchServe(instance).prepare()
    found = properties(instance)
    assert found["inference_address"] == "http://127.0.0.1:18512"
    assert found["management_address"] == "http://127.0.0.1:18513"
    assert found["metrics_address"] == "http://127.0.0.1:18514"
    assert {found["grpc_inference_address"], found["grpc_management_address"]} == {"127.0.0.1"}
    assert (found["allowed_urls"], found["enable_envvars_config"]) == ("none", "false")
    assert found["install_py_dep_per_model"] == "false"


def test_limits_come_from_the_instance(instance: Instance) -> None:
    TorchServe(instance).prepare()
    assert properties(instance)["default_response_timeout"] == "17"
    assert int(properties(instance)["max_request_size"]) > instance.max_body_bytes


def test_the_program_is_java_itself_with_folders_of_its_own(instance: Instance) -> None:
    program = TorchServe(instance).prepare()
    assert program.directory == instance.folder
    assert program.command[3] == str(instance.java_home / "bin" / "java")
    assert "exec" in program.command[2]
    assert program.command[program.command.index("-cp") + 1].endswith("/site packages/ts/frontend/*")
    assert "-ncs" in program.command
    log4j = next(word for word in program.command if word.startswith("-Dlog4j"))
    assert log4j.endswith("/in%20stance/log4j2.xml")
    assert program.environment["TORCHRELAY_INSTANCE"] == str(instance.folder)
    assert program.environment["OMP_NUM_THREADS"] == "1"


def test_preparing_again_changes_nothing(instance: Instance) -> None:
    first: Program = TorchServe(instance).prepare()
    assert TorchServe(instance).prepare() == first


def test_a_missing_java_is_named(instance: Instance) -> None:
    (instance.java_home / "bin" / "java").unlink()
    with pytest.raises(ServingError, match=r"java cannot be run"):
        TorchServe(instance).prepare()


def test_an_environment_without_torchserve_is_named(instance: Instance) -> None:
    Path(instance.python).write_text("#!/bin/sh\necho\n")
    with pytest.raises(ServingError, match="has no torchserve"):
        TorchServe(instance).prepare()


def test_an_environment_that_does_not_run_is_named(instance: Instance) -> None:
    Path(instance.python).unlink()
    with pytest.raises(ServingError, match="does not run"):
        TorchServe(instance).prepare()


def test_nobody_there_is_not_ready(instance: Instance) -> None:
    engine = TorchServe(instance.model_copy(update={"ports": (1, 1, 1)}))
    assert not engine.ready()
    with pytest.raises(ServingError, match="does not answer"):
        engine.loaded()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a model archive"),
        ({}, "not a model archive"),
        ([], "not a model archive"),
        ({"model": {"modelName": "tiny", "modelVersion": "4"}}, "tiny version 4"),
        ({"model": {"modelName": "other", "modelVersion": "3"}}, "other version 3"),
    ],
)
def test_an_archive_of_something_else_is_refused(
    instance: Instance, tmp_path: Path, content: object, message: str
) -> None:
    with zipfile.ZipFile(tmp_path / "model.mar", "w") as archive:
        if content is not None:
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps(content))
    with pytest.raises(ServingError, match=message):
        TorchServe(instance).check_archive(tmp_path / "model.mar", WANTED)


def test_a_name_in_a_path_cannot_leave_its_place(instance: Instance) -> None:
    assert TorchServe(instance).path("tiny", "3") == "/predictions/tiny/3"
    assert TorchServe(instance).path("../models", "3?x") == "/predictions/..%2Fmodels/3%3Fx"


def test_the_last_words_of_the_right_worker_are_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("2026 INFO [W-9000-tiny_3-stdout] ValueError: of an earlier try\n")
    offset = log.stat().st_size
    with log.open("a") as file:
        file.write(
            "2026 INFO [W-9001-tiny_33-stdout] ValueError: of another version\n"
            "2026 INFO [W-9002-tiny_3-stdout] Traceback\n2026 INFO [W-9002-tiny_3-stdout] ValueError: why\n"
        )
    assert worker_lines(log, offset, "tiny", "3") == ["Traceback", "ValueError: why"]


def test_a_log_that_was_rotated_is_read_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("2026 INFO [W-9002-tiny_3-stdout] ValueError: why\n")
    assert worker_lines(tmp_path / "log", 10_000, "tiny", "3") == ["ValueError: why"]


def test_no_log_no_words(tmp_path: Path) -> None:
    assert worker_lines(tmp_path / "log", 0, "tiny", "3") == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_sockets_have_short_names_in_a_deep_folder(instance: Instance) -> None:
    assert "/proc/$$/cwd/tmp" in TorchServe(instance).prepare().command[2]
    assert len(f"/proc/{2**22}/cwd/tmp/.ts.sock.{2**16}") < 108
    assert os.sep == "/"
