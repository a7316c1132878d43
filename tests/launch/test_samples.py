"""The sample viewer: its data is whole, only its own script runs, and nothing a model writes can act in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from launch.samples import main, write_viewer
from launch.samples_data import load_samples
from launch.samples_page import SCRIPT
from tests.launch.html_page import Page
from tests.launch.runs import write_run
from tests.launch.tool_samples import HOSTILE, SIEVE, write_tool_samples

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--<script>\" onload='alert(3)"
OLD = {"domain": "arithmetic", "prompt": "1+1=?", "answer": "2", "text": "2", "reward": 1.0, "advantage": 0.5}


def full_row(step: int = 1, text: tuple[str, ...] = ("é", "", "b", ""), **changes: Any) -> dict[str, Any]:
    n = len(text)
    per_token = {"text": list(text), "behaviour_logprobs": [-0.123456] * n, "logprobs": [-0.25] * n}
    per_token |= {"ratios": [1.2345678] * n, "clipped": [i == 2 for i in range(n)], "kept": [None] * (n - 1) + [7]}
    row = {"step": step, **OLD, "text": "".join(text), "rubric": None, "finish_reason": "stop", "tokens": n}
    row |= {"reward_parts": {"exact_match": 1.0}, "reward_terms": {"exact_match": 0.9}, "prompt_index": 3}
    row |= {"sample_index": 1, "group_size": 4, "group_reward": 0.5, "weight_versions": [0], "max_log_ratio": 0.21}
    row |= {"clip_frac": 0.25, "off_policy_kl": 0.01, "off_policy_masked": True, "per_token": per_token}
    return row | changes


def write_rows(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data_of(source: str) -> dict[str, Any]:
    """What the page's script finds, between the tags as a browser sees them."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script', source, re.DOTALL | re.IGNORECASE)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_page_holds_every_sample_whole(tmp_path: Path) -> None:
    runs = [write_rows(tmp_path / "a", [full_row(1), {"step": 2, **OLD}]), write_rows(tmp_path / "b", [full_row(5)])]
    data = data_of(write_viewer(runs, tmp_path / "out").read_text())
    assert data["names"] == ["a", "b"] and [row["run"] for row in data["rows"]] == [0, 0, 1]
    new, old, _ = data["rows"]
    wanted = {name: value for name, value in full_row(1).items() if name not in ("text", "per_token")}
    assert {name: new[name] for name in wanted} == wanted
    assert new["per_token"] == {
        "text": ["é", "", "b", ""],
        "behaviour_logprobs": [-0.1235] * 4,
        "logprobs": [-0.25] * 4,
        "ratios": [1.2346] * 4,
        "clipped": [2],
        "kept": [None, None, None, 7],
        "ends": [3],
    }
    assert new["flow"] == [{"kind": "thought", "first": 0, "stop": 4}]
    assert old["flow"] == [{"kind": "thought", "text": "2"}] and old["per_token"] is None
    assert old["reward"] == 1.0 and old["off_policy_kl"] is old["num_calls"] is old["env"] is None
    assert old.keys() == new.keys()


def test_only_the_script_whose_hash_the_policy_names_can_run(tmp_path: Path) -> None:
    source = write_viewer([write_rows(tmp_path / "run", [full_row()])], tmp_path / "out").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = Page(source)
    (policy,) = [tag["content"] for name, tag in page.tags if name == "meta" and "http-equiv" in tag]
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "eval" not in policy
    assert "\r" not in script  # what a browser hashes is the text as it parsed it
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert way not in script
    assert not re.search(r"https?://|url\(|@import", source)
    assert not {"link", "img", "iframe", "object"} & {name for name, _ in page.tags}
    assert script == SCRIPT
    ids = set(re.findall(r'\$\("(\w+)"\)', script))
    assert ids <= {tag.get("id") for _, tag in page.tags}  # every element that the script asks for is there


def test_hostile_text_stays_data(tmp_path: Path) -> None:
    row = full_row(text=(ATTACK, "\u202e\ud800", ""), prompt=ATTACK, answer=ATTACK, rubric=ATTACK, domain=ATTACK)
    row |= {"finish_reason": ATTACK, "reward_parts": {ATTACK: 1.0}, "reward_terms": {"__proto__": 1.0}, ATTACK: ATTACK}
    run = write_rows(tmp_path / "<script>alert(0)<b>\udcff", [row])
    source = write_viewer([run, write_rows(tmp_path / "plain", [full_row()])], tmp_path / "out").read_text()
    page = Page(source)
    assert page.count("script") == 2 and source.lower().count("</script") == 2 and "<!--" not in source
    assert "img" not in {name for name, _ in page.tags} and page.open == [] and page.unbalanced == []
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = data_of(source)["rows"][0]
    assert shown["per_token"]["text"] == [ATTACK, "⟨U+202E⟩⟨U+D800⟩", ""] and shown["domain"] == ATTACK
    assert shown["reward_parts"] == {ATTACK: 1.0} and "&lt;script&gt;alert(0)" in source


@pytest.mark.parametrize(
    "per_token",
    [7, {"text": ["other"]}, {"text": [1, 2]}, {"text": "2"}, {"ratios": [1.0]}, None],
    ids=["no-object", "other-text", "numbers", "string", "no-text", "null"],
)
def test_pieces_that_are_not_the_text_are_left_out(tmp_path: Path, per_token: Any) -> None:
    (row,) = load_samples([write_rows(tmp_path / "run", [{"step": 1, **OLD, "per_token": per_token}])]).rows
    assert row["per_token"] is None and row["flow"] == [{"kind": "thought", "text": "2"}]


def test_values_of_other_types_become_null(tmp_path: Path) -> None:
    odd = {"step": "x", "reward": 1e999, "advantage": True, "weight_versions": {"a": 1}, "reward_parts": [1]}
    per_token = {"text": ["a", "b"], "ratios": [1.0], "logprobs": [None, "x"], "clipped": [True] * 9, "kept": {}}
    run = write_rows(tmp_path / "run", [odd | {"text": "ab", "prompt": ["p"], "per_token": per_token}, [1], None])
    (run / "samples.jsonl").open("a").write('{"torn')
    (row,) = load_samples([run]).rows
    assert [row[name] for name in ("step", "reward", "advantage", "domain")] == [None] * 4
    assert row["weight_versions"] == [] and row["reward_parts"] == {} and row["prompt"] == '["p"]'
    told = row["per_token"]
    assert told["ratios"] is told["kept"] is None and told["logprobs"] == [None, None] and told["clipped"] == [0, 1]


# Samples with tools


@pytest.fixture(scope="module")
def tool_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_samples(tmp_path_factory.mktemp("runs") / "run")


def kinds(row: dict[str, Any]) -> list[str]:
    return [part["kind"] for part in row["flow"]]


def text_at(row: dict[str, Any], part: dict[str, Any]) -> str:
    return "".join(row["per_token"]["text"][part["first"] : part["stop"]])


def results(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in row["flow"] if part["kind"] == "result"]


def test_a_sample_with_tools_is_one_flow(tool_run: Path) -> None:
    two_calls, failed, broken, alone, cells, *_ = load_samples([tool_run]).rows
    called = ["thought", "call", "result"]
    assert kinds(two_calls) == [*called, *called, "thought", "answer"]
    first, call, result, *_, answer = two_calls["flow"]
    assert text_at(two_calls, first) == "First all of them: 17 · 23 in each of 129 crates.</think>"
    assert call["calls"] == [{"name": "calculator", "arguments": [("expression", "17 * 23 * 129")]}]
    written = text_at(two_calls, call)
    assert written.startswith("\n\n<｜DSML｜function_calls>") and written.endswith("</｜DSML｜function_calls>")
    wanted = {"name": "calculator", "text": "50439", "error": False, "seconds": 0.034, "ended": False, "unread": False}
    assert result == {"kind": "result", **wanted}
    assert text_at(two_calls, answer) == "42032.5" and two_calls["turns"] == 3 and two_calls["num_calls"] == 2
    ends = [part["stop"] - 1 for part in two_calls["flow"] if part["kind"] in ("call", "answer")]
    assert two_calls["per_token"]["ends"] == ends and two_calls["errors"] == two_calls["malformed"] == 0

    assert [part["error"] for part in results(failed)] == [False, True, False] and failed["errors"] == 1
    assert kinds(broken) == [*called, "thought", "call", "read", *called, "thought", "answer"]
    _, _, _, _, malformed, read, *_ = broken["flow"]
    assert "in quotes" in malformed["reason"] and malformed["calls"] == [] and broken["malformed"] == 1
    assert read["text"].startswith("Error: malformed call at") and "function_results" not in read["text"]
    assert kinds(alone) == ["thought", "answer"] and text_at(alone, alone["flow"][1]) == "42032"

    assert kinds(cells) == [*called, "thought", "aside", "call", "result", *called]
    assert text_at(cells, cells["flow"][4]) == "I run it again."
    assert cells["flow"][5]["calls"][0]["arguments"] == [("code", SIEVE)]
    assert results(cells)[-1]["ended"] and not results(cells)[-1]["unread"] and cells["errors"] == 1


def test_new_contexts_and_what_was_not_read(tool_run: Path) -> None:
    *_, asked, managed, stopped, plain = load_samples([tool_run]).rows
    assert kinds(asked) == ["thought", "call", "result", "result", "thought", "answer", "anew", "thought", "answer"]
    (anew,) = [part for part in asked["flow"] if part["kind"] == "anew"]
    assert anew["text"].endswith("<｜User｜>And when?<｜Assistant｜><think>") and anew["size"] == len(anew["text"])
    arguments = dict(asked["flow"][1]["calls"][0]["arguments"])
    assert json.loads(arguments["filter"])["place"]["kinds"] == ["log", "letter"] and "\n" in arguments["filter"]
    assert [part["text"] == "" for part in results(asked)] == [False, True]
    assert "anew" in kinds(managed) and len(results(managed)) == 3, "results are shown that the new context lacks"
    assert [part["unread"] for part in results(stopped)] == [False, True] and stopped["turns"] == 2
    assert stopped["verdict_error"] == "verify: TimeoutError"
    assert kinds(plain) == ["thought"] and plain["per_token"]["ends"] == [] and plain["env"] is None


def test_every_token_is_shown_once_and_in_order(tool_run: Path) -> None:
    for row in load_samples([tool_run]).rows:
        spans = [(part["first"], part["stop"]) for part in row["flow"] if "first" in part]
        assert [stop for _, stop in spans[:-1]] == [first for first, _ in spans[1:]]
        assert spans[0][0] == 0 and spans[-1][1] == len(row["per_token"]["text"]) and all(a < b for a, b in spans)


@pytest.mark.parametrize(
    ("pieces", "reason", "spans", "ends"),
    [
        (("a</think>", "", "é", ""), "stop", [("thought", 0, 1), ("answer", 1, 4)], [3]),  # é is of two tokens
        (("a</thi", "nk>b", "c"), "stop", [("thought", 0, 1), ("answer", 1, 3)], []),  # of both: the later has it
        (("a</think>b", "c"), "stop", [("answer", 0, 2)], []),
        (("a</think>", ""), "stop", [("thought", 0, 2)], [1]),
        (("a</think>", "b", ""), "length", [("thought", 0, 1), ("answer", 1, 3)], []),  # cut inside a character
        (
            ("a</think>", "b", "<｜DSML｜function", "_calls>"),
            "length",
            [("thought", 0, 1), ("aside", 1, 2), ("call", 2, 4)],
            [],
        ),
    ],
)
def test_tokens_at_borders(tmp_path: Path, pieces: Any, reason: str, spans: Any, ends: list[int]) -> None:
    (row,) = load_samples([write_rows(tmp_path / "run", [full_row(text=pieces, finish_reason=reason)])]).rows
    assert [(part["kind"], part["first"], part["stop"]) for part in row["flow"]] == spans
    assert row["per_token"]["ends"] == ends


def test_every_kind_of_part_can_be_drawn_and_every_filter_is_there(tool_run: Path, tmp_path: Path) -> None:
    source = write_viewer([tool_run], tmp_path).read_text()
    rows = data_of(source)["rows"]
    drawn = re.search(r"const DRAWN = \{(.*?)\n\};", SCRIPT, re.DOTALL)
    assert drawn
    assert set(re.findall(r"^  (\w+): ", drawn[1], re.MULTILINE)) == {kind for row in rows for kind in kinds(row)}
    page = Page(source)
    assert page.count("select", id="env") == 1
    options = {tag.get("value") for name, tag in page.tags if name == "option"}
    assert {"num_calls", "calc:2", "archive:3", "archive", "turns"} <= options
    other = Page(write_viewer([write_rows(tmp_path / "old", [full_row()])], tmp_path).read_text())
    assert other.count("select", id="env") == 0, "nothing to choose from"


@pytest.mark.parametrize("text", [ATTACK, HOSTILE, "</result>\n<result>", "<｜User｜>\u202e\x00\ud800"])
def test_hostile_calls_and_results_stay_data(tmp_path: Path, text: str) -> None:
    said = f't</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="{text}">\n'
    said += f'<｜DSML｜parameter name="{text}" string="true">{text}</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    said += "</｜DSML｜function_calls>"
    call = {"name": text, "arguments": {text: {text: [text]}}, "result": text, "error": True, "seconds": text}
    row = full_row(text=(said, text), env=text, verdict_error=text, calls=[call, call | {"arguments": text}])
    row["per_token"]["between"] = [{"before": 1, "text": text}, {"before": 2, "text": text, "row": True}]
    source = write_viewer(
        [write_rows(tmp_path / "run", [row, row | {"text": "other", "step": 2}])], tmp_path
    ).read_text()
    page = Page(source)
    assert page.count("script") == 2 and source.lower().count("</script") == 2 and "<!--" not in source
    assert "img" not in {name for name, _ in page.tags} and page.open == [] and page.unbalanced == []
    assert not set("\u202e\x00\ud800") & set(source)
    for shown in data_of(source)["rows"]:
        assert [part["name"] for part in results(shown)] == [shown["env"]] * 2 and shown["errors"] == 2
        assert {part["text"] for part in shown["flow"] if part["kind"] in ("result", "read")} == {shown["env"]}


def test_calls_and_places_of_other_types_are_left_out(tmp_path: Path) -> None:
    row = full_row(text=("a</think>", "b"), calls=[7, None, {"name": 1}, {"name": "t", "result": 3, "error": "yes"}])
    entry = {"before": 1, "text": "shown", "row": "yes"}
    odd = [None, 3, "x", {"text": "no place"}, {"before": 1}, {"before": 1, "text": ["x"]}]
    odd += [{"before": place, "text": "x"} for place in (-1, 3, 10**30, 1.0, "1", None, True)]
    row["per_token"]["between"] = [*odd, entry]
    row["text"] = "a\nb"
    (shown,) = load_samples([write_rows(tmp_path / "run", [row])]).rows
    assert [part for part in shown["flow"] if part["kind"] == "read"] == [{"kind": "read", "text": "shown"}]
    assert kinds(shown) == ["thought", "read", "thought", "call", "result"], "a call that no text has comes last"
    assert results(shown)[0]["text"] == "" and results(shown)[0]["error"] is False and shown["errors"] == 0
    for between, calls in ((7, {}), ({"before": 1, "text": "x"}, "x"), (None, None)):
        plain = full_row(text=("a</think>", "b"), calls=calls)
        plain["per_token"]["between"] = between
        (shown,) = load_samples([write_rows(tmp_path / "plain", [plain])]).rows
        assert kinds(shown) == ["thought", "answer"]


def test_places_at_either_end_and_out_of_order(tmp_path: Path) -> None:
    row = full_row(text=("a", "b"))
    row["per_token"]["between"] = [{"before": place, "text": f"at {place}", "row": True} for place in (2, 0, 1)]
    row["text"] = "a\nb"
    (shown,) = load_samples([write_rows(tmp_path / "run", [row])]).rows
    assert [part.get("text") for part in shown["flow"]] == ["at 0", None, "at 1", None, "at 2"]


def test_a_record_is_believed_only_of_its_own_call(tool_run: Path, tmp_path: Path) -> None:
    raw = json.loads((tool_run / "samples.jsonl").read_text().splitlines()[0])
    raw["calls"][0]["arguments"] = {"expression": "1 + 1"}
    (shown,) = load_samples([write_rows(tmp_path / "run", [raw])]).rows
    thought_call_read = ["thought", "call", "read"]
    assert kinds(shown) == [*thought_call_read, *thought_call_read, "thought", "answer", *["call", "result"] * 2]
    assert shown["flow"][2]["text"] == "50439", "what the model read is still there"
    raw["calls"] = [raw["calls"][1]]
    raw["per_token"]["between"][1]["text"] = "something else"
    (shown,) = load_samples([write_rows(tmp_path / "run", [raw])]).rows
    assert kinds(shown) == [*thought_call_read, "thought", "call", "result", "read", "thought", "answer"]
    assert shown["flow"][6]["text"] == "something else" != results(shown)[0]["text"]


def test_tokens_that_are_not_of_the_text_leave_text_and_calls(tool_run: Path, tmp_path: Path) -> None:
    raw = json.loads((tool_run / "samples.jsonl").read_text().splitlines()[0])
    for text in ("other</think>42032.5", raw["text"] + "!", raw["text"][1:]):
        (shown,) = load_samples([write_rows(tmp_path / "run", [raw | {"text": text}])]).rows
        assert shown["per_token"] is None and shown["turns"] == 0
        assert kinds(shown) == ["thought", "answer", "call", "result", "call", "result"]
        assert shown["flow"][0]["text"] + shown["flow"][1]["text"] == text


def test_arguments_nested_too_deep_cost_their_own_text_alone(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", [])
    for depth in range(900, 1000, 3):
        nested = "[" * depth + "]" * depth
        call = f'{{"name": "t", "arguments": {{"x": {nested}}}, "result": "r"}}'
        (run / "samples.jsonl").open("a").write(f'{{"step": {depth}, "text": "a", "calls": [{call}]}}\n')
    shown = load_samples([run]).rows
    assert shown and all(kinds(row) == ["thought", "call", "result"] for row in shown)


def test_of_a_large_file_the_newest_are_shown(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", [full_row(step) for step in range(200)])
    size = (run / "samples.jsonl").stat().st_size
    found = load_samples([run], size // 4)
    steps = [row["step"] for row in found.rows]
    assert steps == list(range(steps[0], 200)) and 145 < steps[0] < 155
    (note,) = found.notes
    assert "are left out" in note and load_samples([run], size).notes == []


def test_a_run_without_samples_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "pretrain")
    write_rows(tmp_path / "empty", [])
    for argument, reason in [
        ("pretrain", "holds no samples.jsonl: give"),
        ("nowhere", "no run at"),
        ("empty", "holds no samples: give"),
    ]:
        assert main([str(tmp_path / argument)]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("samples: ") and printed.err.count("\n") == 1
        assert reason in printed.err
    assert not list(tmp_path.rglob("report"))
    assert main([]) == 2 and "no run given: python launch/samples.py RUN" in capsys.readouterr().err
    run = write_run(tmp_path / "grpo", "grpo")
    assert main([str(run)]) == 0 and capsys.readouterr().out == f"{run}/report/samples.html\n"
    with pytest.raises(UserError):
        load_samples([run, tmp_path / "empty2"])


def test_the_viewer_links_back_to_a_report(tmp_path: Path) -> None:
    run = write_rows(tmp_path / "run", [full_row()])
    assert Page(write_viewer([run], tmp_path / "out").read_text()).count("a") == 0
    (tmp_path / "out/index.html").touch()
    assert Page(write_viewer([run], tmp_path / "out").read_text()).count("a", href="index.html") == 1
