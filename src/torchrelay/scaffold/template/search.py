"""Search for hyper-parameters within a budget of trials and seconds: one nested MLflow run per trial.

The best one's parameters are in best.json and, as the `-P` flags of a full training, in the line that names the best.
"""

import argparse
import json
import sys
from pathlib import Path

import mlflow
import optuna
import torch

from train import DivergedError, Part, Recipe, fit, read_part


def main() -> None:
    """Run the search inside the run that `mlflow run` opened, or a new one. The test set plays no part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=10, help="stop after so many trials")
    parser.add_argument("--seconds", type=float, default=300, help="start no trial after so many seconds")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each trial")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val = (read_part(given.data / f"{name}.npz", device) for name in ("train", "val"))
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=given.seed))
    with mlflow.start_run():
        study.optimize(
            lambda trial: attempt(trial, given.epochs, train, val),
            n_trials=given.trials,
            timeout=given.seconds,
            catch=DivergedError,
        )
        if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
            sys.exit(f"✗ none of {len(study.trials)} trials came to an end\n  expected: one\n  next:     more trials")
        mlflow.log_metrics({"best_val_accuracy": study.best_value, "trials": len(study.trials)})
        given.output.mkdir(parents=True, exist_ok=True)
        best = given.output / "best.json"
        best.write_text(json.dumps(study.best_params, indent=2) + "\n", encoding="utf-8")
        mlflow.log_artifact(str(best))
    flags = " ".join(f"-P {name}={value}" for name, value in study.best_params.items())
    print(f"best validation accuracy {study.best_value:.4f} of {len(study.trials)} trials: {flags}")


def attempt(trial: optuna.Trial, epochs: int, train: Part, val: Part) -> float:
    """Validation accuracy of one recipe."""
    chosen = {
        "hidden": trial.suggest_int("hidden", 4, 64, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True),
    }
    with mlflow.start_run(nested=True):
        mlflow.log_params(chosen)
        _, metrics = fit(Recipe(epochs=epochs, **chosen), train, val, lambda _epoch, _metrics: None)
        mlflow.log_metrics(metrics)
    return metrics["val_accuracy"]


if __name__ == "__main__":
    main()
