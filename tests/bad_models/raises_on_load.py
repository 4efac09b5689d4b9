"""Raises when it is made."""

from pathlib import Path

from good import Predictor as Good


class Predictor(Good):
    def __init__(self, folder: Path) -> None:
        raise RuntimeError(f"there is nothing in {folder.name} for me")
