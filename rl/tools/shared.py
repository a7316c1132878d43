"""What the tools of all trajectories share: the index, the pool of sandboxes, the MCP servers. Each is dear, so it is
made where a tool first wants it and given back when the run ends.

    with Shared(config, folder, rank) as shared:
        tools = open_tools(config.names, shared)      # a trajectory's own, cheap (registry.py)
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any, Self

from conf.errors import UserError
from conf.schema import ToolsConfig
from rl.tools.mcp_client import McpServers
from rl.tools.runner import CallLimits
from rl.tools.search import Corpus, Source
from rl.tools.tool import Tool

log = logging.getLogger("winnow.tools")


class Shared:
    """A context manager, used from any thread and any number of event loops one after another.

    folder: of the run, for logs. What cannot be made raises UserError where it is first wanted, which is before the
    first trajectory begins.
    """

    def __init__(self, config: ToolsConfig, folder: Path, rank: int = 0) -> None:
        self.config = config
        self.limits = CallLimits(config.timeout_s, config.max_calls, config.seconds, config.result_chars)
        self.servers = McpServers(config.mcp, folder, rank, config.timeout_s)
        self.sound: set[str] = set()  # tools that registry.py has looked at
        self._source: Source | None = None
        self._pool: Any = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def source(self) -> Source:
        """Where `search` and `open` look: the corpus, which is read and indexed here, or the endpoint."""
        with self._lock:
            if self._source is None:
                self._source = _open_source(self.config)
            return self._source

    def pool(self) -> Any:
        """The pool of sandboxes (rl.sandbox.SandboxPool)."""
        with self._lock:
            if self._pool is None:
                self._pool = _open_pool(self.config)
            return self._pool

    def mcp_tools(self) -> list[Tool]:
        return self.servers.tools()

    def close(self) -> None:
        self.servers.close()
        with self._lock:
            pool, self._pool, self._source = self._pool, None, None
            if pool is not None:
                pool.shut()


def _open_source(config: ToolsConfig) -> Source:
    if config.corpus is not None and config.search_url is not None:
        raise UserError("rl.tools.corpus and rl.tools.search_url are both given: search looks in one of them")
    if config.search_url is not None:
        from rl.tools.http_search import HttpSearch

        return HttpSearch(config.search_url, config.search_key_env, config.timeout_s)
    if config.corpus is None:
        raise UserError(
            "the tools search and open have nothing to look in: give rl.tools.corpus or rl.tools.search_url"
        )
    return Corpus.read(config.corpus)


def _open_pool(config: ToolsConfig) -> Any:
    """The one place that knows how a pool is made and opened. UserError: no protection on this machine (rl/sandbox)."""
    from rl.sandbox import Limits, SandboxPool

    limits = Limits(timeout_s=config.timeout_s, memory_mib=config.sandbox_memory_mib)
    # a place for every trajectory: one that waited for another's would hold up the round that both are in
    return SandboxPool(limits, mode=config.sandbox, sessions=config.concurrent).open()
