"""Cannot be made where it serves: there it lacks something."""

from pathlib import Path

from good import Predictor as Good
from late import SERVED


class Predictor(Good):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if SERVED:
            raise RuntimeError("what I need is not on this node")
