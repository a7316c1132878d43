"""Addresses of servers, as a user gives them."""

from __future__ import annotations

from urllib.parse import urlsplit


def holds_secret(url: str) -> bool:
    """Whether a name, a key or a query stands in it, which configurations and logs would write down."""
    host = url.partition("://")[2].partition("/")[0]
    return "@" in host or "?" in url or "#" in url


def is_host(text: str) -> bool:
    """HOST or HOST:PORT."""
    try:
        parts = urlsplit(f"//{text}")
        (parts.hostname or "").encode("idna")
        return bool(parts.hostname) and parts.port != 0 and text.isprintable() and not any(map(str.isspace, text))
    except ValueError:  # a port that is no number or too high, a bracket that does not close, a part of a name that is
        # empty or too long
        return False
