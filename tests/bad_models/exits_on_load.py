"""Ends its process when it is made."""

import os
from pathlib import Path

from good import Predictor as Good


class Predictor(Good):
    def __init__(self, folder: Path) -> None:
        os._exit(3)
