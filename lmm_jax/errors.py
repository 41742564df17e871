"""Errors that are meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence or two: what was given, what was expected, what to do. Command lines print it without a
    traceback and exit with status 2; Python callers may catch it as ``ValueError``.
    """


class DeviceError(UserError):
    """The device failed, not what it was asked: no question can be answered until the process starts again."""


class DeadlineError(UserError):
    """An answer took longer than it may."""

    def __init__(self) -> None:
        """Says so."""
        super().__init__("the answer took longer than it may: ask for less, or for more time")


class TryLaterError(UserError):
    """It was not the request's fault: the engine is about to stop, or has too little memory for all that run at once."""
