"""lm-evaluation-harness on our model. What it asks is tested by brute force without the package (it brings 36 others);
where it is installed, local tasks run through the real one, offline.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.errors import UserError
from data.tokenizer import encode_texts, load_tokenizer
from model import Transformer
from rl import harness
from rl.harness import HarnessModel, run_harness
from tests.distributed.helper import run_ranks
from tests.train import tiny

REAL = importlib.util.find_spec("lm_eval") is not None
PAIRS = [("ab c", " de"), ("", "xyz"), ("one two", "three"), ("a", "b"), ("long " * 30, "end"), ("tail ", "word")]


def build() -> Transformer:
    return tiny.build(vocab_size=256)


def model(attention: str = "sparse") -> HarnessModel:
    return HarnessModel(build(), load_tokenizer("bytes"), attention, None)


def ask(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def by_hand(context: str, continuation: str, attention: str) -> tuple[float, bool]:
    """Bytes: the context, then the continuation, one sequence alone."""
    mine = model(attention)
    ids = [mine.prefix, *(context + continuation).encode()][-mine.max_length :]
    asked = len(continuation.encode()) + len(context) - len(context.rstrip())
    with torch.no_grad():
        logits = build().logits(torch.tensor([ids[:-1]]), attention=attention)[0]
    rows = logits.log_softmax(-1)[-asked:]
    targets = torch.tensor(ids[-asked:])
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_packed_requests_score_as_each_alone(attention: str) -> None:
    def scored() -> tuple[list[tuple[float, bool]], int]:
        asked = model(attention)
        return asked.loglikelihood([ask(*pair) for pair in PAIRS]), asked.truncated

    ((found, truncated),) = run_ranks(scored, 1)
    expected = [by_hand(*pair, attention) for pair in PAIRS]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-4) and mine[1] == theirs[1]
    assert truncated == 1  # 150 bytes of context against 128 positions
    two = run_ranks(scored, 2)
    assert sum(count for _, count in two) == 1
    for ranks, _ in two:
        assert [logp for logp, _ in ranks] == pytest.approx([logp for logp, _ in found], abs=1e-4)


def test_greedy_answers_are_said_to_be_greedy() -> None:
    """On a letter whose likeliest next byte is a character of its own."""
    net, mine = build(), model()
    for letter in "abcdefghijklmnopqrstuvwxyz":
        with torch.no_grad():
            best = int(net.logits(torch.tensor([[mine.prefix, ord(letter)]]))[0, -1].argmax())
        if 33 <= best < 127:
            break
    other = "y" if chr(best) == "x" else "x"

    def said() -> tuple[list[str], list[tuple[float, bool]]]:
        asked = model()
        answers = asked.generate_until([ask(letter, {"max_gen_toks": 1})])
        return answers, asked.loglikelihood([ask(letter, chr(best)), ask(letter, other)])

    (((answer,), scored),) = run_ranks(said, 1)
    assert answer == chr(best) and [right for _, right in scored] == [True, False]


def test_answers_end_before_a_stop_string_and_in_the_order_asked() -> None:
    def answers() -> list[str]:
        asked = model()
        full = asked.generate_until([ask("ab", {"max_gen_toks": 12}), ask("cd", {"max_gen_toks": 6})])
        stop = full[0][4]
        cut = asked.generate_until([ask("ab", {"max_gen_toks": 12, "until": ["", stop]})])
        warm = {"max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "until": "\n\n"}
        mixed = asked.generate_until([ask("ab", warm), ask("cd", {"max_gen_toks": 6})])
        return [*full, stop, *cut, *mixed]

    (found,) = run_ranks(answers, 1)
    full, second, stop, cut, _, again = found
    assert cut == full[: full.index(stop)] and again == second
    assert found == run_ranks(answers, 2)[1]


def test_a_task_without_the_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"pip install 'winnow\[harness\]'"):
        run_harness(model(), ["x"])


def test_windows_of_a_long_text_ask_for_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's windows stood in for: half of what fits each."""

    def windows(ids: list[int], prefix: int, longest: int, context: int) -> Any:
        step = longest // 2
        for start in range(0, len(ids), step):
            seen = [prefix, *ids][max(0, start + step - longest) : start + len(ids[start : start + step])]
            yield seen, ids[start : start + step]

    fake = types.ModuleType("lm_eval.utils")
    fake.get_rolling_token_windows = windows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.utils", fake)
    text = "the quick brown fox " * 15

    def rolling() -> list[float]:
        return model().loglikelihood_rolling([ask("short"), ask(text), ask("")])

    (found,) = run_ranks(rolling, 1)
    assert found[0] == pytest.approx(by_hand("", "short", "sparse")[0], abs=1e-4) and found[2] == 0.0
    net, ids = build(), encode_texts(load_tokenizer("bytes"), [text])[0]
    longest = net.config.max_position_embeddings - 1
    parts = []
    for seen, asked in windows(ids, model().prefix, longest, 1):
        with torch.no_grad():
            rows = net.logits(torch.tensor([seen]))[0].log_softmax(-1)[-len(asked) :]
        parts.append(float(rows.gather(1, torch.tensor(asked)[:, None]).sum()))
    assert len(parts) > 3 and found[1] == pytest.approx(math.fsum(parts), abs=1e-3)


def test_requests_of_like_length_are_packed_up_to_the_budget() -> None:
    lengths = [5000, 10, 4090, 3, 3]
    groups = list(harness._packed(lengths))
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3, 4]
    assert groups == [[3, 4, 1], [2], [0]]


def test_a_metric_that_one_attention_lacks_has_no_value_there() -> None:
    found = harness.side_by_side({"t": {"acc": 0.5, "ppl": 9.0}}, {"t": {"acc": 0.25, "bits": 2.0}})
    assert [(row["metric"], row["dense"], row["sparse"]) for row in found] == [
        ("acc", 0.5, 0.25), ("ppl", 9.0, None), ("bits", None, 2.0)
    ]  # fmt: skip


@pytest.mark.skipif(not REAL, reason="lm-eval is not installed: pip install 'winnow[harness]' runs this test")
def test_a_local_task_runs_through_the_real_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": f"{a}+{b}=", "choices": [str(a + b), str(a - b)], "gold": 0} for a in (7, 8) for b in (1, 2)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    common = [
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'sums.jsonl'}}}}}",
        "test_split: test",
        'doc_to_text: "{{question}}"',
    ]
    choice = [
        "task: own_sums",
        "output_type: multiple_choice",
        *common,
        "doc_to_choice: choices",
        "doc_to_target: gold",
    ]
    said = ["task: own_said", "output_type: generate_until", *common, 'doc_to_target: "{{choices[0]}}"']
    said += ["generation_kwargs: {until: ['+'], max_gen_toks: 4}", "metric_list: [{metric: exact_match}]"]
    rolled = ["task: own_text", "output_type: loglikelihood_rolling", *common[:3], 'doc_to_text: ""']
    rolled += ['doc_to_target: "{{question}}"', "metric_list: [{metric: bits_per_byte}]"]
    for task in (choice, said, rolled):
        (tmp_path / f"{task[0].split()[1]}.yaml").write_text("\n".join(task) + "\n")

    def run() -> dict[str, dict[str, float]]:
        return run_harness(model("dense"), ["own_sums", "own_said", "own_text"], str(tmp_path))

    one, (first, second) = run_ranks(run, 1)[0], run_ranks(run, 2)
    mine = model("dense")
    right = 0  # the harness puts a space before a choice
    for row in rows:
        good, bad = (by_hand(str(row["question"]), f" {choice}", "dense") for choice in row["choices"])
        right += good > bad
    assert one["own_sums"]["acc,none"] == pytest.approx(right / len(rows))
    assert 0 <= one["own_said"]["exact_match,none"] <= 1
    bits = -sum(by_hand("", row["question"], "dense")[0] for row in rows) / math.log(2)
    assert one["own_text"]["bits_per_byte,none"] == pytest.approx(
        bits / sum(len(r["question"]) for r in rows), rel=1e-4
    )
    assert first == second
    assert all(first[task] == pytest.approx(one[task], nan_ok=True) for task in one)
    assert mine.truncated == 0
    with pytest.raises(UserError, match="own_smus is no task"):
        run_harness(mine, ["own_smus"], str(tmp_path))
