"""What ends a run although its configuration and its data are in order."""


class RunError(RuntimeError):
    """The run cannot go on. The message is for the user: what happened, what is kept, what to do."""
