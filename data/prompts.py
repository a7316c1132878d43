"""Prompts of RL with their reference answers: rows of files or of a `datasets` set, or problems generated here.

Both keep to the split by key, so a prompt held out for evaluation is trained on neither here nor in the text of an
earlier stage (`data.split`). Any position can be reached at once: a resumed run passes `start`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data.files import ROW_SUFFIXES, find_files
from data.rows import BadRows, read_rows
from data.sources import load_dataset, question_key
from data.split import in_split
from data.tasks import TASKS, Problem, arithmetic, choose, heldout_problems, mixed_problems

COLUMNS = ("prompt", "answer", "domain", "rubric")
NO_DOMAIN = "general"  # of rows that name none
HF = "hf:"  # before the name of a `datasets` set


@dataclass(frozen=True)
class Prompt:
    """`prompt` is the user's message, `answer` what a grader compares with, `domain` picks rewards and weights,
    `rubric` is what a judge goes by. `answer` and `rubric` are "" where the row has none and the reward needs none."""

    prompt: str
    answer: str
    domain: str
    key: str
    rubric: str = ""
    task: str = ""  # of data/tasks, whose grader knows it; a row's is its domain
    env: str = ""  # NAME:LEVEL of the environment (rl/env) that it is a problem of
    state: str = ""  # what that environment knows of it


def _needs_answer(domain: str) -> Sequence[str]:
    return ("answer",)


def prompts(
    path: str | Path | None,
    split: str,
    seed: int,
    digits: int = 2,
    heldout: float = 0.1,
    *,
    start: int = 0,
    max_bad_rows: int = 100,
    needs: Callable[[str], Sequence[str]] = _needs_answer,
    tasks: Sequence[str] = (),
    hf_split: str = "train",
) -> Iterator[Prompt]:
    """Prompts of a split from number `start` on.

    train: no end; a file is shuffled anew every epoch. heldout: each key once, in an order of `seed`, then it ends.
    `path` None: problems of `tasks` (TASK or TASK:LEVEL), else additions of `digits` digits; a path `hf:NAME` is a
    `datasets` set, of which `hf_split` is read. `needs`: domain -> the columns besides the prompt that its rows must
    have, as the reward asks for them. UserError: no file, too many malformed rows, an empty split.
    """
    if path is None and tasks:
        chosen = choose(tasks, digits)
        if split == "train":
            mixed = mixed_problems(chosen, split, seed, heldout, start)
        else:
            mixed = islice(heldout_problems(chosen, seed, heldout), start, None)
        for domain, problem in mixed:
            yield _from_problem(problem, domain)
        return
    if path is None and split == "train":
        for problem in arithmetic.problems(split, seed, digits, heldout, start):
            yield _from_problem(problem)
        return
    if path is None:
        pairs = arithmetic.heldout_pairs(digits, heldout)
        found = [_from_problem(arithmetic.make_problem(*_either_way(pair, seed))) for pair in pairs]
    else:
        found = read_prompts(path, split, heldout, max_bad_rows, needs, hf_split)
    if not found:
        raise UserError(
            f"rl.path={path} with data.heldout={heldout:g} leaves no prompt in the {split} split:"
            " give more prompts or another share"
        )
    if split == "heldout":
        once = list({prompt.key: prompt for prompt in found}.values())
        yield from _shuffled(once, seed, 0)[start:]
        return
    epoch, inside = divmod(start, len(found))
    while True:
        yield from _shuffled(found, seed, epoch)[inside:]
        epoch, inside = epoch + 1, 0


def train_domains(
    path: str | Path | None,
    heldout: float = 0.1,
    max_bad_rows: int = 100,
    needs: Callable[[str], Sequence[str]] = _needs_answer,
    tasks: Sequence[str] = (),
    hf_split: str = "train",
) -> set[str]:
    """The domains that the train split's prompts are of; arguments as of `prompts`."""
    if path is None:
        return {name.partition(":")[0] for name in tasks} or {arithmetic.DOMAIN}
    return {prompt.domain for prompt in read_prompts(path, "train", heldout, max_bad_rows, needs, hf_split)}


def read_prompts(
    path: str | Path,
    split: str,
    heldout: float,
    max_bad_rows: int = 100,
    needs: Callable[[str], Sequence[str]] = _needs_answer,
    hf_split: str = "train",
) -> list[Prompt]:
    """The prompts of a split in the order of the files (.jsonl(.gz/.zst), .parquet; a file, a glob or a folder), or of
    the set after `hf:`."""
    bad = BadRows(max_bad_rows)
    found = []
    for origin, row in _rows(str(path), bad, needs, hf_split):
        try:
            prompt = _from_row(row, needs)
        except ValueError as error:
            bad.report(origin, str(error))
            continue
        if in_split(prompt.key, split, heldout):
            found.append(prompt)
    return found


def _rows(
    path: str, bad: BadRows, needs: Callable[[str], Sequence[str]], hf_split: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(origin, row) of files or of a `datasets` set."""
    if not path.startswith(HF):
        for file in find_files(path, "rl.path", ROW_SUFFIXES):
            yield from read_rows(file, COLUMNS, bad)
        return
    name = path.removeprefix(HF)
    dataset = load_dataset(name, hf_split, f"rl.path={path}")
    present = [column for column in COLUMNS if column in dataset.column_names]
    wanted = () if "domain" in present else needs(NO_DOMAIN)
    missing = [column for column in ("prompt", *wanted) if column not in present]
    if missing:
        has = ", ".join(dataset.column_names)
        raise UserError(f"rl.path={path} has no column {' and no column '.join(missing)}: it has {has}; rename them")
    for number, row in enumerate(dataset.select_columns(present), 1):
        yield f"{name}[{hf_split}]:{number}", row


def _from_row(row: Mapping[str, Any], needs: Callable[[str], Sequence[str]]) -> Prompt:
    """ValueError with the reason if a row is no prompt. A number is taken as an answer by its digits."""
    prompt, answer, domain, rubric = (row.get(name) for name in COLUMNS)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError('no "prompt"' if prompt is None else '"prompt" is no string with text')
    if domain is not None and not isinstance(domain, str):
        raise ValueError('"domain" is not a string')
    domain = domain or NO_DOMAIN
    missing = [name for name in needs(domain) if row.get(name) is None]
    if missing:
        raise ValueError(f'no "{missing[0]}"')
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise ValueError('"answer" is neither a number nor a string with text')
    if rubric is not None and (not isinstance(rubric, str) or not rubric.strip()):
        raise ValueError('"rubric" is no string with text')
    answer, rubric = answer or "", rubric or ""
    (prompt + answer + rubric).encode("utf-8")  # a lone surrogate cannot be tokenised; UnicodeError is a ValueError
    return Prompt(prompt, answer, domain, question_key(prompt), rubric, domain if domain in TASKS else "")


def _from_problem(problem: Problem, domain: str = arithmetic.DOMAIN) -> Prompt:
    return Prompt(problem.prompt, problem.answer, domain, problem.key, task=domain)


def _either_way(pair: tuple[int, int], seed: int) -> tuple[int, int]:
    """The pair in one of its two orders."""
    a, b = pair
    return (b, a) if random.Random(f"order/{seed}/{a}/{b}").random() < 0.5 else (a, b)


def _shuffled(found: list[Prompt], seed: int, epoch: int) -> list[Prompt]:
    order = list(found)
    random.Random(f"prompts/{seed}/{epoch}").shuffle(order)
    return order
