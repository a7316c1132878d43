"""The rules of rollouts by servers (`rl.engine`, `rl.servers.*`): what they cannot do is refused; see validate.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from conf.address import holds_secret, is_host
from conf.schema import RunConfig


def servers_are_given(config: RunConfig, world_size: int) -> Iterator[str]:
    engine, urls = config.rl.engine, config.rl.servers.urls
    if engine == "native":
        if urls:
            yield f"rl.servers.urls={','.join(urls)} are not asked by rl.engine=native: give rl.engine=vllm or sglang"
        return
    if config.stage != "grpo":
        yield f"rl.engine={engine} draws for +stage=grpo alone: give rl.engine=native"
    if not urls:
        yield f"rl.engine={engine} has no server to ask: give rl.servers.urls=http://HOST:PORT"
    times_named = Counter(url.rstrip("/") for url in urls)
    for url in dict.fromkeys(urls):
        times = times_named.pop(url.rstrip("/"), 0)
        scheme, _, rest = url.partition("://")
        host = rest.rstrip("/")
        if holds_secret(url):
            yield (
                "rl.servers.urls holds a name, a key or a query, which would be written down: keys go into"
                " rl.servers.key_env"
            )
        elif scheme not in ("http", "https") or not is_host(host.partition("/")[0]):
            yield f"rl.servers.urls={url} is no address: give http://HOST:PORT"
        elif "/" in host:
            alone = f"{scheme}://{host.partition('/')[0]}"
            yield f"rl.servers.urls={url} holds a path, and the paths are the protocol's: give {alone}"
        elif times > 1:
            yield f"rl.servers.urls names {url} {times} times: give it once"


def servers_draw(config: RunConfig, world_size: int) -> Iterator[str]:
    """What goes with the native engine alone, or with one of the servers."""
    rl = config.rl
    if rl.engine == "native" or config.stage != "grpo":
        return
    if not rl.rollout_copy:
        yield (
            f"rl.rollout_copy=false has the ranks decode in lock-step, and with rl.engine={rl.engine} servers decode:"
            " leave it out"
        )
    if rl.engine == "vllm" and (rl.keep_selection or rl.record_selection):
        key = "keep_selection" if rl.keep_selection else "record_selection"
        yield (
            f"rl.{key}=true needs the positions that the indexer selected, which vLLM does not return: set it to false,"
            " or give rl.engine=sglang"
        )
    if rl.engine == "sglang" and rl.top_p < 1 and rl.top_k == 0:
        yield (
            f"rl.top_p={rl.top_p:g} alone is more than SGLang can say the kept words of: give rl.top_k as well, up to"
            " the servers' --sampling-mask-max-tokens (4096)"
        )


SERVER_RULES = (servers_are_given, servers_draw)
