"""Which files of a component make a leg run again when they change."""

from pathlib import Path

import pytest

from torchrelay import components

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
    "requirements.in": "",
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
def component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "Snakefile").touch()
    folder = tmp_path / "components" / "moons"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setenv("TORCHRELAY_ROOT", str(tmp_path))
    return folder


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
