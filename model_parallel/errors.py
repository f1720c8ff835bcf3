"""Every error that the engine raises on purpose.

EngineError
├── ConfigError        a setting, or a combination of settings, that can never work
├── CheckpointError    a file of weights that is missing, broken, or not what its configuration says
├── RequestError       one request cannot be served; its neighbours are not touched
└── GroupFailedError   the whole replica group is lost and must be rebuilt
"""


class EngineError(Exception):
    """Base of all errors that Packtrain's engine raises on purpose."""


class ConfigError(EngineError, ValueError):
    """A setting that can never work. The message names the field, its value and what is allowed."""


class CheckpointError(EngineError):
    """A checkpoint that cannot be loaded. The message names the file, and the tensor where there is one."""


class RequestError(EngineError):
    """One request cannot be served.

    `kind` is a stable label that metrics, logs and the API share: "invalid", "overloaded", "duplicate",
    "numerical_error", "constraint_error", "adapter_failed".
    """

    def __init__(self, message: str, *, kind: str = "invalid", retry_after_s: float | None = None) -> None:
        """`retry_after_s` is when to try again, where somebody can tell."""
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


class GroupFailedError(EngineError):
    """The replica group is lost: a rank died, hung or answered out of turn. Nothing more can be run on it."""
