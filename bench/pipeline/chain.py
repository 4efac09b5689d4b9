"""What `deploy-dev` does up to the signed and proven archive: the data stages by DVC, then the legs by Snakemake.

Run by the checkout's own Python, in the checkout.
"""

import sys
from pathlib import Path

from torchrelay import data
from torchrelay.cli.deploy import snakemake_command, snakemake_environment
from torchrelay.console import run_logged

COMPONENT = sys.argv[1]


def prepare() -> None:
    """The data, while Snakemake imports itself."""
    if not data.up_to_date(COMPONENT):
        data.reproduce(COMPONENT, Path("logs/prepare_data") / f"{COMPONENT}.log")


command = snakemake_command(COMPONENT, f"results/{COMPONENT}/proof.json", "--quiet", "all")
sys.exit(run_logged(command, Path("logs/chain.log"), environment=snakemake_environment(), meanwhile=prepare))
