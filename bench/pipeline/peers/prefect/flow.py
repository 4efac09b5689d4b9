"""Five empty steps."""

from prefect import flow, task


@task
def following(number: int) -> int:
    """The next number."""
    return number + 1


@flow
def empty() -> None:
    """Five tasks in a row."""
    number = 0
    for _ in range(5):
        number = following(number)


if __name__ == "__main__":
    empty()
