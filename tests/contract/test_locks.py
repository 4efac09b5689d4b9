"""Locks: every pin hashed, no place named, in step with what is asked for and with what the code imports."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT
from torchrelay.components import conda_environment

PROJECT = ("requirements/run.lock", "requirements/dev.lock")
LOCKS = [
    *PROJECT,
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("components/*/requirements.*.lock"))),
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("src/torchrelay/scaffold/template/*.lock"))),
]
PACKAGE_LOCK = ROOT / "requirements" / "package-lock.json"
# A module that is not called like the package that brings it.
PACKAGES = {
    **{"yaml": "pyyaml", "model_signing": "model-signing", "ruamel": "ruamel-yaml", "PIL": "pillow"},
    "google": "google-cloud-storage",  # with google.auth and google.api_core, which it asks for itself
}
# Imported where a component's environment runs, not in .venv.
COMPONENTS_OWN = {"torch", "safetensors", "ts", "mlflow"}
INSIDE_THE_ENGINE = {"handler.py", "prove.py"}


def _pins(lock: str) -> dict[str, Requirement]:
    """Package → its pin, for every package of a lock that this Python would install."""
    lines = re.findall(r"^([A-Za-z0-9].*?) *\\?$", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE)
    pins = [Requirement(line) for line in lines]
    return {canonicalize_name(pin.name): pin for pin in pins if not pin.marker or pin.marker.evaluate()}


def _asked(source: str) -> list[Requirement]:
    lines = (ROOT / source).read_text(encoding="utf-8").splitlines()
    bare = (line.partition("#")[0].strip() for line in lines)
    return [Requirement(line) for line in bare if line and not line.startswith("-")]


def _imported(files: list[Path], own: set[str]) -> set[str]:
    """Packages, by the name that an index has for them, that these files import from outside."""
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return {canonicalize_name(PACKAGES.get(name, name)) for name in found - own - set(sys.stdlib_module_names)}


def _asked_for(*sources: str) -> set[str]:
    return {canonicalize_name(one.name) for source in sources for one in _asked(source)}


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_hashes_and_names_no_place(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=\S)", text.strip())
    assert len(blocks) > 20
    for block in blocks:
        assert re.match(
            r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[^\s+]+( ;[^\\]*)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\\n)?)+$", block
        )


@pytest.mark.parametrize("name", ["run", "dev"])
def test_a_lock_is_in_step_with_what_is_asked_for(name: str) -> None:
    pins = _pins(f"requirements/{name}.lock")
    for asked in _asked(f"requirements/{name}.in"):
        pin = pins.get(canonicalize_name(asked.name))
        assert pin is not None, f"{asked} is not in {name}.lock: make lock"
        assert asked.specifier.contains(str(pin.specifier).removeprefix("==")), f"{pin} is not {asked}: make lock"


def test_the_tools_for_tests_move_no_pin() -> None:
    run, dev = _pins(PROJECT[0]), _pins(PROJECT[1])
    assert {name: str(pin.specifier) for name, pin in run.items()}.items() <= {
        name: str(pin.specifier) for name, pin in dev.items()
    }.items()


@pytest.mark.parametrize("lock", PROJECT)
def test_no_model_runs_in_the_packages_own_environment(lock: str) -> None:
    assert not {"torch", "torchserve"} & {*_pins(lock)}


def test_what_the_package_imports_is_asked_for_by_name() -> None:
    files = [path for path in (ROOT / "src").rglob("*.py") if "template" not in path.parts]
    files = [path for path in files if path.name not in INSIDE_THE_ENGINE]
    assert not _imported(files, {"torchrelay"}) - _asked_for("requirements/run.in")


def test_what_the_tests_import_is_asked_for_by_name() -> None:
    corpora = {"components", "bad_models"}  # run in a component's environment, or meant to fail there
    files = [path for path in (ROOT / "tests").rglob("*.py") if not corpora & {*path.parts}]
    own = {"torchrelay", "tests", *(path.stem for path in files), *(path.parent.name for path in files)}
    own |= {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()} | {"handler", "model", *COMPONENTS_OWN}
    assert not _imported(files, own) - _asked_for("requirements/run.in", "requirements/dev.in")


def test_node_packages_are_pinned_by_content_and_name_no_place() -> None:
    lock = json.loads(PACKAGE_LOCK.read_text(encoding="utf-8"))
    asked = json.loads((PACKAGE_LOCK.parent / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    assert lock["packages"][""]["devDependencies"] == asked
    assert all(re.fullmatch(r"[\d.]+", version) for version in asked.values())
    installed = [package for path, package in lock["packages"].items() if path]
    assert all(package["integrity"].startswith("sha512-") and "resolved" not in package for package in installed)


def test_the_installer_parses_on_any_python_3_that_somebody_may_have() -> None:
    ast.parse((ROOT / "requirements" / "install").read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize("component", [path.parent for path in sorted(ROOT.glob("components/*/component.yaml"))])
def test_condas_file_holds_the_pins_of_the_lock(component: Path) -> None:
    text = (component / "conda.yaml").read_text()
    assert text == conda_environment(component), f"run: torchrelay export-conda --component {component.name}"
    python, _, listed = yaml.safe_load(text)["dependencies"]
    assert python == "python=3.11"
    exported = [Requirement(line) for line in listed["pip"]]
    assert {canonicalize_name(one.name): one for one in exported if not one.marker or one.marker.evaluate()} == {
        **_pins(str((component / "requirements.cpu.lock").relative_to(ROOT))),
        **_pins(str((component / "requirements.torch").relative_to(ROOT))),
    }
