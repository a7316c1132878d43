"""A whole GRPO run whose judge fails for some samples: their groups are left out and counted, and nothing is trained as
a reward of 0; with its ledger a repeated run asks for no score twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rl.evaluate
import rl.loop
from conf.schema import RLConfig, RunConfig
from rl.groups import Experience
from rl.messages import Sample
from rl.rewards import extract_answer
from tests.distributed.helper import run_ranks
from tests.rl.judge_server import Reply, serve
from tests.rl.test_loop import base, config, rows  # noqa: F401  (a fixture)
from train.run import open_run

Seen = list[dict[str, Any]]
FAILING = {f"rubric {n}" for n in range(0, 40, 3)}


@pytest.fixture
def rubric_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "rubric": f"rubric {n}"}) + "\n" for n in range(40)))
    return str(path)


def _run(run: RunConfig, note: str) -> str:
    """Writes down what each iteration saw and trained on."""
    improve = rl.loop.improve

    def watched(context: Any, engine: Any, experience: Experience, *rest: Any) -> dict[str, float]:
        seen = [
            {"rubric": s.request.rubric, "answer": answer(s), "reward": s.reward, "parts": dict(s.reward_parts)}
            for s in experience.samples
        ]
        trained = [[s.request.rubric, s.reward] for s in experience.trained]
        with open(note, "a") as file:
            file.write(json.dumps({"seen": seen, "trained": trained}) + "\n")
        return improve(context, engine, experience, *rest)

    rl.loop.improve = watched  # type: ignore[assignment]  (this process alone)
    context = open_run(run, frozenset())
    assert context is not None
    with context:
        (rl.loop.run if run.stage == "grpo" else rl.evaluate.run)(context)
    return "finished"


def go(run: RunConfig, note: Path, world: int = 1) -> None:
    assert run_ranks(_run, world, run, str(note)) == ["finished"] * world


def settings(url: str, path: str, **changes: Any) -> RLConfig:
    fields = {"outcome": "judge", "judge_url": url, "judge_model": "m", "judge_key_env": None, "judge_retries": 0}
    fields |= {"prompts_per_step": 4, "group_size": 6, "max_new_tokens": 32, "pack_len": 96, "judge_workers": 2}
    return RLConfig(**(fields | {"path": path} | changes))


def behave(prompt: str, n: int) -> Reply:
    """0.1 to 0.7 by the prompt's length, so that the scores of a group differ; nonsense for the rubrics of FAILING."""
    fails = any(f"\n{rubric}\n" in prompt for rubric in FAILING)
    return Reply("no idea" if fails else f'{{"score": 0.{len(prompt) % 7 + 1}}}')


def answer(sample: Sample) -> str:
    """What there is to judge; "" where the thought was not closed or the answer cut off."""
    return (extract_answer(sample.text) or "") if sample.finish_reason == "stop" else ""


def answered(seen: Seen) -> set[tuple[str, str]]:
    """Rubric and answer of each sample that has one, each pair once: what a judge is asked about."""
    return {(s["rubric"], s["answer"]) for s in seen if s["answer"]}


def test_failed_judgements_drop_their_groups_and_none_is_trained_as_zero(
    base: str,  # noqa: F811
    rubric_rows: str,
    tmp_path: Path,
):
    with serve(behave) as server:
        run = config(tmp_path / "run", base, rl=settings(server.url, rubric_rows), steps=2)
        go(run, tmp_path / "note")
        asked = len(server.asked)
        # The same run again, with the ledger of the first: scores are found there, failures are asked about again.
        again = tmp_path / "again"
        again.mkdir()
        shutil.copy(tmp_path / "run" / "judge.rank_0.jsonl", again)
        go(config(again, base, rl=run.rl, steps=2), tmp_path / "note_again")
    notes = [json.loads(line) for line in (tmp_path / "note").read_text().splitlines()]
    found, repeated = rows(tmp_path / "run"), rows(again)
    assert len(notes) == len(found) == 2
    for row, note in zip(found, notes, strict=True):
        seen, trained = note["seen"], note["trained"]
        failed = [s for s in seen if s["reward"] is None]
        lost = {s["rubric"] for s in failed}
        assert lost <= FAILING and lost == {rubric for rubric, _ in answered(seen)} & FAILING
        assert row["reward/failed_grades"] == len(failed) and row["reward/failed_groups"] == len(lost)
        assert row["judge/failures"] == len(answered(failed))
        assert trained == [[s["rubric"], s["reward"]] for s in seen if s["rubric"] not in lost]
        graded = [s for s in seen if s["reward"] is not None]
        for s in graded:  # 0 where there is no answer, and nowhere else
            assert (s["reward"] > 0) == bool(answered([s])) and s["reward"] == s["parts"]["judge"]
        assert row["reward/mean"] == pytest.approx(sum(s["reward"] for s in graded) / len(graded))
    assert sum(row["reward/failed_groups"] for row in found) >= 1
    assert any(reward > 0 for note in notes for _, reward in note["trained"])

    assert asked == sum(row["judge/requests"] for row in found)
    failures = sum(row["judge/failures"] for row in found)
    assert len(server.asked) - asked == sum(row["judge/requests"] for row in repeated) == failures
    kept = [{k: v for k, v in row.items() if not k.startswith("judge/")} for row in (*found, *repeated)]
    assert kept[:2] == kept[2:]


def test_evaluate_asks_the_judge_too(base: str, rubric_rows: str, tmp_path: Path):  # noqa: F811
    with serve(lambda prompt, n: Reply('{"score": 0.5}')) as server:
        run = config(tmp_path / "run", base, "evaluate", settings(server.url, rubric_rows, eval_prompts=10))
        run = replace(run, train=replace(run.train, eval_sequences=2))
        go(replace(run, data=replace(run.data, seq_len=40, heldout=0.5)), tmp_path / "note", world=2)
        found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["judge/requests"] == len(server.asked) > 0
    assert found["reward/accuracy"] == pytest.approx(0.5 * len(server.asked) / 10)
    assert {path.name for path in (tmp_path / "run").glob("judge.*")} == {"judge.rank_0.jsonl", "judge.rank_1.jsonl"}
