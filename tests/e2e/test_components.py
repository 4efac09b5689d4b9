"""Every component's own tests, run as its README says: in its own environment, from its own folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.real]

COMPONENTS = sorted(path.parent.name for path in ROOT.glob("components/*/component.yaml"))


def _python(component: str) -> str:
    """The interpreter of the component's environment, which is built if need be."""
    command = [sys.executable, "-m", "torchrelay", "build-environment", "--component", component]
    subprocess.run([*command, "--log", os.devnull], cwd=ROOT, check=True)
    from torchrelay import components

    return components.environment(component).python


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_components_own_tests_pass(component: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [_python(component), "-m", "pytest", "-q", f"--basetemp={tmp_path / 'base'}"],
        cwd=ROOT / "components" / component,
        env={key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TORCHRELAY_"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
