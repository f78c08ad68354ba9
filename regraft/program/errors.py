class RegraftError(Exception):
    """What went wrong, at which node or pass, and how to mend it."""


class InputError(RegraftError):
    """Example inputs, or what was said of them, that do not fit the model."""
