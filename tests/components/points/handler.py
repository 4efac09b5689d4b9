"""What the archive is loaded by."""

from good import Predictor

__all__ = ["Predictor"]
