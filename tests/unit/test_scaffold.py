"""A new component: whole or not there, valid as it stands, and sharing the environment of those with its lock."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import copier
import pytest

from torchrelay import components, scaffold
from torchrelay.config import component, component_names, settings
from torchrelay.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "src" / "torchrelay" / "scaffold" / "template"
LOCKS = ("requirements.cpu.lock", "requirements.cuda.lock")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "Snakefile").touch()
    (tmp_path / "components").mkdir()
    shutil.copytree(ROOT / "config", tmp_path / "config", ignore=shutil.ignore_patterns("local.yaml"))
    for name in ("CONFIG", "STATE", "VARIANT"):
        monkeypatch.delenv(f"TORCHRELAY_{name}", raising=False)
    monkeypatch.setenv("TORCHRELAY_ROOT", str(tmp_path))
    settings.cache_clear()
    yield tmp_path
    settings.cache_clear()


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_new_folder_is_a_valid_component_with_all_of_the_contract(checkout: Path) -> None:
    folder = scaffold.create("tiny_moons")
    assert folder == checkout / "components" / "tiny_moons"
    assert component("tiny_moons").name == "tiny_moons"
    assert component_names() == ["tiny_moons"]
    contract = "MLproject README.md component.yaml data.py handler.py model.py params.yaml served.py train.py tests"
    for name in (*contract.split(), "requirements.in", "requirements.torch", *LOCKS):
        assert (folder / name).exists(), name


def test_every_file_of_the_template_arrives_and_nothing_is_left_unrendered(checkout: Path) -> None:
    folder = scaffold.create("tiny_moons")
    expected = {name.removesuffix(".jinja") for name in below(TEMPLATE) if "__pycache__" not in name} - {"copier.yml"}
    assert set(below(folder)) == expected | {"conda.yaml"}
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.endswith(".lock"):
            assert "{{" not in path.read_text(), path
    assert "name: tiny_moons" in (folder / "MLproject").read_text()
    assert (folder / "README.md").read_text().startswith("# tiny_moons\n")


def test_training_parameters_and_the_recipe_are_those_of_the_mlproject(checkout: Path) -> None:
    folder = scaffold.create("tiny_moons")
    main = (folder / "MLproject").read_text().partition("search:")[0]
    recipe = (folder / "train.py").read_text()
    for name, value in component("tiny_moons").training.parameters.items():
        assert f"{name}: {{type: float, default: {value}}}" in main
        assert re.search(rf"^    {name}: \w+ = {value}$", recipe, re.M), name


@pytest.mark.parametrize(
    "name", ["", "Moons", "1moons", "two-moons", "two moons", "../moons", "a/b", "moons\n", "a" * 64]
)
def test_a_name_that_cannot_be_one_is_refused_and_nothing_is_written(checkout: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        scaffold.create(name)
    assert below(checkout / "components") == []


def test_an_existing_folder_is_left_as_it_is(checkout: Path) -> None:
    taken = checkout / "components" / "moons"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        scaffold.create("moons")
    assert below(checkout / "components") == ["moons", "moons/notes.txt"]


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_rendering_leaves_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    whole = copier.run_copy

    def half(*words: object, **more: object) -> None:
        whole(*words, **more)  # type: ignore[arg-type]
        raise failure

    monkeypatch.setattr(copier, "run_copy", half)
    with pytest.raises(type(failure)):
        scaffold.create("moons")
    assert below(checkout / "components") == []


def test_a_rendering_that_was_killed_is_nobodys_component_and_in_nobodys_way(checkout: Path) -> None:
    shutil.copytree(TEMPLATE, checkout / "components" / ".new-killed" / "moons")
    (checkout / "components" / ".new-killed" / "moons" / "component.yaml").touch()
    assert component_names() == []
    scaffold.create("moons")
    assert component_names() == ["moons"]


def names(requirements: Path) -> set[str]:
    found = re.findall(r"^([A-Za-z0-9._-]+)(?:\[\w+\])?", requirements.read_text(), re.M)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in found}


@pytest.mark.parametrize("lock", LOCKS)
def test_the_templates_locks_pin_all_that_it_requires(lock: str) -> None:
    missing = names(TEMPLATE / "requirements.in") - names(TEMPLATE / lock)
    assert not missing, f"{lock} lacks {missing}: make lock"


def wanted(requirements: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in requirements.read_text().splitlines())
    return sorted(filter(None, lines))


def test_components_that_require_the_same_share_one_environment(checkout: Path) -> None:
    """Then nobody waits for a second environment: the locks must be the same bytes, not merely as good."""
    scaffold.create("moons")
    twins = [
        folder.parent
        for folder in (ROOT / "components").glob("*/requirements.in")
        if wanted(folder) == wanted(TEMPLATE / "requirements.in")
    ]
    for twin in twins:
        shutil.copytree(twin, checkout / "components" / twin.name, ignore=shutil.ignore_patterns("__pycache__"))
        told = f"{twin.name} and the template require the same under different locks: make lock"
        assert components.environment_name(twin.name) == components.environment_name("moons"), told
        assert (twin / LOCKS[1]).read_bytes() == (TEMPLATE / LOCKS[1]).read_bytes(), told


def test_the_template_is_part_of_the_package() -> None:
    import tomllib

    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["torchrelay"]
    package = TEMPLATE.parents[1]
    packed = {path for pattern in data for path in package.glob(pattern)}
    assert not {path for path in TEMPLATE.rglob("*") if path.is_file()} - packed
