"""Ungraded samples <-> tensors of one file, for checkpoints: to the bit, and without pickles.

A header in JSON holds what is short (request, texts, calls, finish reason, sizes); each column over the tokens is one
tensor, the rows of the samples one behind the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError
from rl.messages import RolloutRequest, Sample, TokenColumns
from rl.tools.record import CallRecord

COLUMNS = {  # TokenColumns' lists -> how they are kept
    "ids": torch.int64,
    "loss_mask": torch.bool,
    "behaviour_logprobs": torch.float64,
    "weight_versions": torch.int64,
    "turns": torch.int64,
}
RECORDS = ("routed_experts", "selected")


def to_tensors(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Nothing for no samples."""
    if not samples:
        return {}
    assert all(sample.reward is None and not sample.reward_parts for sample in samples), "graded samples are not kept"
    tokens = [row for sample in samples for row in sample.rows]
    text = json.dumps([_header(sample) for sample in samples]).encode()
    found = {"header": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    for name, dtype in COLUMNS.items():
        found[name] = torch.tensor([value for each in tokens for value in getattr(each, name)], dtype=dtype)
    kept = [words for each in tokens for words in each.kept_sets or ()]
    found["kept_sizes"] = torch.tensor([len(words) for words in kept], dtype=torch.int64)
    found["kept_words"] = torch.tensor([word for words in kept for word in words], dtype=torch.int32)
    for name in RECORDS:
        records = [record for each in tokens if (record := getattr(each, name)) is not None]
        found |= {name: torch.cat(records)} if records else {}
    return found


def _header(sample: Sample) -> dict[str, Any]:
    columns = ("kept_sets", *RECORDS)
    return {
        "request": asdict(sample.request),
        "text": sample.text,
        "finish_reason": sample.finish_reason,
        "said": sample.said,
        "calls": [asdict(call) for call in sample.calls],
        "resumed": sample.resumed,
        "num_malformed": sample.num_malformed,
        "verdict": sample.verdict,
        "verdict_error": sample.verdict_error,
        "rows": [
            {"size": len(row), "has": [name for name in columns if getattr(row, name) is not None]}
            for row in sample.rows
        ],
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Sample]:
    """The samples that `to_tensors` was given."""
    if not tensors:
        return []
    headers, found = json.loads(tensors["header"].numpy().tobytes()), []
    lists = {name: iter(tensors[name].tolist()) for name in COLUMNS}
    words = iter(tensors["kept_words"].tolist())
    kept = ([*islice(words, size)] for size in tensors["kept_sizes"].tolist())
    records = {}
    for name in RECORDS:
        sizes = [row["size"] for header in headers for row in header.get("rows", ()) if name in row["has"]]
        records[name] = iter(tensors[name].split(sizes) if sizes else ())

    def columns(size: int, has: Sequence[str]) -> TokenColumns:
        each: dict[str, Any] = {name: [*islice(values, size)] for name, values in lists.items()}
        each["kept_sets"] = [*islice(kept, size)] if "kept_sets" in has else None
        each |= {name: next(records[name]).clone() if name in has else None for name in RECORDS}
        return TokenColumns(**each)

    for header in headers:
        if "rows" not in header:
            raise UserError("the checkpoint holds unfinished samples of an earlier version: start in a new output_dir")
        *earlier, tokens = [columns(row["size"], row["has"]) for row in header["rows"]]
        request = RolloutRequest(**header["request"] | {"prompt_ids": tuple(header["request"]["prompt_ids"])})
        found.append(
            Sample(
                request,
                tokens,
                header["text"],
                header["finish_reason"],
                earlier=tuple(earlier),
                said=tuple(header["said"]),
                calls=tuple(CallRecord(**call) for call in header["calls"]),
                resumed=header["resumed"],
                num_malformed=header["num_malformed"],
                verdict=header["verdict"],
                verdict_error=header["verdict_error"],
            )
        )
    return found
