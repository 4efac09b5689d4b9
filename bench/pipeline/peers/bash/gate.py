"""Step 3: may this run be registered? Its metric is read from MLflow, where training logged it."""

import json
import sys
from pathlib import Path

import mlflow

FLOOR = 0.85

run = json.loads(Path("work/run.json").read_text(encoding="utf-8"))
accuracy = mlflow.get_run(run["run_id"]).data.metrics["accuracy"]
Path("work/verdict.json").write_text(json.dumps({"accuracy": accuracy, "pass": accuracy >= FLOOR}), encoding="utf-8")
if accuracy < FLOOR:
    sys.exit(f"accuracy {accuracy} is below {FLOOR}")
