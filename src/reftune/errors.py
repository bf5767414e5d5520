"""Errors in a user's input: the message states the value, its place, and what was expected."""


class ReftuneError(Exception):
    """Base of every error that the user can fix. The command line prints it in one line and exits
    with status 2."""


class RecipeError(ReftuneError):
    """A recipe that cannot be run because of an unknown key, a wrong type or a value out of
    range."""


class DataError(ReftuneError):
    """Data that cannot be read or trained on. The message starts with `file:line` if there
    is one."""


class ModelError(ReftuneError):
    """A model or tokenizer that cannot be loaded or used."""


class CheckpointError(ReftuneError):
    """A run folder or checkpoint that is damaged, foreign or unwritable."""


class RewardError(ReftuneError):
    """A reward function that raised or did not return a reward, with the sample that caused it."""


class EngineError(ReftuneError):
    """An engine that failed to fulfil a request."""


class ProcessError(ReftuneError):
    """One of several processes that train together ended without an error message."""


class NonFiniteError(ReftuneError):
    """A loss or gradient that is not finite. The weights are unchanged."""
