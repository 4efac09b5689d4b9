"""Where the legs of a component leave their hand-over files."""

from pathlib import Path

from torchrelay.config import root


def results(component: str) -> Path:
    """The component's folder under results/."""
    return root() / "results" / component


def prepared(component: str) -> Path:
    """What DVC's `prepare` stage leaves."""
    return root() / "data" / component / "prepared"
