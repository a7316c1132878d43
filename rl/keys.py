"""Keys of endpoints that a run asks: they come from the environment alone, and into no message."""

from __future__ import annotations

import os

from conf.errors import UserError


def read_key(setting: str, variable: str | None, of: str) -> str:
    """The key in the variable that `setting` names, "" for None. UserError where it holds none; `of`: what would do
    without, for the message."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"{setting}={variable} names a variable that is not set: export {variable}, or give {setting}=null for"
            f" {of} without keys"
        )
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{setting}={variable} names a variable that holds no key: it has unprintable letters")
    return key
