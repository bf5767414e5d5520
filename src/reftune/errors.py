"""Errors that a user can fix. The message states the value, where it was found, and what was
expected."""


class ReftuneError(Exception):
    """Base of every error that the user can fix. The command line prints it on one line and exits
    with status 2."""


class RecipeError(ReftuneError):
    """A recipe that cannot be run because of an unknown key, a wrong type or a value out of
    range."""


class DataError(ReftuneError):
    """Data that cannot be read or trained on. The message starts with `file:line` if these are
    known."""


class ModelError(ReftuneError):
    """A model or tokenizer that cannot be loaded or used."""


class CheckpointError(ReftuneError):
    """A run folder or checkpoint that is damaged, unwritable or not made by reftune."""


class RewardError(ReftuneError):
    """A reward function that raised an error or did not return a reward. The message names the
    sample or batch."""


class EngineError(ReftuneError):
    """An engine that failed to fulfil a request."""


class ProcessError(ReftuneError):
    """One of several processes that train together ended without an error message."""


class NonFiniteError(ReftuneError):
    """A loss or gradient that is not finite. The weights are unchanged."""
