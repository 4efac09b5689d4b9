"""When data count as up to date, which version dvc.lock names, and what a failed stage is said to have found."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from torchrelay import config, data
from torchrelay.errors import DataError

ROOT = Path(__file__).resolve().parents[2]

STAGE = """
import pathlib, sys
arguments = sys.argv[1:]
stage, output = arguments[0], pathlib.Path(arguments[-1])
params = pathlib.Path(arguments[arguments.index("--params") + 1]).read_text()
with open("ran.txt", "a") as file:
    file.write(stage + "\\n")
print(f"{stage}: at work", flush=True)
if f"break: {stage}" in params:
    sys.exit("error: record 3 is wrong\\n  expected: rule of three\\n  next:     mend it")
output.mkdir(parents=True, exist_ok=True)
(output / "file").write_text(stage + params)
"""

LOCK = """schema: '2.0'
stages:
  prepare@moons_big:
    cmd: python x
    outs:
    - path: data/moons_big/prepared
      hash: md5
      md5: bbbb.dir
      size: 1
  prepare@moons:
    cmd: python x
    deps:
    - path: data/moons/raw
      hash: md5
      md5: 0000.dir
    outs:
    - path: data/moons/prepared
      hash: md5
      md5: aaaa.dir
      size: 1
      nfiles: 1
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of two components whose data.py is a few lines; dvc.yaml is the real one, run without torchrelay."""
    (tmp_path / "Snakefile").touch()
    (tmp_path / "config").mkdir()
    shutil.copy(ROOT / "config" / "defaults.yaml", tmp_path / "config")
    for name in ("moons", "suns"):
        add(tmp_path, name)
    shutil.copytree(ROOT / ".dvc", tmp_path / ".dvc", ignore=shutil.ignore_patterns("tmp", "config.local"))
    arguments = "--params components/${item}/params.yaml --output data/${item}/"
    stages = (ROOT / "dvc.yaml").read_text()
    for stage, (_, output) in data.STAGES.items():
        command = f"python -m torchrelay run-stage --component ${{item}} --stage {stage}"
        assert command in stages
        stages = stages.replace(command, f"python components/${{item}}/data.py {stage} {arguments}{output}")
    (tmp_path / "dvc.yaml").write_text(stages)
    monkeypatch.setenv("TORCHRELAY_ROOT", str(tmp_path))
    for name in ("TORCHRELAY_DATA", "TORCHRELAY_STATE", "TORCHRELAY_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    config.settings.cache_clear()
    yield tmp_path
    config.settings.cache_clear()


def add(checkout: Path, name: str) -> None:
    folder = checkout / "components" / name
    folder.mkdir(parents=True)
    (folder / "component.yaml").touch()
    (folder / "data.py").write_text(STAGE)
    (folder / "params.yaml").write_text("limit: null\n")


def ran(checkout: Path) -> list[str]:
    """The stages that ran since the last question."""
    file = checkout / "ran.txt"
    stages = file.read_text().split() if file.is_file() else []
    file.unlink(missing_ok=True)
    return stages


def test_dvc_runs_what_changed_and_nothing_else(checkout):
    subprocess.run(["git", "init", "-q"], check=True)
    log = checkout / "logs" / "moons.log"
    assert not data.up_to_date("moons")
    data.reproduce("moons", log)
    assert ran(checkout) == ["extract", "validate", "prepare"]
    assert data.up_to_date("moons")
    assert not data.up_to_date("suns")
    assert "prepare: at work" in log.read_text()
    first = data.version("moons")
    assert (checkout / ".torchrelay" / "dvc" / "cache").is_dir()

    (checkout / "components" / "moons" / "params.yaml").write_text("limit: 5\n")
    assert not data.up_to_date("moons")
    data.reproduce("moons", log)
    assert data.up_to_date("moons")
    assert data.version("moons") != first

    (checkout / "components" / "moons" / "params.yaml").write_text("break: validate\n")
    with pytest.raises(DataError) as caught:
        data.reproduce("moons", log)
    assert caught.value.found == f"record 3 is wrong (log: {log})"
    assert (caught.value.expected, caught.value.next_command) == ("rule of three", "mend it")
    assert not data.up_to_date("moons")


def fake_dvc(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand in for DVC: what it was asked is kept, and it leaves the lock that a real one would."""
    calls: list[list[str]] = []

    def run(arguments: list[str], component: str, log: Path) -> None:
        calls.append(arguments)
        (checkout / "dvc.lock").write_text(LOCK)
        (checkout / "data" / component / "prepared").mkdir(parents=True, exist_ok=True)
        (checkout / "data" / component / "prepared" / "train.npz").touch()

    monkeypatch.setattr(data, "_dvc", run)
    return calls


@pytest.mark.parametrize(
    "changed",
    [
        "components/moons/data.py",
        "components/moons/reading/idx.py",
        "components/moons/labels.csv",
        "components/moons/params.yaml",
        "dvc.yaml",
        "data/moons/prepared/train.npz",
    ],
)
def test_any_change_of_what_a_stage_reads_or_wrote_counts(checkout, monkeypatch, changed):
    fake_dvc(checkout, monkeypatch)
    import_more(checkout)
    data.reproduce("moons", checkout / "log")
    assert data.up_to_date("moons")
    with (checkout / changed).open("a") as file:
        file.write("\n# changed\n")
    assert not data.up_to_date("moons")


def test_a_lost_output_counts(checkout, monkeypatch):
    fake_dvc(checkout, monkeypatch)
    data.reproduce("moons", checkout / "log")
    (checkout / "data" / "moons" / "prepared" / "train.npz").unlink()
    assert not data.up_to_date("moons")


def test_another_components_change_does_not_count(checkout, monkeypatch):
    fake_dvc(checkout, monkeypatch)
    data.reproduce("moons", checkout / "log")
    (checkout / "dvc.lock").write_text(LOCK.replace("bbbb", "cccc"))
    (checkout / "components" / "suns" / "data.py").write_text("")
    assert data.up_to_date("moons")
    (checkout / "dvc.lock").write_text(LOCK.replace("aaaa", "cccc"))
    assert not data.up_to_date("moons")


def test_a_change_while_dvc_ran_is_not_taken_for_done(checkout, monkeypatch):
    params = checkout / "components" / "moons" / "params.yaml"
    monkeypatch.setattr(data, "_dvc", lambda *_: params.write_text("limit: 6\n"))
    data.reproduce("moons", checkout / "log")
    assert not data.up_to_date("moons")


def test_a_changed_source_folder_is_extracted_again(checkout, monkeypatch):
    calls = fake_dvc(checkout, monkeypatch)
    source = checkout / "source"
    source.mkdir()
    (source / "records").write_text("1")
    (checkout / "components" / "moons" / "params.yaml").write_text("source: source\n")
    data.reproduce("moons", checkout / "log")
    assert data.up_to_date("moons")
    (source / "records").write_text("1, 2")
    assert not data.up_to_date("moons")
    calls.clear()
    data.reproduce("moons", checkout / "log")
    assert calls == [["repro", "--force", "--single-item", "extract@moons"], ["repro", "prepare@moons"]]
    assert data.up_to_date("moons")


def import_more(checkout: Path) -> None:
    """A package that the stages import, and a file that they read."""
    folder = checkout / "components" / "moons"
    (folder / "reading").mkdir()
    (folder / "reading" / "idx.py").touch()
    (folder / "labels.csv").touch()
    (folder / "model.py").touch()
    with (folder / "data.py").open("a") as file:
        file.write("import reading.idx\n")


@pytest.mark.parametrize("changed", ["reading/idx.py", "labels.csv"])
def test_what_the_stages_read_and_dvc_does_not_watch_runs_them_again(checkout, changed):
    subprocess.run(["git", "init", "-q"], check=True)
    import_more(checkout)
    data.reproduce("moons", checkout / "log")
    ran(checkout)
    (checkout / "components" / "moons" / changed).write_text("# changed\n")
    data.reproduce("moons", checkout / "log")
    assert ran(checkout) == ["extract", "validate", "prepare"]
    assert data.up_to_date("moons")


def test_a_models_code_is_nothing_to_the_data(checkout, monkeypatch):
    fake_dvc(checkout, monkeypatch)
    import_more(checkout)
    data.reproduce("moons", checkout / "log")
    (checkout / "components" / "moons" / "model.py").write_text("# changed\n")
    assert data.up_to_date("moons")


def test_a_broken_fingerprint_asks_dvc(checkout, monkeypatch):
    fake_dvc(checkout, monkeypatch)
    data.reproduce("moons", checkout / "log")
    (checkout / ".torchrelay" / "dvc" / "moons.json").write_text("{")
    assert not data.up_to_date("moons")


def test_a_hundred_components_cost_milliseconds(checkout, monkeypatch):
    fake_dvc(checkout, monkeypatch)
    data.reproduce("moons", checkout / "log")
    many = "".join(LOCK.split("stages:\n")[1].replace("moons", f"other{number}") for number in range(100))
    (checkout / "dvc.lock").write_text(LOCK + many)
    began = time.process_time()
    assert data.up_to_date("moons")
    assert time.process_time() - began < 0.1


def test_the_version_is_the_components_own(checkout):
    (checkout / "dvc.lock").write_text(LOCK)
    assert data.version("moons").hash == "aaaa.dir"
    assert data.version("moons_big").hash == "bbbb.dir"
    with pytest.raises(DataError, match=r"no data/suns/prepared"):
        data.version("suns")


def test_the_list_of_components_keeps_its_comments(checkout):
    path = checkout / "params.yaml"
    path.write_text("# Why this is here.\ncomponents:\n  - gone\n  - suns  # bright\n\nother: 1  # kept\n")
    assert data.register_components()
    assert path.read_text() == "# Why this is here.\ncomponents:\n  - moons\n  - suns  # bright\n\nother: 1  # kept\n"
    assert not data.register_components()


def test_the_list_of_components_is_made_where_there_is_none(checkout):
    assert data.register_components()
    assert yaml.safe_load((checkout / "params.yaml").read_text()) == {"components": ["moons", "suns"]}
    shutil.rmtree(checkout / "components" / "suns")
    assert data.register_components()
    assert yaml.safe_load((checkout / "params.yaml").read_text()) == {"components": ["moons"]}


def test_a_stage_gets_its_folders(checkout):
    data.run_stage("moons", "prepare", sys.executable)
    assert (checkout / "data" / "moons" / "prepared" / "file").read_text() == "preparelimit: null\n"
    (checkout / "components" / "moons" / "params.yaml").write_text("break: extract\n")
    with pytest.raises(DataError, match="stage extract of moons ended with exit code 1"):
        data.run_stage("moons", "extract", sys.executable)


def test_the_cache_follows_the_state_folder(checkout, monkeypatch, tmp_path):
    fake_dvc(checkout, monkeypatch)
    local = checkout / ".dvc" / "config.local"
    monkeypatch.setenv("TORCHRELAY_STATE", str(tmp_path / "elsewhere"))
    config.settings.cache_clear()
    data.reproduce("moons", checkout / "log")
    assert f"dir = {tmp_path / 'elsewhere' / 'dvc' / 'cache'}" in local.read_text()
    monkeypatch.delenv("TORCHRELAY_STATE")
    config.settings.cache_clear()
    data.reproduce("moons", checkout / "log")
    assert not local.exists()
    local.write_text("[cache]\n    dir = mine\n")
    data.reproduce("moons", checkout / "log")
    assert local.read_text() == "[cache]\n    dir = mine\n"


def test_stages_find_this_python(checkout):
    path = data._environment()["PATH"].split(os.pathsep)
    assert path[0] == str(Path(sys.executable).parent)


def test_a_bucket_is_the_default_remote_and_the_emulator_is_told(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = checkout / ".dvc" / "config.local"
    monkeypatch.delenv("TORCHRELAY_STATE", raising=False)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("TORCHRELAY_BUCKET", "gs://models/relay")
    config.settings.cache_clear()
    data.place_remote()
    assert "[core]\n    remote = bucket\n['remote \"bucket\"']\n    url = gs://models/relay/dvc\n" in local.read_text()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9023")
    data.place_remote()
    assert "    endpointurl = http://127.0.0.1:9023\n    allow_anonymous_login = true\n" in local.read_text()
    monkeypatch.delenv("TORCHRELAY_BUCKET")
    config.settings.cache_clear()
    data.place_remote()
    assert not local.exists()
    local.write_text("['remote \"mine\"']\n    url = /mine\n")
    data.place_remote()
    assert "mine" in local.read_text()
