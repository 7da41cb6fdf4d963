"""Errors a user can act on. Each message says what is wrong and what to change."""


class AxonnError(Exception):
    """Base of every error that the suite raises on purpose."""


class ConfigError(AxonnError):
    """A configuration that is misspelt, incomplete or contradicts itself."""


class MachineError(ConfigError):
    """A machine that nobody described, or whose file has a mistake."""


class GridError(ConfigError):
    """A process grid that does not fit the ranks, the batch or the model."""


class DataError(AxonnError):
    """Training data that cannot be read or is too short."""


class CheckpointError(AxonnError):
    """A checkpoint that cannot be written or read."""


class RecordError(AxonnError):
    """A record or span file whose schema is unknown or damaged."""


class TransportError(AxonnError):
    """A message between stages that cannot be sent or received."""


class DeadlockError(AxonnError):
    """A deadlock: every rank waits for another one. The message names who waits for what."""


class LaunchError(AxonnError):
    """Ranks that cannot be started (no MPI, a missing framework)."""


class RunFailed(AxonnError):
    """Ranks that started and did not finish. What they wrote is kept."""


class NotFiniteError(AxonnError, FloatingPointError):
    """A loss, gradient or weight that is infinite or NaN. `ranks`: the ranks that had it first."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks
