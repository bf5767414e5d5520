"""The errors that a user sees. A message about a wrong value states the value, where it was found,
and what was expected."""


class ReftuneError(Exception):
    """The base class of the errors in this module. The command line prints an error's message on
    one line."""


class RecipeError(ReftuneError):
    """A recipe or launcher setting that cannot be used, such as an unknown key or a value out of
    range."""


class DataError(ReftuneError):
    """Data that cannot be read or trained on. The message starts with `file:line` if both are
    known."""


class ModelError(ReftuneError):
    """A model or tokenizer that cannot be loaded or used."""


class CheckpointError(ReftuneError):
    """A run folder, checkpoint or export that cannot be read, written or continued, for example
    because it is damaged or because another process is using it."""


class RewardError(ReftuneError):
    """A reward function that failed or that returned something other than rewards."""


class EngineError(ReftuneError):
    """An engine that failed to sample completions or to load the current weights."""


class ProcessError(ReftuneError):
    """One of several processes that train together ended without an error message."""


class NonFiniteError(ReftuneError):
    """A loss, gradient or other training quantity that is not finite. The error is raised before
    the quantity changes any weights."""
