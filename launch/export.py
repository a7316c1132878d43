"""Any run or checkpoint -> a DeepSeek-V3.2 checkpoint that transformers, vLLM and SGLang load.

    python launch/export.py RUN OUT [dtype=bf16|fp32|fp8]

RUN is a Hugging Face folder (V3 dense, V3.2, block FP8), a finished run (its `hf/` is converted), an unfinished run
(its newest checkpoint) or one of its `checkpoints/step_N`. Without `dtype`, fp32 stays fp32 and everything else
becomes bf16; fp8 is DeepSeek's block FP8 (128x128, e4m3, power-of-two scales) for the linear weights. OUT is written
whole or not at all. Exit status: 0 done, 2 the user's mistake.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a bare checkout

from conf.errors import UserError, nearest  # noqa: E402  (needs the path above)

USER_MISTAKE = 2
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp8": "float8_e4m3fn"}
USAGE = "usage: python launch/export.py RUN OUT [dtype=bf16|fp32|fp8]"


def parse(argv: list[str]) -> tuple[Path, Path, str | None]:
    """(RUN, OUT, torch's name of the dtype or None). Raises UserError."""
    paths = [arg for arg in argv if "=" not in arg]
    settings = dict(arg.split("=", 1) for arg in argv if "=" in arg)
    dtype = settings.pop("dtype", None)
    if settings:
        raise UserError(f"unknown setting {next(iter(settings))}: only dtype=bf16, fp32 or fp8 can be given")
    if len(paths) != 2:
        raise UserError(f"{len(paths)} paths are given, not 2: {USAGE}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is not known: {nearest(dtype, DTYPES)}")
    return Path(paths[0]), Path(paths[1]), None if dtype is None else DTYPES[dtype]


def weights_of(run: Path) -> tuple[Path, Path | None]:
    """(folder with config.json, None) or (run's folder, its checkpoint). Raises UserError where `run` is neither."""
    from train.checkpoint import newest

    for folder in (run, run / "hf"):
        if (folder / "config.json").is_file():
            return folder, None
    if (run / "state.json").is_file():
        return run.absolute().parent.parent, run
    checkpoint = newest(run)
    if checkpoint is None:
        raise UserError(
            f"{run} holds neither config.json, nor hf/, nor a checkpoint: give a run or a Hugging Face folder"
        )
    return run, checkpoint


def export_checkpoint(run: Path, checkpoint: Path, out: Path, dtype: str | None) -> None:
    """An unfinished run: what it started from, with what `checkpoint` holds (the weights that train) laid over it."""
    import torch

    from conf.convert import load_yaml
    from conf.schema import ParallelConfig
    from model.hf import save_pretrained
    from train import distributed
    from train.checkpoint import open_shards, read_state
    from train.parallel.ep import frozen_checksum
    from train.run import RunContext

    config = load_yaml(run / "config.yaml")
    with distributed.process_group():
        # no attention runs here: a run with kernels=triton is exported on any machine
        alone = replace(config, kernels="torch", parallel=ParallelConfig())
        net = RunContext(alone, None).build_net()
        state = read_state(checkpoint)
        reader = open_shards(checkpoint, state)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in reader.parameters())
        if frozen_checksum(net) != state.frozen:
            raise UserError(
                f"{checkpoint} belongs to other starting weights than init_from={config.init_from} holds now"
            )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(reader.read(name, 0, parameter.numel(), "weight").view_as(parameter))
        for name, buffer in net.named_buffers():
            buffer.copy_(reader.tensor(name))
    kind = dtype or ("float32" if config.precision.name == "fp32" else "bfloat16")
    tokenizer = run / "tokenizer" if (run / "tokenizer").is_dir() else None
    save_pretrained(net, out, getattr(torch, kind), tokenizer, progress=_shown)


def _shown(items: list[Any]) -> Iterable[Any]:
    from train.progress import Progress

    with Progress(len(items), "writing", unit="file") as progress:
        for item in items:
            yield item
            progress.update()


def export(run: Path, out: Path, dtype: str | None) -> None:
    """Writes `out`. `dtype`: torch's name, or None for the source's. Raises UserError."""
    import torch

    from model.hf import convert

    folder, checkpoint = weights_of(run)
    if checkpoint is not None:
        export_checkpoint(folder, checkpoint, out, dtype)
    else:
        convert(folder, out, None if dtype is None else getattr(torch, dtype), progress=_shown)


def main(argv: list[str]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        run, out, dtype = parse(argv)
        export(run, out, dtype)
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_MISTAKE
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
