# The chain from a data version to a deployed model. `make deploy-dev` runs it; by hand, after `make up`:
#   .venv/bin/snakemake --cores all deploy_dev --config component=fashion_mnist
# Config keys: component (which one; settings come from config/defaults.yaml under config/local.yaml).
import sys
from pathlib import Path

from torchrelay import archive, components, data
from torchrelay.config import component_names, settings

# The rules call the Python that runs Snakemake, whatever else is on the PATH.
shell.prefix(f'export PATH="{Path(sys.executable).parent}:$PATH"; ')

STATE = str(settings().state)
COMPONENT = config.get("component", settings().component)


wildcard_constraints:
    component="[a-z][a-z0-9_]*",


include: "rules/quick.smk"
include: "rules/data.smk"
include: "rules/train.smk"
include: "rules/gate.smk"
include: "rules/register.smk"
include: "rules/package.smk"
include: "rules/deploy.smk"


localrules:
    deploy_dev,


# All that the legs leave, not only the last file: Snakemake does not make a missing one anew for the sake of a later
# one that is there, and a leg that failed leaves none.
rule deploy_dev:
    default_target: True
    input:
        expand(
            [
                *rules.describe_data.output,
                *rules.train_model.output,
                *rules.gate_model.output,
                *rules.register_model.output,
                *rules.package_archive.output,
                *rules.prove_archive.output,
                *rules.deploy_model.output,
            ],
            component=COMPONENT,
        ),
