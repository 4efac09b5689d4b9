"""Five empty steps."""

import sys

from zenml import pipeline, step


@step
def first() -> int:
    """A number."""
    return 0


@step
def following(number: int) -> int:
    """The next number."""
    return number + 1


@pipeline
def empty() -> None:
    """Five steps in a row."""
    number = first()
    for _ in range(4):
        number = following(number)


if __name__ == "__main__":
    empty.with_options(enable_cache="fresh" not in sys.argv)()
