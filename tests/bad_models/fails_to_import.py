"""Imports a package that its environment does not have."""

import a_package_that_nobody_installed  # type: ignore[import-not-found]  # noqa: F401
from good import Predictor

__all__ = ["Predictor"]
