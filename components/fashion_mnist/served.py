"""The model as MLflow serves it (`mlflow models serve`), stored as this code and its weights, never as a pickle."""

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from handler import Predictor


class Served(PythonModel):
    """The same predictor that Torchrelay serves, behind MLflow's own scoring server."""

    def load_context(self, context: Any) -> None:
        """Load the weights that were logged with the model."""
        self.predictor = Predictor(Path(context.artifacts["weights"]).parent)

    # MLflow knows no type hint for an array (it warns that there is none); the signature has element type and shape.
    def predict(self, context: Any, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """One prediction for every image of (N, 28, 28)."""
        return self.predictor.predict(self.predictor.encode(np.asarray(model_input).tolist()))


set_model(Served())
