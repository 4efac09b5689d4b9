"""What the documents say exists does exist: tests, commands, files, and decisions in an unbroken row."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("components/*/README.md")])
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
SECTIONS = ["Context", "Options", "Decision", "Consequences", "Confirmed by"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _code(text: str) -> list[str]:
    """Everything set as code: spans, and the lines of blocks."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"`([^`]+)`", rest), *"\n".join(blocks).splitlines()]


def _missing(named: str) -> bool:
    """Whether `tests/…py::name` names no test."""
    path, _, name = named.partition("::")
    file = ROOT / path
    return not file.is_file() or not re.search(rf"^ *(async )?def {re.escape(name)}\(", file.read_text(), re.MULTILINE)


def test_decisions_are_numbered_without_a_gap() -> None:
    assert [path.name[:5] for path in DECISIONS] == [f"{number:04}-" for number in range(1, len(DECISIONS) + 1)]


@pytest.mark.parametrize("path", DECISIONS, ids=_name)
def test_a_decision_has_its_number_and_every_section(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# {path.name[:4]} ")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("path", DECISIONS, ids=_name)
def test_a_decision_is_confirmed_by_tests_that_exist(path: Path) -> None:
    confirmed = path.read_text(encoding="utf-8").partition("## Confirmed by")[2]
    named = re.findall(r"^- `(tests/\S+::\w+)`$", confirmed, re.MULTILINE)
    assert named
    assert not [test for test in named if _missing(test)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_a_test_that_a_document_names_exists(path: Path) -> None:
    named = re.findall(r"\btests/[\w/]+\.py::\w+", path.read_text(encoding="utf-8"))
    assert not [test for test in named if _missing(test)]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=_name)
def test_a_command_that_a_document_names_is_a_target(path: Path) -> None:
    lines = _code(path.read_text(encoding="utf-8"))
    named = {match[1] for line in lines if (match := re.match(r"(?:\$ )?make ([a-z][a-z-]*)", line.strip()))}
    assert not named - TARGETS


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_a_link_leads_to_a_file(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (path.parent / link).exists()]


def test_every_row_and_step_of_the_brief_is_traced() -> None:
    text = (ROOT / "docs" / "traceability.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[1]) for row in rows] == [*range(1, 12), *range(1, 8)]
    for row in rows:
        done = row[-3].strip() and row[-2].strip()
        assert done or "Not yet" in "|".join(row), f"row {row[1]} names neither a command and a test nor says Not yet"


def test_the_readme_is_there() -> None:
    assert (ROOT / "README.md").is_file()


def test_developers_are_told_all_that_ci_installs() -> None:
    packages = re.findall(
        r"([\w-]+)=\w+", re.findall(r"^for pair in (.*); do$", (ROOT / ".ci/run").read_text(), re.M)[0]
    )
    told = (ROOT / "DEVELOPERS.md").read_text(encoding="utf-8")
    assert packages
    assert not [package for package in packages if f"`{package}`" not in told]


def test_the_tests_that_a_page_shows_as_passed_are_as_many_as_their_dots() -> None:
    page = (ROOT / "docs" / "how-to" / "add-a-component.md").read_text(encoding="utf-8")
    [(dots, passed)] = re.findall(r"^(\.+) +\[100%\]\n(\d+) passed", page, re.MULTILINE)
    assert len(dots) == int(passed)
