class RegraftError(Exception):
    """What went wrong, at which node or pass, and how to mend it."""
