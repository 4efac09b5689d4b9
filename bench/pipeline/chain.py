"""What `deploy-dev` does up to the signed and proven archive: the data stages by DVC, then the legs by Snakemake.

Run by the checkout's own Python, in the checkout. It becomes Snakemake, so that one process is what is timed.
"""

import os
import sys
from pathlib import Path

from torchrelay import data
from torchrelay.config import settings

COMPONENT = sys.argv[1]

if not data.up_to_date(COMPONENT):
    data.reproduce(COMPONENT, Path("logs/prepare_data") / f"{COMPONENT}.log")
command = [sys.executable, "-m", "snakemake", f"results/{COMPONENT}/proof.json", "--profile", "profiles/default"]
environment = {**os.environ, "XDG_CACHE_HOME": str(settings().state / "cache")}
os.execve(sys.executable, [*command, "--quiet", "all", "--config", f"component={COMPONENT}"], environment)
