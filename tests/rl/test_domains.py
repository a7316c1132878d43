"""Mixed RL: each domain with its own prompts, share, outcome, length, reward and KL, in one run; accuracy by domain."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.schema import DomainConfig, RLConfig, RunConfig
from rl.groups import attempt_of, grade
from rl.prompts import heldout_prompts, train_prompts
from rl.rewards.pool import RewardPool
from rl.rewards.total import part_names
from tests.rl.samples import make_sample
from tests.rl.test_loop import base, config, go, rows

__all__ = ["base"]  # a fixture

DOMAINS = {
    "puzzles": DomainConfig(tasks=("countdown", "sorting"), share=2.0, outcome="task", length_penalty=0.5, beta=0.0),
    "words": DomainConfig(tasks=("words:2",), max_new_tokens=20, format_weight=0.25, language="latin"),
}
MIXED = RLConfig(
    prompts_per_step=6, group_size=2, max_new_tokens=8, pack_len=160, eval_prompts=8, beta=0.1, domains=DOMAINS
)


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_domain_has_its_settings_and_the_rest_is_the_runs():
    words, puzzles, other = MIXED.of("words"), MIXED.of("puzzles"), MIXED.of("elsewhere")
    assert (words.max_new_tokens, words.format_weight, words.beta, words.outcome) == (20, 0.25, 0.1, "exact_match")
    assert (puzzles.max_new_tokens, puzzles.beta, puzzles.outcome, puzzles.tasks) == (
        8,
        0.0,
        "task",
        ("countdown", "sorting"),
    )
    assert other is MIXED and not words.mixes and MIXED.views == [puzzles, words]
    assert part_names(MIXED) == ("task", "format", "length", "exact_match", "language")
    only = replace(MIXED, beta=0.0, domains={"a": DomainConfig(beta=0.2), "b": DomainConfig(outcome="judge")})
    assert only.needs_reference and only.needs_judge and only.views[0] is only
    assert not replace(only, domains={}).needs_reference and not replace(only, domains={}).needs_judge


def test_prompts_come_by_their_shares_and_held_out_ones_of_each():
    run = RunConfig("grpo", "x", rl=MIXED)
    stream = train_prompts(run)
    first = [next(stream) for _ in range(6)]
    assert sorted(prompt.domain for prompt in first) == ["puzzles"] * 4 + ["words"] * 2
    assert {p.task for p in first if p.domain == "puzzles"} <= {"countdown", "sorting"}
    held = [next(source) for source in heldout_prompts(run)]
    assert [prompt.domain for prompt in held] == ["puzzles", "words"] and held[1].task == "words"


def test_each_sample_is_graded_by_its_domain():
    """The task's own grader under a name of the user's; another outcome, weight and budget beside it."""
    right = "x</think>(5+6)*3"
    asked = {"prompt": "make 33 from 5,3,6", "answer": "3*(6+5)", "task": "countdown", "max_new_tokens": 8}
    samples = [
        make_sample([1], [2] * 4, [0.0] * 4, text=right, domain="puzzles", **asked),
        make_sample(
            [1], [2] * 4, [0.0] * 4, text=right, domain="words", prompt_index=1, **(asked | {"max_new_tokens": 20})
        ),
    ]
    assert [attempt_of(sample, MIXED).max_tokens for sample in samples] == [8, 20]
    with RewardPool(1, 30.0) as pool:
        (puzzle, words), failures = grade(samples, pool, MIXED)
    assert not failures
    assert puzzle.reward_parts == {"task": 1.0, "format": 1.0, "length": 0.5} and puzzle.outcome == 1.0
    assert puzzle.reward == pytest.approx(1 - 0.5 * 0.5)
    assert words.reward_parts == {"exact_match": 0.0, "format": 1.0, "length": 0.2, "language": 1.0}
    assert words.outcome == 0.0 and words.reward == 0.25


def test_rows_of_a_domain_that_is_named_like_a_task_are_of_that_task(tmp_path: Path):
    path = written(tmp_path, [{"prompt": f"make {n} from {n - 1},1", "answer": f"{n - 1}+1"} for n in range(3, 9)])
    rl = replace(MIXED, domains={"countdown": DomainConfig(path=path, outcome="task")})
    assert next(train_prompts(RunConfig("grpo", "x", rl=rl))).task == "countdown"


def test_evaluation_refuses_a_domain_that_no_prompt_has(base: str, tmp_path: Path):
    rl = replace(MIXED, tasks=("words:2",), domains={"word": DomainConfig(beta=0.1)})
    run = config(tmp_path / "eval", base, "evaluate", rl=rl)
    run = replace(run, train=replace(run.train, eval_sequences=1), data=replace(run.data, seq_len=64))
    with pytest.raises(AssertionError, match=r"names word, a domain without any prompt: did you mean words\?"):
        go(run)


def test_rows_of_one_file_may_differ_by_their_domain(tmp_path: Path):
    """A proof needs no answer where mathematics does: the row without one counts as malformed there alone."""
    given = [{"prompt": f"q{n}", "domain": "proof"} for n in range(9)] + [{"prompt": "m", "domain": "math"}]
    domains = {"proof": DomainConfig(outcome="proof")}
    rl = replace(MIXED, domains=domains, path=written(tmp_path, given))
    run = RunConfig("grpo", "x", rl=rl)
    stream = train_prompts(run)
    assert {next(stream).domain for _ in range(20)} == {"proof"}


@pytest.mark.parametrize("world", [1, 2])
def test_a_mixed_run_logs_every_domain(world: int, base: str, tmp_path: Path):
    run = config(tmp_path / "run", base, rl=replace(MIXED, eval_every=2), steps=3)
    assert go(run, world) == ["finished"] * world
    start, *found = rows(tmp_path / "run")
    assert start["step"] == 0 and all(f"heldout/{domain}/accuracy" in start for domain in DOMAINS)
    for row in found:
        assert row["domain/puzzles/samples"] == 8 and row["domain/words/samples"] == 4
        assert row["domain/puzzles/length_mean"] <= 8 and row["domain/words/length_mean"] <= 20
        assert row["mismatch/index_overlap"] > 0.99  # a model this small has room for the records
        for domain in DOMAINS:
            assert 0 <= row[f"domain/{domain}/accuracy"] <= 1 and 0 <= row[f"domain/{domain}/zero_spread_frac"] <= 1
        assert row["domain/words/reward"] >= 0 and "heldout/accuracy" in row or row["step"] == 1
    assert found[0]["domain/puzzles/kl_ref"] == 0 and found[2]["domain/words/kl_ref"] > 0
    both = (found[2]["domain/puzzles/kl_ref"] * 8 + found[2]["domain/words/kl_ref"] * 4) / 12
    assert both == pytest.approx(found[2]["policy/kl_ref"], rel=1e-5)
    evaluation = config(tmp_path / "eval", str(tmp_path / "run"), "evaluate", rl=MIXED)
    short = replace(evaluation.train, eval_sequences=2)
    assert go(replace(evaluation, train=short, data=replace(evaluation.data, seq_len=64))) == ["finished"]
    measured = json.loads((tmp_path / "eval/evaluation.json").read_text())
    assert measured["reward/num_problems"] == 16
    assert measured["reward/accuracy"] == found[2]["heldout/accuracy"]
    for domain in DOMAINS:
        assert measured[f"domain/{domain}/accuracy"] == found[2][f"heldout/{domain}/accuracy"]


def test_ranks_share_out_what_one_would_draw(base: str, tmp_path: Path):
    for world in (1, 2):
        assert go(config(tmp_path / str(world), base, rl=MIXED, steps=2), world) == ["finished"] * world
    for one, two in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_measurement_is_logged_whatever_log_every_is(base: str, tmp_path: Path):
    run = config(tmp_path / "run", base, rl=replace(MIXED, eval_every=2), steps=5, log_every=4)
    assert go(run) == ["finished"]
    found = {row["step"]: "heldout/accuracy" in row for row in rows(tmp_path / "run")}
    assert found == {0: True, 1: False, 2: True, 4: True, 5: True}
