"""Search for hyper-parameters within a budget of trials and seconds: one nested MLflow run per trial.

The best one's parameters are in best.json and, as the `-P` flags of a full training, in the line that names the best.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import mlflow
import optuna
import torch

from train import DivergedError, Part, Recipe, choose_device, fit, read_part, say


def main() -> None:
    """Run the search inside the run that `mlflow run` opened, or a new one."""
    given = read_arguments()
    device = choose_device()
    train, val = (read_part(given.data / f"{name}.npz", device) for name in ("train", "val"))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=given.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )
    with mlflow.start_run():
        study.optimize(
            lambda trial: try_one(trial, Recipe(epochs=given.epochs, seed=given.seed), train, val),
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
    say(f"best validation accuracy {study.best_value:.4f} of {len(study.trials)} trials: {flags}")


def read_arguments() -> argparse.Namespace:
    """The flags of the MLproject's `search` entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=12, help="stop after so many trials")
    parser.add_argument("--seconds", type=float, default=900, help="start no trial after so many seconds")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of each trial")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def try_one(trial: optuna.Trial, base: Recipe, train: Part, val: Part) -> float:
    """Validation accuracy of one trial; a hopeless one is pruned after an epoch."""
    recipe = replace(
        base,
        learning_rate=trial.suggest_float("learning_rate", 1e-3, 5e-2, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True),
        batch_size=trial.suggest_categorical("batch_size", [64, 128, 256]),
        dropout=trial.suggest_float("dropout", 0.0, 0.3),
        shift=trial.suggest_int("shift", 0, 2),
    )

    def report(epoch: int, metrics: dict[str, float]) -> None:
        mlflow.log_metrics(metrics, step=epoch, synchronous=False)
        trial.report(metrics["val_accuracy"], epoch)
        if epoch < recipe.epochs and trial.should_prune():
            raise optuna.TrialPruned

    say(f"trial {trial.number}: {trial.params}")
    with mlflow.start_run(run_name=f"trial-{trial.number}", nested=True):
        mlflow.log_params(asdict(recipe) | {"threads": torch.get_num_threads()})
        try:
            _, history = fit(recipe, train, val, report)
        except optuna.TrialPruned:
            # Left to Optuna from inside the run, it would mark the run as failed.
            mlflow.set_tag("pruned", "true")
            history = []
        mlflow.flush_async_logging()
    if not history:
        raise optuna.TrialPruned
    return history[-1]["val_accuracy"]


if __name__ == "__main__":
    main()
