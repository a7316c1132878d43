"""One server in a process of its own, see `tests/rl/servers/__init__.py`."""

from __future__ import annotations

import argparse
import threading

import torch

from tests.rl.servers.decoding import Decoding
from tests.rl.servers.http_server import HttpServer
from tests.rl.servers.sglang_routes import sglang
from tests.rl.servers.vllm_routes import vllm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face folder with its tokenizer")
    parser.add_argument("--protocol", choices=("vllm", "sglang"), required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--places", type=int, default=16, help="requests that decode at a time")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--attention", choices=("sparse", "dense"), default="sparse")
    parser.add_argument("--missing", default="", help="flags that it is as if started without, with commas")
    parser.add_argument("--version", default=None, help="that it says it is")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    decoding = Decoding(asked.model, asked.places, asked.max_model_len, asked.attention)
    made = vllm if asked.protocol == "vllm" else sglang
    more = {} if asked.version is None else {"version": asked.version}
    server = HttpServer(made(decoding, [flag for flag in asked.missing.split(",") if flag], **more), asked.port)
    print(f"listening on {server.url}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
