"""Step 2: the same network and recipe as the digits component, tracked by MLflow on its SQLite file."""

import json
from pathlib import Path

import mlflow
import mlflow.pytorch
import numpy as np
import torch
from torch import nn

EPOCHS, BATCH, RATE, HIDDEN = 2, 32, 0.005, 64


def load(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as numbers from 0 to 1, and labels."""
    with np.load(f"work/prepared/{name}.npz") as arrays:
        return torch.from_numpy(arrays["instances"]).float() / 16, torch.from_numpy(arrays["labels"]).long()


images, labels = load("train")
val_images, val_labels = load("val")
test_images, test_labels = load("test")
torch.manual_seed(1)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
mlflow.set_experiment("digits")
with mlflow.start_run() as run:
    mlflow.log_params({"epochs": EPOCHS, "batch_size": BATCH, "learning_rate": RATE, "hidden": HIDDEN})
    for epoch in range(1, EPOCHS + 1):
        losses = []
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        accuracy = (model(val_images).argmax(1) == val_labels).float().mean().item()
        mlflow.log_metrics({"train_loss": sum(losses) / len(losses), "val_accuracy": accuracy}, step=epoch)
        print(f"epoch {epoch}/{EPOCHS}: validation accuracy {accuracy:.4f}")
    test_accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    mlflow.log_metric("accuracy", test_accuracy)
    torch.save(model.state_dict(), "work/model.pt")
    requirements = [f"mlflow=={mlflow.__version__}", f"torch=={torch.__version__}", f"numpy=={np.__version__}"]
    # Requirements given and a signature left out: both favour this side, since MLflow would infer them for seconds.
    info = mlflow.pytorch.log_model(model, name="model", pip_requirements=requirements, serialization_format="pickle")
Path("work/run.json").write_text(
    json.dumps({"run_id": run.info.run_id, "model_uri": info.model_uri, "accuracy": test_accuracy}), encoding="utf-8"
)
