"""The share of the token budget that was used: what the length penalty is linear in.

DeepSeek-V3.2 names a length penalty and gives no formula; linear over the budget is ours.
"""

from __future__ import annotations

from rl.rewards.attempt import Attempt


def length_share(attempt: Attempt) -> float:
    return attempt.num_tokens / attempt.max_tokens
