"""One driver that starts five empty steps, each a nested run of its own."""

import mlflow

with mlflow.start_run():
    for name in ("a", "b", "c", "d", "e"):
        mlflow.projects.run(".", entry_point="step", parameters={"name": name}, env_manager="local")
