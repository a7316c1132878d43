"""The HTML report: what it shows, what it refuses, and that nothing a model writes can act in the page."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conf.errors import UserError
from launch import samples_page
from launch.page_command import parse, server
from launch.report import main, write_report
from launch.report_charts import Panel, Series, line_chart, linear_axis, smoothed
from launch.report_data import load_run, run_names
from launch.report_heat import Shade
from launch.report_html import POLICY, text
from launch.report_names import metric, number, quantity, section_of
from tests.launch.html_page import Page, card_with
from tests.launch.runs import summary_row, write_run

ROOT = Path(__file__).resolve().parents[2]
ATTACK = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='alert(3)"


def rendered(runs: list[Path], out: Path, **options: object) -> tuple[str, Page]:
    source = write_report(runs, out, **options).read_text()  # type: ignore[arg-type]
    return source, Page(source)


def figure_of(source: str, key: str) -> str:
    """The card of one metric."""
    return card_with(source, f'"key">{key}')


def test_two_runs_are_laid_over_each_other_in_their_own_colours(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "base"), write_run(tmp_path / "warmup", "dense_warmup", seed=1)]
    source, page = rendered(runs, tmp_path / "out")
    assert page.open == [] and page.unbalanced == []
    both, one = Page(figure_of(source, "loss/lm")), Page(figure_of(source, "loss/indexer_kl"))
    assert [page.count("path", **{"class": "line"}) for page in (both, one)] == [2, 1]
    assert both.count("g", **{"class": "s0"}) == both.count("g", **{"class": "s1"}) == 1
    assert one.count("g", **{"class": "s0"}) == 0  # warmup keeps its colour where it is alone
    for section in ("Losses", "Indexer health", "Experts", "Optimiser", "Performance", "Configuration"):
        assert f">{section}</h2>" in source
    assert "Rewards" not in source
    heat = [card for card in re.findall(r"<figure>.*?</figure>", source, re.DOTALL) if "layer_*/kl ·" in card]
    assert len(heat) == 2  # the profile and the map of the one run that has layers
    assert Page(heat[1]).count("rect") == 4 * 48 + 8  # layers x columns, and the scale


def test_the_page_is_one_file_that_loads_and_runs_nothing(tmp_path: Path) -> None:
    source, page = rendered([write_run(tmp_path / "grpo", "grpo")], tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["index.html"]
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", source)
    assert page.count("meta", **{"http-equiv": "Content-Security-Policy"}) == 1
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_hostile_text_is_shown_and_never_acts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<script>alert(0)<b>", "grpo")
    sample = {"step": ATTACK, "text": ATTACK, "prompt": [ATTACK], "reward": 1e999, "reward_parts": {ATTACK: ATTACK}}
    (run / "samples.jsonl").write_text(json.dumps(sample | {ATTACK: {"deep": ATTACK}}) + "\n")
    (run / "config.yaml").write_text(json.dumps({"stage": ATTACK, ATTACK: ATTACK}))
    (run / "evaluation.json").write_text(json.dumps({ATTACK: ATTACK, f"layer_1/{ATTACK}": 1.0}))
    (run / "error.txt").write_text(ATTACK)
    (run / "alerts.jsonl").write_text(json.dumps({"step": 7, "text": ATTACK}) + '\n{"step": 8, "text": 1}\n{"torn')
    rows = [{"step": i, ATTACK: 0.5, f"indexer/layer_01/{ATTACK}": 0.1 * i} for i in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source, page = rendered([run, write_run(tmp_path / "plain")], tmp_path / "out", summary={ATTACK: {ATTACK: ATTACK}})
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.open == [] and page.unbalanced == []
    assert "step 7: &lt;/pre&gt;&lt;script&gt;" in source and "step 8:" not in source  # an alert is one line of text
    assert source.count("&lt;script&gt;alert(1)") >= 10 and "&lt;script&gt;alert(0)" in source


@pytest.mark.parametrize(
    "hidden, shown",
    [("\u202e", "⟨U+202E⟩"), ("\u200b", "⟨U+200B⟩"), ("\x00", "⟨U+0000⟩"), ("\r", "⟨U+000D⟩"), ("\ud800", "⟨U+D800⟩")]
    + [
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("\u00ad", "⟨U+00AD⟩"),
        ("日本é\n\t", "日本é\n\t"),
        ("<&'\"", "&lt;&amp;&#x27;&quot;"),
    ],
)
def test_hidden_characters_are_made_visible(hidden: str, shown: str) -> None:
    assert text(hidden) == shown


@pytest.mark.parametrize("name", ["config.yaml", "evaluation.json", "samples.jsonl"])
@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b'{"a": ' + b"[" * 100_000, b'{"a": 1' + b"0" * 400 + b"}", b'{"a": 1e999, "b": NaN}', b"[1, 2]"]
    + [b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", b"!!python/object/apply:os.system ['false']", b""],
)
def test_damaged_side_files_do_not_stop_the_page(tmp_path: Path, name: str, content: bytes) -> None:
    run = write_run(tmp_path / "run", steps=8)
    (run / name).write_bytes(content)
    _, page = rendered([run, write_run(tmp_path / "other", steps=8)], tmp_path / "out")
    assert page.count("path", **{"class": "line"}) == 2 * 8 and page.unbalanced == []


def test_a_configuration_that_refers_to_itself_is_not_unfolded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=8)
    lines = ["a0: &a0 {x: 1, y: 2}", *(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 10))]
    (run / "config.yaml").write_text("\n".join(lines))
    loaded = load_run(run, "run")
    assert loaded.config == {} and loaded.notes == ["config.yaml is damaged and was left out"]


def test_a_lone_surrogate_in_a_sample_does_not_stop_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "grpo", "grpo")
    (run / "samples.jsonl").write_text('{"step": 1, "text": "\\ud83d broken"}\n[1]\nnull\n{"torn')
    source, _ = rendered([run], tmp_path / "out")
    assert "⟨U+D83D⟩ broken" in source


def test_values_that_are_not_finite_break_the_line_and_are_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row, value in zip(rows[3:6], (math.nan, math.inf, None), strict=True):
        row["loss/lm"] = value
    for row in rows:
        row["loss/mtp"] = None
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 99, "lo')
    source, _ = rendered([run], tmp_path / "out")
    card = figure_of(source, "loss/lm")
    line = re.search(r'class="line" d="([^"]*)"', card)
    assert line and line[1].count("M") == 2 and line[1].count("L") == 5
    assert card.count('class="lost"') == 3 and "3 steps without a finite value" in card
    assert "no step has a finite value" in figure_of(source, "loss/mtp")
    assert "1 unreadable line of metrics.jsonl left out" in source
    assert not re.search(r"\bnan\b|\binf\b", source, re.IGNORECASE)


def test_summary_rows_take_the_colours_of_their_runs_and_missing_values_a_dash(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps=20) for name in ("base", "adapted")]
    rows = {"base": summary_row(0.1, None), "adapted": summary_row(0.95, 0.8125), "other": {"loss/lm_dense": 2.0}}
    source, _ = rendered(runs, tmp_path / "out", summary=rows)
    summary = source[source.index('id="summary"') : source.index('id="runs"')]
    base, adapted, other = re.findall(r"<tr><th scope=\"row\">.*?</tr>", summary)
    assert 'swatch s0"></i>base' in base and 'swatch s1"></i>adapted' in adapted and "swatch" not in other
    assert "<td>–</td>" in base and ">0.812<" in adapted and "width:81%" in adapted and "1.22 GiB" in adapted
    assert other.count("<td>–</td>") == 8


def test_configurations_put_first_what_differs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2)]
    source, page = rendered(runs, tmp_path / "out")
    assert "6 settings, 2 of them differ" in source
    assert page.count("tr", **{"class": "differs"}) == 2
    (tmp_path / "a/config.yaml").write_text("{: broken")
    (tmp_path / "a/error.txt").write_text("RuntimeError: out of memory")
    source, _ = rendered(runs, tmp_path / "out")
    assert "config.yaml is damaged and was left out" in source
    assert "RuntimeError: out of memory" in source and '<span class="alarm">failed</span>' in source


def test_the_glance_tells_first_last_and_best_and_how_a_run_ended(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, steps=8) for name in ("a", "b", "c")]
    for run, values in zip(runs, ([3.0, 1.0, 2.0], [5.0], [4.0, None]), strict=True):
        rows = [{"step": i + 1, "loss/lm": v, "reward/mean": v, "optim/lr": v} for i, v in enumerate(values)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (runs[1] / "preempted").touch()
    (runs[2] / "config.yaml").write_text("stage: evaluate\ntrain: {steps: 8}\n")
    source, _ = rendered(runs, tmp_path / "out")
    loss, reward = (re.search(rf"<small>{key}.*?</tr>", source) for key in ("loss/lm", "reward/mean"))
    assert loss and "<b>2</b><small><span>first 3</span> <span>best 1</span>" in loss[0]
    assert "<b>5</b>" in loss[0] and "<b>4</b><small><span>first 4</span> <span>best 4</span>" in loss[0]
    assert reward and "<b>2</b><small><span>first 3</span> <span>best 3</span>" in reward[0]
    assert [load_run(run, run.name).state for run in runs] == ["unfinished", "preempted", "finished"]


def test_an_evaluation_is_a_table_and_no_charts_of_one_point(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    values = {"loss/lm_dense": 2.125, "indexer/layer_00/kl": 0.25, "indexer/layer_01/kl": 0.5}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, **values}))
    (run / "evaluation.json").write_text(json.dumps(values))
    source, page = rendered([run], tmp_path / "out")
    assert source.count("<figure>") == 1 and "indexer/layer_*/kl" in source  # the profile over depth
    assert "<td>2.125</td>" in source and "<td>0.2500</td>" in source and page.count("circle", **{"class": "dot"}) == 2


def test_samples_of_a_large_file_are_its_first_and_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "grpo", "grpo")
    with open(run / "samples.jsonl", "w") as file:
        file.writelines(json.dumps({"step": i, "text": "x" * 1000}) + "\n" for i in range(2000))
    assert [sample["step"] for sample in load_run(run, "grpo").samples] == [0, 1, 1996, 1997, 1998, 1999]


def test_the_report_tells_where_all_samples_can_be_read(tmp_path: Path) -> None:
    """By the command, or by a link where that page is there; a list over tokens is nothing to print."""
    run = write_run(tmp_path / "grpo", "grpo")
    with open(run / "samples.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "text": "x", "per_token": {"text": ["one piece"]}}) + "\n")
    source, page = rendered([run], tmp_path / "out")
    assert f"python launch/samples.py {run}" in source and "one piece" not in source
    (tmp_path / "out/samples.html").touch()
    source, page = rendered([run], tmp_path / "out")
    assert "launch/samples.py" not in source and page.count("a", href="samples.html") == 1


def test_a_run_without_metrics_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs/base", steps=4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/metrics.jsonl").write_text('{"step": 1, "a')
    for arguments, reason in [
        (["empty"], "holds no metrics.jsonl: give the output_dir"),
        (["nowhere"], "no run at"),
        (["torn"], "holds no metrics: give"),
        (["runs"], f"did you mean {tmp_path}/runs/base?"),
        (["runs/base", "empty"], "empty holds no metrics.jsonl"),
    ]:
        assert main([str(tmp_path / argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and reason in printed.err
    assert not list(tmp_path.rglob("report"))


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "no run given"),
        (["--port", "1"], "unknown option --port"),
        (["a", "outt=b"], "unknown setting outt=b: did"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        parse(arguments, "report")
    assert "\n" not in str(raised.value)


def test_command_line(tmp_path: Path) -> None:
    options = parse(["a", "--serve", "b", "out=c"], "report")
    assert (options.runs, options.out, options.port) == ([Path("a"), Path("b")], Path("c"), 8000)
    assert parse(["--serve", "9001", "a"], "report").port == 9001
    run = write_run(tmp_path / "run", steps=8)
    ended = subprocess.run(
        [sys.executable, str(ROOT / "launch/report.py"), "run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "run/report/index.html\n", "")
    assert (run / "report/index.html").is_file()


def test_serves_the_report_folder_alone_and_only_to_this_machine(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=8)
    folder = write_report([run], run / "report").parent
    (folder / "link").symlink_to(run / "metrics.jsonl")
    (folder / "inner").mkdir()
    (folder / "samples.html").touch()
    with server(folder, 0) as serving:
        address, port = serving.server_address[:2]
        assert address == "127.0.0.1"
        threading.Thread(target=serving.serve_forever, daemon=True).start()

        def answer(path: str, host: str) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
            connection.putrequest("GET", path, skip_host=True)
            connection.putheader("Host", host)
            connection.endheaders()
            return connection.getresponse()

        def status(path: str, host: str = f"127.0.0.1:{port}") -> int:
            return answer(path, host).status

        def policy(path: str) -> str | None:
            return answer(path, "localhost").headers["Content-Security-Policy"]

        assert [status("/"), status("/index.html"), status("/", "localhost")] == [200, 200, 200]
        outside = ["/../metrics.jsonl", "/%2e%2e/metrics.jsonl", "/..%2fmetrics.jsonl", "/link", "/inner/", "/none"]
        assert [status(path) for path in outside] == [404] * len(outside)
        assert policy("/index.html") == POLICY and "script-src" not in POLICY
        assert policy("/samples.html") == samples_page.POLICY
        assert [status("/", host) for host in ("evil.example", f"evil.example:{port}", "")] == [403] * 3
        with pytest.raises(UserError, match=f"cannot serve on port {port}"):
            server(folder, int(port))
        serving.shutdown()


def test_names_tell_runs_apart_with_as_little_as_that_takes() -> None:
    paths = [Path("/x/a/base"), Path("/x/b/base"), Path("/x/b/warmup")]
    assert run_names(paths) == ["a/base", "b/base", "warmup"]
    assert run_names([Path("/x/base")]) == ["base"]


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0"), (2.13444, "2.134"), (-0.5, "-0.5000"), (7.25e-6, "7.25e-6"), (1e-3, "0.0010"), (123.4, "123.4")]
    + [(4200, "4200"), (12400, "12.4k"), (1.2e6, "1.2M"), (3.1e9, "3.1G"), (1e15, "1e15"), (1, "1")],
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert number(value) == shown


def test_axes_and_quantities_carry_units() -> None:
    assert [quantity("perf/peak_memory_bytes", v) for v in (512.0, 1.31e9, None)] == ["512 B", "1.22 GiB", "–"]
    assert [label for _, label in linear_axis(0, 1, 0, 100, 4).ticks] == ["0.0", "0.5", "1.0"]
    assert [label for _, label in linear_axis(0, 1e-3, 0, 100, 4).ticks] == ["0", "0.5e-3", "1.0e-3"]
    assert [label for _, label in linear_axis(0, 2.1e4, 0, 100, 4).ticks] == ["0", "10k", "20k"]
    assert (section_of("indexer/layer_03/kl"), section_of("reward/x"), section_of("x")) == ("indexer/", "reward/", "")
    assert metric("reward/x").label == "reward/x"


def drawn(values: list[float], **options: bool) -> str:
    return line_chart(Panel("k", "k", [Series("run", 0, list(enumerate(values)))], **options))


def test_a_logarithmic_axis_only_where_the_values_ask_for_it() -> None:
    assert "logarithmic" in drawn([1.0, 0.1, 0.01], log=True)
    assert "logarithmic" not in drawn([1.0, 0.5, 0.25], log=True)  # less than a decade
    assert "logarithmic" not in drawn([1.0, 0.0, 0.01], log=True)  # a zero has no logarithm
    for values in ([3.0], [0.0, 0.0], [-2.0, -2.0], [1e-300, 1e300], [1.0, 1.0 + 1e-16]):
        assert 'class="line" d="M' in drawn(values)


def test_smoothing_spares_schedules_and_follows_noise() -> None:
    schedule = [(float(i), 1.0 - i / 100) for i in range(100)]
    noisy = [(float(i), 1.0 + (-1) ** i) for i in range(100)]
    assert smoothed(schedule) is None and smoothed(noisy[:20]) is None
    smooth = smoothed(noisy)
    assert smooth is not None and all(0.5 < y < 1.5 for _, y in smooth[3:] if y is not None)


def test_shades_span_the_values() -> None:
    linear, log = Shade.over([1.0, 2.0, 3.0], log=True), Shade.over([0.01, 1.0], log=True)
    assert not linear.log and linear.at(3.0) == 1.0 and linear.at(2.0) == pytest.approx((linear.at(1.0) + 1) / 2)
    assert log.log and log.at(0.1) == pytest.approx((log.at(0.01) + 1) / 2)
