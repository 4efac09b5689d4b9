"""Ends its process where it serves."""

import os
from pathlib import Path

from good import Predictor as Good
from late import SERVED


class Predictor(Good):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if SERVED:
            os._exit(3)
