"""The one exception tree. Every error says what was found, what was expected and what to type next."""


class TorchrelayError(Exception):
    """Base of all errors a user can meet.

    `found`, `expected` and `next_command` are the three parts that the command line prints.
    `exit_code` is what the process ends with.
    """

    exit_code = 1

    def __init__(self, found: str, expected: str, next_command: str) -> None:
        super().__init__(found)
        self.found = found
        self.expected = expected
        self.next_command = next_command

    def __str__(self) -> str:
        return f"{self.found}\n  expected: {self.expected}\n  next:     {self.next_command}"


class ConfigError(TorchrelayError):
    """A configuration file, a component or an inventory says something that cannot be."""


class DataError(TorchrelayError):
    """A dataset is missing, broken or breaks its own rules."""


class TrackingError(TorchrelayError):
    """The tracking server did not answer, or refused."""


class StorageError(TorchrelayError):
    """A bucket, or the folder of the backups, cannot be reached or does not hold what it should."""


class ArchiveError(TorchrelayError):
    """An archive is not what its manifest or its signature says."""


class BrokenOffError(ArchiveError):
    """An archive's run was ended from outside, or did not start: that says nothing of the archive."""


class RefusedError(TorchrelayError):
    """A version may not go where somebody asked it to go. Nothing was changed."""

    exit_code = 3


class ServingError(TorchrelayError):
    """An engine or the gateway did not come up, did not load, or answered wrongly."""


class UntrustedError(TorchrelayError):
    """A machine is not, or cannot be shown to be, the one that it was."""


class ProvisionError(TorchrelayError):
    """Google refused, failed, or did not answer; or what stands there is not what was asked for."""


class BusyError(TorchrelayError):
    """Somebody else holds the lock, or the port, that this step needs."""

    exit_code = 4
