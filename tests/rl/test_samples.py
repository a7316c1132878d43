"""samples.jsonl: what a row tells, which samples are shown, and that the file survives kills and hostile text."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.schema import RLConfig
from data.tokenizer import load_tokenizer
from rl.groups import Experience
from rl.messages import Sample, Trace
from rl.samples import COLUMNS, SamplesWriter, cells, places_shown, sample_row, sample_rows, shown_samples
from rl.tools.calculator import Calculator
from tests.rl.played import play, says
from tests.rl.samples import make_sample

TOKENIZER = load_tokenizer("bytes")
RL = RLConfig(length_penalty=0.5, format_weight=0.25)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def row_of(sample: Sample, advantage: float | None = None, trace: Trace | None = None) -> dict[str, Any]:
    return sample_row(sample, advantage, trace, [sample.reward], TOKENIZER, RL)


def test_rows_are_cut_back_on_resume(tmp_path: Path):
    sample = make_sample([1], [2], [0.0], text='</think>"\n\x00\ud800<script>', prompt="p", answer="a")
    writer = SamplesWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, [row_of(sample, 0.5), row_of(sample)])
    whole = (tmp_path / "samples.jsonl").read_bytes()
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 1, "torn')
    SamplesWriter(tmp_path, resume_step=2)
    assert [row["step"] for row in lines(tmp_path)] == [1, 1, 2, 2]
    assert lines(tmp_path)[0]["text"] == sample.text and lines(tmp_path)[1]["advantage"] is None
    again = SamplesWriter(tmp_path, resume_step=2)
    assert [row[0] for row in again.table()] == [1, 1, 2, 2]
    again.write(3, [row_of(sample, 0.5), row_of(sample)])
    assert (tmp_path / "samples.jsonl").read_bytes() == whole


def test_a_fresh_start_drops_what_an_attempt_without_checkpoint_left(tmp_path: Path):
    SamplesWriter(tmp_path).write(1, [row_of(make_sample([1], [2], [0.0]), 0.0)])
    assert list(SamplesWriter(tmp_path).table()) == [] and lines(tmp_path) == []


def test_a_row_tells_what_the_sampler_did_and_what_the_update_saw():
    drawn = make_sample(
        [65, 66], [*"é!".encode(), TOKENIZER.eos_token_id], [-0.5, math.nan, -1e-9, -1.2345678], "é!", rubric="be brief"
    )
    versions, kept = [0, 0, 3, 3, 4, 4], [[], [], [1, 2], [], [3], []]
    tokens = replace(drawn.tokens, weight_versions=versions, kept_sets=kept)
    parts = {"exact_match": 1.0, "format": 1.0, "length": 0.5}
    sample = replace(drawn, tokens=tokens, reward_parts=parts, reward=1.0)
    trace = Trace([-0.5, -1.0, -2.0, -3.0], [1.0, 0.5, math.inf, 1.25], [False, False, True, False], True, 0.125)
    row = sample_row(sample, -0.5, trace, [1.0, 2.0, None], TOKENIZER, RL)
    assert row["per_token"] == {
        "text": ["", "é", "!", ""],
        "between": [],
        "behaviour_logprobs": [-0.5, None, -1e-9, -1.23457],
        "logprobs": [-0.5, -1.0, -2.0, -3.0],
        "ratios": [1.0, 0.5, None, 1.25],
        "clipped": [False, False, True, False],
        "kept": [2, None, 1, None],
    }
    assert row["max_log_ratio"] == pytest.approx(math.log(2), abs=1e-6) and row["clip_frac"] == 0.25
    assert row["off_policy_masked"] and row["off_policy_kl"] == 0.125
    assert row["weight_versions"] == [3, 4] and row["rubric"] == "be brief"
    assert row["group_size"] == 3 and row["group_reward"] == 1.5
    assert row["reward_terms"] == {"exact_match": 0.75, "format": 0.25} and sum(row["reward_terms"].values()) == 1.0
    json.dumps(row, allow_nan=False)
    found = dict(zip(COLUMNS, cells(row), strict=True))
    assert found["reward_parts"] == json.dumps(parts) and found["weight_versions"] == "[3, 4]"
    assert found["off_policy_masked"] is True and not any(isinstance(cell, dict | list) for cell in found.values())


def test_what_was_not_trained_is_null():
    row = row_of(make_sample([65], [66, 67], [-1.0, -2.0], "BC"))
    untold = ("reward", "advantage", "max_log_ratio", "clip_frac", "off_policy_kl", "off_policy_masked", "group_reward")
    assert [row[name] for name in (*untold, "rubric")] == [None] * 8 and row["reward_terms"] == {}
    per_token = row["per_token"]
    assert [per_token[name] for name in ("logprobs", "ratios", "clipped", "kept")] == [None] * 4
    assert per_token["text"] == ["B", "C"]
    assert per_token["behaviour_logprobs"] == [-1.0, -2.0]


def test_a_stop_string_takes_its_text_from_the_tokens_that_held_it():
    sampled = list(b"ab</x>")
    row = row_of(make_sample([65], sampled, [-1.0] * 6, "ab"))
    assert row["per_token"]["text"] == ["a", "b", "", "", "", ""]
    assert row_of(make_sample([65], sampled, [-1.0] * 6, "b"))["per_token"]["text"] is None  # not this text


def test_a_row_tells_of_calls_and_of_what_stands_between_the_tokens():
    add, fail = ("calculator", {"expression": "17 * 3"}), ("calculator", {"expression": "1 / 0"})
    said = [says("é", "", add, fail), says("so", "51"), says("more", "52")]
    sample = replace(play(said, [Calculator()], ["and one?"], env="calc:2"), verdict_error="verify: late")
    first, second = sample.rows
    row = row_of(sample)
    assert row["env"] == "calc:2" and row["num_calls"] == 2 and row["verdict_error"] == "verify: late"
    wanted = {"name": "calculator", "arguments": add[1], "result": "51", "error": False, "seconds": 0.034}
    assert row["calls"][0] == wanted | {"ended": False}
    assert row["calls"][1]["error"] and row["calls"][1]["result"] == "Error: division by zero"
    results, anew = row["per_token"]["between"]
    told = "\n<result>51</result>\n<result>Error: division by zero</result>\n"
    assert results["text"] == f"\n\n<function_results>{told}</function_results>\n\n<think>" and not results["row"]
    prompt = second.ids[: second.loss_mask.index(True)]
    assert anew["row"] and anew["text"] == TOKENIZER.decode(prompt) and "and one?" in anew["text"]
    pieces = row["per_token"]["text"]
    sizes = [stop - start for part in sample.rows for start, stop in part.messages()]
    assert results["before"] == sizes[0] and anew["before"] == sizes[0] + sizes[1] and len(pieces) == sum(sizes)
    places = [0, results["before"], anew["before"], len(pieces)]
    assert ["".join(pieces[a:b]) for a, b in zip(places, places[1:], strict=False)] == said
    assert row["text"] == "é\nso\nmore</think>52" and row["tokens"] == first.num_sampled + second.num_sampled
    slow = tuple(replace(call, seconds=1 / 3) for call in sample.calls)
    assert [call["seconds"] for call in row_of(replace(sample, calls=slow))["calls"]] == [0.333333] * 2
    found = dict(zip(COLUMNS, cells(row), strict=True))
    assert (found["env"], found["num_calls"]) == ("calc:2", 2) and "calls" not in found
    plain = row_of(make_sample([65], [66], [-1.0], "B"))
    assert plain["env"] is plain["verdict_error"] is None and plain["num_calls"] == 0 and plain["calls"] == []


def group(prompt: int, size: int) -> list[Sample]:
    return [make_sample([65], [66], [0.0], prompt_index=prompt, sample_index=i) for i in range(size)]


def test_one_of_each_prompt_and_one_group_with_advantages_are_shown():
    groups = [group(prompt, 10) for prompt in range(0, 20, 2)]  # a rank of two has every second prompt
    samples = [sample for one in groups for sample in one]
    trained = [sample for one in groups[1:] for sample in one]
    advantages = [0.0] * 20 + [0.5] * 70
    found = Experience(samples, trained, advantages)
    places = [(s.request.prompt_index, s.request.sample_index) for s in shown_samples(found)]
    assert places == [(0, 0), (2, 0), (4, 0), *((6, i) for i in range(8)), (8, 0), (10, 0), (12, 0), (14, 0)]
    shown = places_shown(found)
    assert [places[0], *((s.request.prompt_index, s.request.sample_index) for s in (trained[i] for i in sorted(shown)))]
    assert len(shown) == 14 and all(trained[i] is not samples[0] for i in shown)
    found.traces = {20 + i: Trace([-1.0], [1.0], [False], False, float(i)) for i in range(8)}
    rows = sample_rows(found, TOKENIZER, RL)
    assert [row["off_policy_kl"] for row in rows] == [None] * 3 + [float(i) for i in range(8)] + [None] * 4
    assert [row["advantage"] for row in rows][:4] == [None, 0.0, 0.0, 0.5] and rows[0]["group_size"] == 10
    assert shown_samples(Experience([])) == []
