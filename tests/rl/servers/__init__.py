"""A rollout server for tests: vLLM's and SGLang's protocols over real HTTP, with the native engine behind them.

    python -m tests.rl.servers --model HF_FOLDER --protocol vllm --port 0      (then says `listening on URL`)

`decoding.py` decodes for whoever asks, in one thread and one batch that requests join and leave; `http_server.py`
speaks HTTP and misbehaves on request (`POST /fault`); `vllm_routes.py` and `sglang_routes.py` are the protocols;
`process.py` runs one in a process that a test may kill and start again.
"""
