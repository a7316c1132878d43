"""A small MCP server over stdio, for the client's tests: `python mcp_server.py [NAME]`."""

import os
import sys
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("tests")
counted = 0


@server.tool(description="Adds two integers.")
def add(a: int, b: int) -> str:
    return str(a + b)


@server.tool(description="Counts its calls.")
async def count() -> str:
    global counted
    counted += 1
    return str(counted)


@server.tool(description="Says its process id.")
async def who() -> str:
    return str(os.getpid())


@server.tool(description="Dies in the middle of a call.")
async def die() -> str:
    print("dying as told", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool(description="Raises.")
async def fail() -> str:
    raise ValueError("as told")


@server.tool(description="Sleeps, and lets the server serve others.")
def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


@server.tool(description="Hangs the whole server.")
async def hang() -> str:
    time.sleep(600)
    return "never"


@server.tool(description="Says what a variable holds.")
async def variable(name: str) -> str:
    return os.environ.get(name, "(unset)")


if __name__ == "__main__":
    server.run()
