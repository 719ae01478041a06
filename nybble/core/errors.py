"""Everything nybble raises on purpose.

    NybbleError
    ├── ConfigError        a setting is nonsense or contradicts another      (names the field and the remedy)
    ├── ModelError         the checkpoint cannot be used                     (names the file, tensor or field)
    │   └── UnsupportedError   it is sound, but nybble does not do this kind
    ├── RequestError       this request cannot be served; others go on       (names the parameter and its range)
    ├── MemoryBudgetError  the memory settings leave too little              (needed, present, what to change)
    ├── MeasurementError   a benchmark got no sound answer              (says from whom, and what came instead)
    └── EngineDeadError    the engine has stopped; nothing more will come
        └── EngineClosedError  because it was told to

All but the last two are the user's to mend, and say how; so commands print them without a traceback.
"""


class NybbleError(Exception):
    """Root of every error that nybble raises on purpose."""


class ConfigError(NybbleError, ValueError):
    """A setting is out of range or contradicts another one."""


class ModelError(NybbleError):
    """A checkpoint is damaged, incomplete or does not match its own config."""


class UnsupportedError(ModelError):
    """A sound checkpoint of a kind that nybble does not run."""


class RequestError(NybbleError, ValueError):
    """A request that cannot be served as asked."""

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class MemoryBudgetError(NybbleError):
    """The memory settings leave less than the engine needs."""


class MeasurementError(NybbleError):
    """A server, an engine or a client did not do what a benchmark needs of it."""


class EngineDeadError(NybbleError):
    """The engine stopped and can take no more work."""


class EngineClosedError(EngineDeadError):
    """The engine was stopped on purpose."""
