"""Rewards. `rules.py` holds the graders, which `pool.py` runs in processes that can be killed; `total.py` adds up what
they find.

A part that fails is a failed grade, never a 0: its group is left out and counted (`rl/groups.py`). Whatever a worker
process imports at its start is the standard library and math-verify, and this file comes with it.
"""

from rl.rewards.attempt import Attempt, extract_answer
from rl.rewards.total import part_names, reward_terms, total_reward

__all__ = ["Attempt", "extract_answer", "part_names", "reward_terms", "total_reward"]
