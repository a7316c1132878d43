"""Worked addition: a generator with random access and an exact grader, both pure.

Problem `index` of (split, seed, digits, share) comes from a hash, so any process can make any problem without the ones
before it. The key is the unordered pair of operands, and `data.split` decides by it: a held-out pair never occurs in
training, in neither order. The working adds column by column from the right, the carry as a third summand:
`47+38=?` -> `7+8=15,4+3+1=8` -> `85`.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator

from conf.errors import UserError
from data.split import in_split, is_heldout
from data.tasks.task import Problem, Task

DOMAIN = "arithmetic"
MAX_DIGITS = 18  # two operands come from one 256-bit hash; the bias of the modulus is below 2**-68
MAX_DRAWS = 10_000  # draws for one problem before a split counts as empty
ENUMERABLE_DIGITS = 2  # up to here the held-out pairs are listed, beyond they are drawn
_PROMPT = re.compile(r"\s*(\d+)\s*\+\s*(\d+)\s*=\s*\??\s*", re.ASCII)


def pair_key(a: int, b: int) -> str:
    return f"{min(a, b)}+{max(a, b)}"


def prompt_key(prompt: str) -> str | None:
    """The key of a prompt that asks for a sum, whoever wrote it; None for any other text."""
    found = _PROMPT.fullmatch(prompt)
    if found is None or max(map(len, found.groups())) > 4000:  # int() refuses more digits than 4300
        return None
    return pair_key(int(found[1]), int(found[2]))


def column_steps(a: int, b: int) -> str:
    """The addition column by column, lowest digits first."""
    left, right = str(a)[::-1], str(b)[::-1]
    steps, carry = [], 0
    for x, y in itertools.zip_longest(left, right, fillvalue="0"):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ",".join(steps)


def make_problem(a: int, b: int) -> Problem:
    return Problem(pair_key(a, b), f"{a}+{b}=?", str(a + b), column_steps(a, b))


def _operands(digits: int) -> tuple[int, int]:
    """(smallest, how many): the operands of exactly `digits` digits; 0 counts as a one-digit number."""
    least = 10 ** (digits - 1) if digits > 1 else 0
    return least, 10**digits - least


def is_worked(index: int, seed: int, share: float) -> bool:
    """Whether problem `index` shows its working, for a share of the problems."""
    noise = hashlib.sha256(f"worked/{seed}/{index}".encode()).digest()
    return int.from_bytes(noise[:8]) < share * 2**64


def problem_at(index: int, split: str, seed: int, digits: int, share: float) -> Problem:
    """Problem `index` of a split: operands of exactly `digits` digits, uniform among the split's pairs.

    UserError where the split has (next to) no such pair or `digits` is out of range.
    """
    if not 1 <= digits <= MAX_DIGITS:
        raise UserError(f"data.operand_digits={digits} is out of range: give 1 to {MAX_DIGITS}")
    least, count = _operands(digits)
    for draw in range(MAX_DRAWS):
        noise = hashlib.sha256(f"addition/{split}/{seed}/{index}/{draw}".encode()).digest()
        a, b = (least + int.from_bytes(half) % count for half in (noise[:16], noise[16:]))
        if in_split(pair_key(a, b), split, share):
            return make_problem(a, b)
    raise UserError(f"data.heldout={share:g} leaves no addition in the {split} split: give a share nearer to 0.1")


def problems(split: str, seed: int, digits: int, share: float = 0.1, start: int = 0) -> Iterator[Problem]:
    """The problems of a split from number `start` on, forever. `share`: data.heldout."""
    for index in itertools.count(start):
        yield problem_at(index, split, seed, digits, share)


def heldout_pairs(digits: int, share: float = 0.1, limit: int = 4096) -> list[tuple[int, int]]:
    """Distinct held-out pairs, the smaller operand first: all of them up to two digits (at least 256 for two), else
    up to `limit` in a fixed random order."""
    if digits <= ENUMERABLE_DIGITS:
        least, count = _operands(digits)
        pairs = itertools.combinations_with_replacement(range(least, least + count), 2)
        return [(a, b) for a, b in pairs if is_heldout(pair_key(a, b), share)]
    keys: dict[str, None] = {}  # an ordered set
    for problem in itertools.islice(problems("heldout", 0, digits, share), 4 * limit):  # fewer pairs than limit end too
        keys[problem.key] = None
        if len(keys) == limit:
            break
    return [(int(a), int(b)) for a, b in (key.split("+") for key in keys)]


def grade(answer_text: str, answer: str) -> float:
    """1.0 for exactly the answer (spaces around it aside), else 0.0."""
    return float(answer_text.strip() == answer)


TASK = Task(DOMAIN, problem_at, prompt_key)  # its level is the number of digits
