"""Which files of a component make a leg run again when they change, and how its environment is come by."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from torchrelay import cli, components, config, console
from torchrelay.errors import ConfigError

FILES = {
    "MLproject": "",
    "README.md": "",
    "component.yaml": "",
    "conda.yaml": "",
    "conftest.py": "",
    "data.py": "import json\nfrom reading.idx import read\n\ndef main():\n    import rules\n",
    "handler.py": "",
    "labels.csv": "",
    "layers/__init__.py": "",
    "layers/data.py": "",
    "layers/deep/tests/block.py": "",
    "layers/weights.json": "",
    "layers/__pycache__/data.cpython-311.pyc": "",
    "model.py": "import layers\n",
    "params.yaml": "",
    "pytest.ini": "",
    "reading/idx.py": "from . import bits\n",
    "reading/bits.py": "",
    "requirements.cpu.lock": "",
    "requirements.cuda.lock": "",
    "requirements.in": "",
    "requirements.torch": "",
    "rules.py": "import texts\nimport data\n",
    "search.py": "",
    "tests/test_data.py": "",
    "texts.py": "",
    "train.py": "import model\n",
    "train-output/run.json": "",
    "mlruns/0/meta.yaml": "",
    ".pytest_cache/README.md": "",
    ".train.py.swp": "",
}


@pytest.fixture
def component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "Snakefile").touch()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "defaults.yaml").write_text("state: state\nkeys: keys\nport_base: 19000\n")
    folder = tmp_path / "components" / "moons"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setenv("TORCHRELAY_ROOT", str(tmp_path))
    for name in ("STATE", "CONFIG", "VARIANT"):
        monkeypatch.delenv(f"TORCHRELAY_{name}", raising=False)
    config.settings.cache_clear()
    yield folder
    config.settings.cache_clear()


def test_training_depends_on_every_file_that_it_may_read(component: Path) -> None:
    assert [str(path) for path in components.training_sources("moons")] == [
        f"components/moons/{name}"
        for name in (
            "MLproject",
            "handler.py",
            "labels.csv",
            "layers/__init__.py",
            "layers/data.py",
            "layers/deep/tests/block.py",
            "layers/weights.json",
            "model.py",
            "reading/bits.py",
            "reading/idx.py",
            "rules.py",
            "texts.py",
            "train.py",
        )
    ]


def test_the_data_depend_on_what_their_stages_import_and_on_files_beside_the_code(component: Path) -> None:
    assert [str(path.relative_to(component)) for path in components.data_sources("moons")] == [
        "data.py",
        "labels.csv",
        "layers/weights.json",
        "params.yaml",
        "reading/bits.py",
        "reading/idx.py",
        "rules.py",
        "texts.py",
    ]


def test_a_stage_that_is_not_python_yet_is_for_the_stage_to_complain_of(component: Path) -> None:
    (component / "data.py").write_text("def main(:\n")
    assert component / "data.py" in components.data_sources("moons")


def test_a_missing_environment_names_a_command_that_builds_it(component: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        components.environment("moons")
    make, *words = caught.value.next_command.split()
    done = subprocess.run([make, "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    called = done.stdout.replace("'", "").partition("torchrelay build-environment ")[2].split()
    verb = cli.verbs.get_command(None, "build-environment")  # type: ignore[arg-type]
    assert verb is not None
    required = {option for parameter in verb.params if parameter.required for option in parameter.opts}
    assert required | {"--component", "moons"} <= set(called)


PIP = """#!/bin/sh
head -c 3000000 /dev/zero > "$TMPDIR/torch.whl"
sleep 0.5
rm "$TMPDIR/torch.whl"
"""


def test_while_torch_installs_it_says_how_far_it_is(
    component: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python, pip = tmp_path / "environment" / "bin" / "python", tmp_path / "pip"
    python.parent.mkdir(parents=True)
    pip.write_text(PIP)
    pip.chmod(0o755)
    (component / "requirements.torch").write_text("torch==2.0\n")
    monkeypatch.setattr(sys, "executable", str(pip))
    monkeypatch.setattr(console, "_PULSE_S", 0.1)
    components.install_torch(python, component / "requirements.torch", tmp_path / "log")
    said = capsys.readouterr().err.splitlines()
    assert "  torch==2.0: 3 MB written, 0 s" in said
    assert len(said) < 8
    assert list(python.parents[1].iterdir()) == [python.parent]
