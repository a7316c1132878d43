"""The one exception for a user's mistake: its message is a single line with the value, the reason and the fix."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Ends the process with status 2 and this message on stderr (`launch/stage.py`), nothing else.

    One mistake is one line; `conf.validate.check` alone joins several, a line each.
    """


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of an error message: `did you mean X?`, or the valid ones where none is near."""
    options = list(valid)
    by_folded = {option.lower(): option for option in options}
    close = get_close_matches(word.lower(), by_folded, n=1, cutoff=0.6)
    return f"did you mean {by_folded[close[0]]}?" if close else f"valid: {', '.join(options)}"
