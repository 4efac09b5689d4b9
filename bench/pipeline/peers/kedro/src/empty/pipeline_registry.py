"""Five nodes in a row that do nothing."""

from itertools import pairwise

from kedro.pipeline import Pipeline, node


def nothing(*_given: bool) -> bool:
    """Pass a value on."""
    return True


def register_pipelines() -> dict[str, Pipeline]:
    """The one pipeline."""
    steps = ["a", "b", "c", "d", "e"]
    first = node(nothing, None, "a", name="a")
    others = [node(nothing, before, after, name=after) for before, after in pairwise(steps)]
    return {"__default__": Pipeline([first, *others])}
