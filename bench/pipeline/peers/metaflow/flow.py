"""Five empty steps."""

from metaflow import FlowSpec, step


class Empty(FlowSpec):
    """start, b, c, d, end."""

    @step
    def start(self) -> None:
        """Nothing."""
        self.next(self.b)

    @step
    def b(self) -> None:
        """Nothing."""
        self.next(self.c)

    @step
    def c(self) -> None:
        """Nothing."""
        self.next(self.d)

    @step
    def d(self) -> None:
        """Nothing."""
        self.next(self.end)

    @step
    def end(self) -> None:
        """Nothing."""


if __name__ == "__main__":
    Empty()
