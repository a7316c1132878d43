from __future__ import annotations

import pytest

from rl.env.registry import ENVIRONMENTS
from tests.rl.env.local_pool import LocalPool, install


@pytest.fixture(autouse=True)
def local_pool(monkeypatch: pytest.MonkeyPatch) -> LocalPool:
    """The pool that `programs` is given: it runs programs in this process."""
    install(monkeypatch)
    pool = LocalPool()
    monkeypatch.setattr(ENVIRONMENTS["programs"], "pool", pool)
    return pool
