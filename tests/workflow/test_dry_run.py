"""Every shipped profile plans every component on a fresh checkout: the DAG is read without network or servers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted(path.name for path in (ROOT / "profiles").iterdir())
COMPONENTS = sorted(path.parent.name for path in (ROOT / "components").glob("*/component.yaml"))
CHAIN = ("describe_data", "build_environment", "train_model", "gate_model", "register_model", "package_archive")


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_fresh_checkout_plans_the_whole_chain(profile: str, component: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "snakemake", "--dry-run", "deploy_dev", "--profile", f"profiles/{profile}"]
    done = subprocess.run(
        [*command, "--config", f"component={component}", "--forceall", "--nolock"],
        cwd=ROOT,
        env={**os.environ, "TORCHRELAY_STATE": str(tmp_path / "state"), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for rule in (*CHAIN, "prove_archive", "deploy_model"):
        assert rule in done.stdout, f"{rule} is not planned"
    assert not (tmp_path / "state").exists()
