"""The one exception for a user's mistake: its message is a single line with the value, the reason and the fix."""


class UserError(ValueError):
    """Ends the process with status 2 and this one line on stderr (`launch/stage.py`), nothing else."""
