"""`samples.jsonl`: a few samples of every iteration in full, for people. One JSON object a line, text as the model
wrote it; `python launch/samples.py RUN` makes a page of it.

A row has what the sample is, how it was graded, and `per_token`: lists over the sampled tokens, of the sampler and of
the update that trained on it (null where none did). What stands between sampled tokens is `per_token.between`: tool
results, and the context where it began anew. Like metrics.jsonl the file is cut back to the checkpoint on
resume, so each iteration's samples appear once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate, compress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from conf.schema import RLConfig
from rl.groups import Experience
from rl.messages import Sample, Trace
from rl.pieces import text_pieces
from rl.rewards import reward_terms

FILE_NAME = "samples.jsonl"
TABLE = "samples"  # the tracker's
COLUMNS = (  # of the table: all but the lists over tokens
    *("domain", "prompt", "answer", "text", "reward", "reward_parts", "advantage", "finish_reason", "tokens", "rubric"),
    *("env", "num_calls"),
    *("prompt_index", "sample_index", "group_size", "group_reward", "weight_versions"),
    *("max_log_ratio", "clip_frac", "off_policy_kl", "off_policy_masked"),
)
SHOWN_PROMPTS, SHOWN_GROUP = 8, 8  # one sample of each of so many prompts, and so many of one group
MOST_ROWS = SHOWN_PROMPTS + SHOWN_GROUP  # of an iteration


def shown_samples(experience: Experience) -> list[Sample]:
    """A sample of each of the first prompts, and most of one group: the first that has an advantage to show."""
    groups: dict[int, list[Sample]] = {}
    for sample in sorted(experience.samples, key=lambda s: (s.request.prompt_index, s.request.sample_index)):
        groups.setdefault(sample.request.prompt_index, []).append(sample)
    taught = (s.request.prompt_index for s, a in zip(experience.trained, experience.advantages, strict=True) if a)
    whole = min(taught, default=min(groups, default=None))
    found = []
    for number, (prompt, group) in enumerate(groups.items()):
        found += group[: SHOWN_GROUP if prompt == whole else 1 if number < SHOWN_PROMPTS else 0]
    return found


def places_shown(experience: Experience) -> set[int]:
    """Where in `experience.trained` the shown samples are, as far as they are trained on."""
    shown = {id(sample) for sample in shown_samples(experience)}
    return {place for place, sample in enumerate(experience.trained) if id(sample) in shown}


def sample_rows(experience: Experience, tokenizer: PreTrainedTokenizerBase, rl: RLConfig) -> list[dict[str, Any]]:
    """The rows of an iteration, after its update."""
    places = {id(sample): place for place, sample in enumerate(experience.trained)}
    rewards: dict[int, list[float | None]] = {}
    for sample in experience.samples:
        rewards.setdefault(sample.request.prompt_index, []).append(sample.reward)
    rows = []
    for sample in shown_samples(experience):
        place = places.get(id(sample), -1)
        advantage = experience.advantages[place] if place >= 0 else None
        group = rewards[sample.request.prompt_index]
        rows.append(sample_row(sample, advantage, experience.traces.get(place), group, tokenizer, rl))
    return rows


def sample_row(
    sample: Sample,
    advantage: float | None,
    trace: Trace | None,
    group: Sequence[float | None],
    tokenizer: PreTrainedTokenizerBase,
    rl: RLConfig,
) -> dict[str, Any]:
    """What is shown of a sample. Reward and advantage are null where a grader failed or the group was left out, what
    the update saw where it was not trained on. `group`: the rewards of all samples of its prompt."""
    request = sample.request
    pieces, between = _pieces(sample, tokenizer)
    graded = [reward for reward in group if reward is not None]
    log_ratios = [abs(math.log(ratio)) for ratio in trace.ratios if 0 < ratio < math.inf] if trace else []
    return {
        "domain": request.domain,
        "prompt": request.prompt,
        "answer": request.answer,
        "rubric": request.rubric or None,
        "text": sample.text,
        "reward": sample.reward,
        "reward_parts": dict(sample.reward_parts),
        "reward_terms": {}
        if sample.reward is None
        else reward_terms(sample.reward_parts, rl.of(request.domain)),  # sum: `reward`
        "advantage": advantage,
        "finish_reason": sample.finish_reason,
        "env": request.env or None,
        "num_calls": len(sample.calls),
        "calls": [{**asdict(call), "seconds": _short(call.seconds)} for call in sample.calls],
        "verdict_error": sample.verdict_error or None,
        "tokens": sample.num_sampled,
        "prompt_index": request.prompt_index,
        "sample_index": request.sample_index,
        "group_size": len(group),
        "group_reward": sum(graded) / len(graded) if graded else None,
        "weight_versions": sorted(set(_sampled(sample, "weight_versions"))),
        "max_log_ratio": _short(max(log_ratios)) if log_ratios else None,
        "clip_frac": _short(sum(trace.clipped) / len(trace.clipped)) if trace else None,
        "off_policy_kl": _short(trace.off_policy_kl) if trace else None,
        "off_policy_masked": trace.masked if trace else None,
        "per_token": {
            "text": pieces,
            "between": between,
            "behaviour_logprobs": [_short(p) for p in _sampled(sample, "behaviour_logprobs")],
            "logprobs": [_short(p) for p in trace.logprobs] if trace else None,
            "ratios": [_short(ratio) for ratio in trace.ratios] if trace else None,
            "clipped": trace.clipped if trace else None,
            "kept": _kept(sample),
        },
    }


def _short(value: float) -> float | None:
    """Six digits are plenty to look at; null where it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _sampled(sample: Sample, column: str) -> list[Any]:
    """A column of the sampled tokens of all rows."""
    return [value for row in sample.rows for value in compress(getattr(row, column), row.loss_mask)]


def _pieces(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str] | None, list[dict[str, Any]]]:
    """Text of each sampled token: none for the ends of sequence and what a stop string cut off; null where they are not
    the text that was graded. And what stands between them: `before` which sampled token, its `text`, whether it
    begins a `row`."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    found: list[str] = []
    between: list[dict[str, Any]] = []
    texts = iter(sample.said or (sample.text,))
    for number, row in enumerate(sample.rows):
        last = 0 if number else len(sample.request.prompt_ids)
        for first, stop in row.messages():
            if first > last:
                opens = number > 0 and last == 0
                between.append({"before": len(found), "text": decode(row.ids[last:first]), "row": opens})
            pieces = _message_pieces(row.ids[first:stop], next(texts), tokenizer.eos_token_id, decode)
            if pieces is None:
                return None, []
            found, last = found + pieces, stop
    return found, between


def _message_pieces(
    ids: list[int], text: str, eos_id: int | None, decode: Callable[[list[int]], str]
) -> list[str] | None:
    ended = ids[-1:] == [eos_id]
    pieces = text_pieces(ids[:-1] if ended else ids, decode) + [""] * ended
    if not "".join(pieces).startswith(text):
        return None
    ends = accumulate(map(len, pieces))
    return [piece[: max(0, len(text) - end + len(piece))] for piece, end in zip(pieces, ends, strict=True)]


def _kept(sample: Sample) -> list[int | None] | None:
    """Words that were in the running for each sampled token, null for all of them; null where no word ever was out."""
    if any(row.kept_sets is None for row in sample.rows):
        return None
    sizes = [len(kept) or None for kept in _sampled(sample, "kept_sets")]
    return sizes if any(sizes) else None


def cells(row: Mapping[str, Any]) -> list[Any]:
    """The row in the table's columns, nested values as text."""
    values = [row.get(column) for column in COLUMNS]
    return [json.dumps(value) if isinstance(value, dict | list) else value for value in values]


class SamplesWriter:
    """Appends to `output_dir/samples.jsonl`; rank 0 makes one. `resume_step`: see `MetricsWriter`."""

    def __init__(self, output_dir: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(output_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._cut_back(-1 if resume_step is None else resume_step)

    def _cut_back(self, resume_step: int) -> None:
        """Keeps the whole lines of steps that the checkpoint has seen; a temporary file, synced, moved into place."""
        partial = self.path.with_name(f".{FILE_NAME}.{os.getpid()}")
        with open(partial, "wb") as file, open(self.path, "rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:  # torn by a kill
                    continue
                if line.endswith(b"\n") and row["step"] <= resume_step:
                    file.write(line)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def write(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        with open(self.path, "ab") as file:
            file.writelines(json.dumps({"step": step, **row}, ensure_ascii=True).encode() + b"\n" for row in rows)

    def table(self) -> Iterator[list[Any]]:
        """What the file holds as rows of the table, each with its step first."""
        if self.path.exists():
            with open(self.path, "rb") as lines:
                for row in map(json.loads, lines):
                    yield [row["step"], *cells(row)]
