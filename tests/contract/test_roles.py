"""What must agree in Ansible's rooms: defaults and specs, inventories and specs, roles and their shape."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())
INVENTORIES = sorted(path for path in (ROOT / "inventory").iterdir() if path.is_dir())
# What an inventory may set besides roles' inputs: Ansible's own, and what it shares between its own files.
SHARED = ("ansible_", "site_")
SHAPE = (
    "README.md",
    "defaults/main.yml",
    "meta/argument_specs.yml",
    "meta/main.yml",
    "tasks/main.yml",
    "tasks/preflight.yml",
    "tasks/configure.yml",
)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


def options(role: str) -> dict[str, Any]:
    return dict(read(ROOT / "roles" / role / "meta" / "argument_specs.yml")["argument_specs"]["main"]["options"])


def inventory_variables(inventory: Path) -> dict[str, list[Path]]:
    """Every variable that an inventory sets, with the files it is set in."""
    found: dict[str, list[Path]] = {}

    def walk(group: dict[str, Any], origin: Path) -> None:
        for scope in (group, *(group.get("hosts") or {}).values()):
            for name in (scope or {}).get("vars") or {}:
                found.setdefault(name, []).append(origin)
        for variables in (group.get("hosts") or {}).values():
            for name in variables or {}:
                found.setdefault(name, []).append(origin)
        for child in (group.get("children") or {}).values():
            walk(child or {}, origin)

    for path in sorted(inventory.rglob("*.yml")):
        content = read(path)
        if {"group_vars", "host_vars"} & set(path.relative_to(inventory).parts):
            for name in content:
                found.setdefault(name, []).append(path)
        elif "plugin" in content:  # asks for its hosts; its settings are the plugin's own
            for name in content.get("compose", {}):
                found.setdefault(name, []).append(path)
        else:
            for group in content.values():
                walk(group or {}, path)
    return found


def misspelt(inventory: Path) -> list[str]:
    """Variables of an inventory that no role takes: Ansible itself passes over them in silence."""
    known = {name for role in ROLES for name in options(role)}
    return [
        f"{name} in {', '.join(path.name for path in paths)}"
        for name, paths in sorted(inventory_variables(inventory).items())
        if name not in known and not name.startswith(SHARED)
    ]


@pytest.mark.parametrize("role", ROLES)
def test_a_role_has_the_one_shape(role: str) -> None:
    assert [name for name in SHAPE if not (ROOT / "roles" / role / name).is_file()] == []


@pytest.mark.parametrize("role", ROLES)
def test_defaults_are_those_of_the_specs(role: str) -> None:
    specified = {name: option["default"] for name, option in options(role).items() if "default" in option}
    assert read(ROOT / "roles" / role / "defaults" / "main.yml") == specified, (
        f"make roles/{role}/defaults/main.yml and roles/{role}/meta/argument_specs.yml agree"
    )


@pytest.mark.parametrize("role", ROLES)
def test_an_input_is_required_or_has_a_default_and_says_what_it_is(role: str) -> None:
    for name, option in options(role).items():
        assert name.startswith(f"{role}_"), name
        assert option.get("required", False) != ("default" in option), name
        assert option["description"].strip(), name


@pytest.mark.parametrize("role", ROLES)
def test_a_role_uses_every_input_and_no_other_variable(role: str) -> None:
    files = [path for path in (ROOT / "roles" / role).rglob("*") if path.suffix in {".yml", ".j2"} and path.is_file()]
    text = "\n".join(path.read_text() for path in files if "meta" not in path.parts)
    used = set(re.findall(rf"(?<![\w.])(?<!name: ){role}_\w+", text))
    assert used - set(options(role)) == set(), "an input that the specs do not know"
    assert set(options(role)) - used == set(), "an input that nothing reads"
    others = {other for other in ROLES if other != role and re.search(rf"(?<![\w.]){other}_\w+", text)}
    assert others == set(), "inputs of another role"


@pytest.mark.parametrize("role", ROLES)
def test_a_role_names_no_group(role: str) -> None:
    for path in (ROOT / "roles" / role).rglob("*.yml"):
        assert not re.search(r"\bgroups\b|\bgroup_names\b", path.read_text()), path


@pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda path: path.name)
def test_inventories_set_only_what_roles_take(inventory: Path) -> None:
    assert misspelt(inventory) == []


@pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda path: path.name)
def test_variable_files_are_named_after_the_role_they_steer(inventory: Path) -> None:
    for name, paths in inventory_variables(inventory).items():
        for path in paths:
            if {"group_vars", "host_vars"} & set(path.relative_to(inventory).parts):
                assert name.startswith(f"{path.stem}_"), f"{name} in {path.relative_to(ROOT)}"


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("group_vars/dev/serving.yml", "serving_prot: 1"),
        ("hosts.yml", "dev: {hosts: {dev-1: {serving_prot: 1}}}"),
        ("nodes.gcp.yml", "{plugin: google.cloud.gcp_compute, compose: {serving_prot: name}}"),
    ],
)
def test_a_misspelt_variable_is_caught(tmp_path: Path, file: str, line: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(line + "\n")
    assert misspelt(tmp_path) == [f"serving_prot in {Path(file).name}"]


def test_playbooks_are_verb_noun_lists_of_roles() -> None:
    for path in sorted((ROOT / "playbooks").glob("*.yml")):
        assert re.fullmatch(r"[a-z]+-[a-z]+", path.stem), path
        for play in yaml.safe_load(path.read_text()):
            tasks = play.get("tasks", [])
            assert play["gather_facts"] is False
            assert bool(play.get("roles")) != bool(tasks)
            assert all("ansible.builtin.import_role" in task for task in tasks), path
