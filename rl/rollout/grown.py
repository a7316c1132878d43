"""A sample and what was drawn behind it, whichever engine drew: what is still to be asked for, and the columns after.

What was recorded before stays as it was recorded then, whatever the weights of now chose while they read it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.generate import Generation
from rl.messages import CUT, RolloutRequest, Sample, TokenColumns, prompt_columns
from rl.stop import StopStrings


def left_to_draw(
    request: RolloutRequest, before: TokenColumns | None, limit: int | None
) -> tuple[tuple[int, ...], int, int]:
    """-> (the ids so far, how many of them were drawn, tokens that may be drawn now)."""
    ids, drawn = (request.prompt_ids, 0) if before is None else (tuple(before.ids), before.num_sampled)
    left = request.max_new_tokens - drawn
    return ids, drawn, left if limit is None else min(left, limit)


def columns_after(
    prompt: TokenColumns, before: TokenColumns | None, drawn: Generation, versions: Sequence[int]
) -> TokenColumns:
    """The row `before` (None: `prompt`) with what was drawn; `versions`: of the weights that drew each token."""
    before, size = prompt if before is None else before, len(drawn.ids)
    return TokenColumns(
        ids=before.ids + drawn.ids,
        loss_mask=before.loss_mask + [True] * size,
        behaviour_logprobs=before.behaviour_logprobs + drawn.logprobs,
        weight_versions=before.weight_versions + list(versions),
        turns=before.turns + before.turns[-1:] * size,
        kept_sets=None if drawn.kept is None else (before.kept_sets or [[]] * len(before)) + drawn.kept,
        routed_experts=_rows(before.routed_experts, drawn.experts),
        selected=_rows(before.selected, drawn.selected),
    )


def grown(
    request: RolloutRequest,
    before: TokenColumns | None,
    drawn: Generation,
    versions: Sequence[int],
    now: int,
    stop: StopStrings,
    eos_id: int | None,
) -> Sample:
    """The sample of these columns; `CUT` where it may draw more. `now`: version of the prompt's tokens."""
    tokens = columns_after(prompt_columns(request.prompt_ids, now), before, drawn, versions)
    answer, reason = tokens.ids[tokens.open_message :], drawn.finish_reason
    if reason == "length" and tokens.num_sampled < request.max_new_tokens:
        reason = CUT
    said = answer[:-1] if answer[-1:] == [eos_id] else answer
    return Sample(request, tokens, stop.cut(stop.decode(said)), reason)


def _rows(before: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """A record of all tokens: `rows` of those that ran, one for the last, which did not, and in place of what ran again
    after a cut what was recorded `before`."""
    if rows is None:
        return None
    found = torch.cat([rows, torch.full_like(rows[:1], -1)])
    if before is not None:
        ran = (before >= 0).flatten(1).any(1).nonzero().squeeze(1)  # its last token runs now for the first time
        found[ran] = before[ran]
    return found
