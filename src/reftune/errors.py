"""The errors that a user sees. A message about a wrong value states the value, where it was found,
and what was expected."""


class ReftuneError(Exception):
    """The base class of these errors. The command line prints the message on one line."""


class RecipeError(ReftuneError):
    """An unusable recipe or launcher setting, such as an unknown key or a value out of range."""


class DataError(ReftuneError):
    """Data that cannot be read or trained on. The message starts with `file:line` if known."""


class ModelError(ReftuneError):
    """A model or tokenizer that cannot be loaded or used."""


class CheckpointError(ReftuneError):
    """A run folder, checkpoint or export that cannot be read, written or continued, for example
    because it is damaged or because another process uses it."""


class RewardError(ReftuneError):
    """A reward function that failed or that returned something other than rewards."""


class EngineError(ReftuneError):
    """An engine that failed to sample completions or to load the current weights."""


class ProcessError(ReftuneError):
    """One of several processes that train together ended without an error message."""


class NonFiniteError(ReftuneError):
    """A loss, gradient or the like that is not finite. It has not changed any weights yet."""
