"""Step 4: the run's model becomes a version of the registered model."""

import json
from pathlib import Path

import mlflow

run = json.loads(Path("work/run.json").read_text(encoding="utf-8"))
version = mlflow.register_model(run["model_uri"], "digits")
Path("work/registration.json").write_text(json.dumps({"version": version.version}), encoding="utf-8")
