"""Looks for better hyper-parameters: `mlflow run . -e search`. Copy what it finds into component.yaml."""

import argparse
from pathlib import Path

import mlflow
import optuna
import torch

from train import Part, Recipe, fit, read_part


def main() -> None:
    """Try recipes one after the other, each as a child run, and name the best one. The test set plays no part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, val = (read_part(given.data / f"{name}.npz", device) for name in ("train", "val"))
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=given.seed))
    with mlflow.start_run():
        study.optimize(
            lambda trial: attempt(trial, given.epochs, train, val), n_trials=given.trials, timeout=given.seconds
        )
        mlflow.log_params({f"best_{name}": value for name, value in study.best_params.items()})
        mlflow.log_metric("val_accuracy", study.best_value)
    print(f"search: validation accuracy {study.best_value:.4f} with {study.best_params}")


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
