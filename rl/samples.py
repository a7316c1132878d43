"""`samples.jsonl`: a few samples of every iteration in full, for people. One JSON object a line, text as the model
wrote it.

Like metrics.jsonl it is cut back to the checkpoint on resume, so each iteration's samples appear once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl.messages import Sample

FILE_NAME = "samples.jsonl"
COLUMNS = ("domain", "prompt", "answer", "text", "reward", "reward_parts", "advantage", "finish_reason", "tokens")


def sample_row(sample: Sample, advantage: float | None) -> dict[str, Any]:
    """What is shown of a sample; reward and advantage are null where a grader failed."""
    request = sample.request
    return {
        "domain": request.domain,
        "prompt": request.prompt,
        "answer": request.answer,
        "text": sample.text,
        "reward": sample.reward,
        "reward_parts": dict(sample.reward_parts),
        "advantage": advantage,
        "finish_reason": sample.finish_reason,
        "tokens": sample.num_sampled,
    }


class SamplesWriter:
    """Appends to `output_dir/samples.jsonl`; rank 0 makes one. `resume_step`: see `MetricsWriter`."""

    def __init__(self, output_dir: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(output_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._cut_back(-1 if resume_step is None else resume_step)

    def _cut_back(self, resume_step: int) -> None:
        """Keeps the whole lines of steps that the checkpoint has seen; a temporary file, synced, moved into place."""
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if line.endswith(b"\n") and row["step"] <= resume_step:
                kept.append(line)
        partial = self.path.with_name(f".{FILE_NAME}.{os.getpid()}")
        with open(partial, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def write(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        with open(self.path, "ab") as file:
            file.writelines(json.dumps({"step": step, **row}, ensure_ascii=True).encode() + b"\n" for row in rows)
