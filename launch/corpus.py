"""What a stage would read, before it trains: documents, tokens, lengths, padding, cuts, what was left out and why.

    python launch/corpus.py [+stage=S] [output_dir=DIR] [key=value ...]

Takes the settings of a stage (`+stage=pretrain` where none is given; of `evaluate` the held-out split is shown), prints
a table and writes it to `DIR/data.json`. The tokens it makes stay in the cache beside DIR, where the stage finds them:
so a large corpus is tokenised before any GPU waits for it. Exit status: 0 done, 2 the user's mistake.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a bare checkout

from conf.errors import UserError  # noqa: E402  (needs the path above)

USER_MISTAKE = 2
FILE_NAME = "data.json"


def measure(argv: list[str]) -> tuple[dict[str, Any], int, Path]:
    """(summary, sequences that the run takes on one replica, its output_dir). Raises UserError."""
    from conf.load import load

    loaded = load(argv if any(arg.startswith("+stage") for arg in argv) else ["+stage=pretrain", *argv])
    from conf.schema import ParallelConfig
    from conf.validate import check
    from data.stream import TokenStream
    from data.summary import summarise
    from train import distributed
    from train.run import RunContext
    from train.start import resolve

    # no model is built: any machine will do, whatever the run's own is to be
    config = replace(resolve(loaded.config, loaded.overrides), kernels="torch", parallel=ParallelConfig())
    check(config)
    folder = Path(config.output_dir)
    with distributed.process_group(), tempfile.TemporaryDirectory(prefix="winnow-") as scratch:
        context = RunContext(replace(config, output_dir=scratch), None)  # a run in the folder keeps its tokenizer
        evaluates = context.stage.runner == "evaluate"
        stream = TokenStream(
            config.data,
            context.tokenizer(),
            config.train.seed,
            "heldout" if evaluates else "train",
            cache_dir=folder.parent / ".cache",
            conversations=context.stage.conversations,
            progress=True,
        )
        trains = config.train.steps * config.train.micro_batches
        return summarise(stream), config.train.eval_sequences if evaluates else trains, folder


def main(argv: list[str]) -> int:
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING)
    try:
        summary, sequences, folder = measure(argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return USER_MISTAKE
    from data.summary import table

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(table(summary, sequences))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
