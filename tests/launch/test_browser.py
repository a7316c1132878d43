"""The live page in headless Chromium: it grows with the run, keeps what its reader chose, and can be used by keys."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from launch.live import live_server
from tests.launch.browser import FOUND, MISSING, Browser, browser
from tests.launch.runs import write_run
from train.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(FOUND is None, reason=MISSING)
ATTACK = "<img src=x onerror=alert(1)>"
LINES = """[...document.querySelector('figure').querySelectorAll('path.line')]
  .map((line) => line.getAttribute('d').match(/[ML]/g).length)"""  # points of each line of the first chart
CONTRAST = """(() => {
  const light = (text) => {
    const shares = text.match(/[\\d.]+/g).map((value) => value / 255);
    const [r, g, b] = shares.map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? back(node.parentElement) : colour;
  };
  const parts = ["h1", "h2", "#status", "figcaption b", "legend", "#runs .name", "#runs small", ".notes", "p.alarm"];
  return [...parts, ".key", "ul.legend li"].map((at) => {
    const node = document.querySelector(at);
    const [a, b] = [light(getComputedStyle(node).color), light(back(node))].sort((p, q) => q - p);
    return [at, (a + 0.05) / (b + 0.05)];
  });
})()"""  # WCAG 2: 4.5 and more is readable
FOCUSED = """(({id, type, tagName} = document.activeElement) =>
  id || document.activeElement.getAttribute('role') || type || tagName)()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs/base", steps=40)
    write_run(tmp_path / "runs/other", steps=60, seed=1)
    write_run(tmp_path / f"runs/{ATTACK.replace('/', '')}", "grpo", steps=40)
    return tmp_path / "runs"


@pytest.fixture
def address(runs: Path) -> Iterator[str]:
    with live_server([runs], 0) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}/"
        serving.shutdown()


def shown(page: Browser, address: str, *names: str, more: str = "") -> None:
    """Opens the page with these runs ticked, in a fresh document."""
    page.errors.clear()
    page.look()
    page.open("about:blank#")
    page.run(f"location.href = {json.dumps(address + '#' + '&'.join(f'run={name}' for name in names) + more)}")
    page.until("document.querySelectorAll('figure svg > *').length > 0")


def test_points_appear_while_the_run_goes_and_nothing_else_moves(page: Browser, address: str, runs: Path) -> None:
    shown(page, address, "base")
    assert page.run(LINES) == [20]
    page.run("window.scrollTo({top: 200, behavior: 'instant'}); window.kept = document.querySelectorAll('.plot')[4]")
    page.run("window.kept.focus({preventScroll: true})")
    before = page.run("[scrollY, document.querySelectorAll('figure').length]")
    rows, _ = read_metrics(runs / "base/metrics.jsonl")
    with MetricsWriter(runs / "base", 40) as writer:
        for step in (42, 44, 46):
            writer.write(step, rows[-1])
        page.until(f"({LINES})[0] === 23")
        (runs / "base/metrics.jsonl").open("ab").write(b'{"step": 48, "loss/lm"')  # torn: a kill in the middle
        writer.write(50, rows[-1])
    assert page.run("[scrollY, document.querySelectorAll('figure').length]") == before and before[0] == 200
    assert page.run("document.activeElement === window.kept")
    MetricsWriter(runs / "base", 20).close()  # a resumed run goes back to its checkpoint
    page.until(f"({LINES})[0] === 10")
    assert page.errors == []


def test_runs_are_laid_over_each_other_and_new_ones_appear(page: Browser, address: str, runs: Path) -> None:
    shown(page, address, "base")
    page.run("document.querySelector('label[data-run=\"other\"] input').click()")
    page.until(f"({LINES}).length === 2")
    assert page.run(LINES) == [20, 30]
    assert page.run("[...document.querySelector('figure').querySelectorAll('.legend li')].length") == 2
    assert "run=other" in page.run("location.hash")
    write_run(runs / "later", steps=8)
    page.until("document.querySelector('label[data-run=\"later\"]') !== null")
    page.run("document.querySelector('label[data-run=\"base\"] input').click()")
    page.until(f"({LINES}).length === 1")
    assert (
        page.run("document.querySelector('figure .line').parentNode.getAttribute('class')") == "s1"
    )  # its colour stays
    assert page.errors == []


def test_stages_have_sections_of_their_own_or_one_for_all(page: Browser, address: str) -> None:
    shown(page, address, "base", ATTACK.replace("/", ""))
    headings = "[...document.querySelectorAll('#charts h2')].map((node) => node.textContent)"
    assert page.run(headings) == ["Pre-training", "GRPO"]
    choose = "(id, value) => { $(id).value = value; $(id).dispatchEvent(new Event('change')); }"
    page.run(f"({choose})('group', 'all')")
    page.until(f"({headings}).join() === 'All stages'")
    loss = "[...document.querySelectorAll('figure')].find((node) => node.textContent.includes('loss/lm'))"
    assert page.run(f"{loss}.querySelectorAll('.line').length") == 2
    for axis in ("tokens", "hours", "step"):
        page.run(f"({choose})('axis', '{axis}')")
        page.until(f"document.querySelector('figure text.name').textContent === '{axis}'")


def test_what_a_run_brings_is_text(page: Browser, address: str, runs: Path) -> None:
    folder = runs / ATTACK.replace("/", "")
    (folder / "error.txt").write_text(ATTACK)
    (folder / "alerts.jsonl").write_text(json.dumps({"step": 1, "text": ATTACK}) + "\n")
    shown(page, address, folder.name)
    assert page.run("document.querySelectorAll('img').length") == 0
    page.until("document.querySelectorAll('p.alarm').length === 2")
    assert ATTACK in page.run("document.querySelector('p.alarm').textContent")
    assert page.run("document.querySelector('[role=alert]').childElementCount") == 2
    assert page.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_light_and_dark_are_readable(page: Browser, address: str, runs: Path, dark: bool) -> None:
    (runs / "base/error.txt").write_text("out of memory")
    shown(page, address, "base", "other")
    page.look(dark=dark)
    background = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(background) < 60) if dark else (min(background) > 200)
    page.until("document.querySelector('p.alarm') !== null")
    for at, contrast in page.run(CONTRAST):
        assert contrast >= 4.5, f"{at}: {contrast:.2f}"


def test_keys_reach_everything(page: Browser, address: str) -> None:
    shown(page, address, "base")
    page.run("document.body.focus()")
    reached = []
    for _ in range(14):
        page.press("Tab")
        reached.append(page.run(FOCUSED))
    assert reached[:8] == ["checkbox", "checkbox", "checkbox", "axis", "group", "smooth", "A", "slider"], reached
    plot = "document.activeElement"
    assert page.run(f"getComputedStyle({plot}).outlineStyle") == "solid"
    assert page.run(f"{plot}.getAttribute('aria-label')")
    assert page.run(f"{plot}.getAttribute('aria-valuetext')").startswith("last values: base ")
    page.press("ArrowLeft")
    assert page.run(f"{plot}.getAttribute('aria-valuetext')").startswith("step 40: base ")
    page.press("ArrowLeft")
    assert page.run(f"[{plot}.getAttribute('aria-valuenow'), {plot}.querySelector('.tip').hidden]") == ["38", False]
    page.press("Home")
    assert page.run(f"{plot}.getAttribute('aria-valuenow')") == "2"
    page.press("ArrowRight")
    page.press("+")
    page.until("view.to !== null && !$('whole').disabled")
    ends = page.run("[view.from, view.to, document.activeElement.getAttribute('role')]")
    assert ends[0] < 4 < ends[1] and ends[1] - ends[0] == pytest.approx(19) and ends[2] == "slider"
    page.press("Escape")
    page.until("view.to === null && $('whole').disabled")
    assert page.run("document.activeElement.getAttribute('role')") == "slider"


def test_a_drag_zooms_all_charts_and_new_rows_do_not_undo_it(page: Browser, address: str, runs: Path) -> None:
    shown(page, address, "base")
    page.run("window.box = document.querySelector('.plot svg').getBoundingClientRect()")
    box = page.run("[box.x, box.y, box.width, box.height]")
    across = [box[0] + box[2] * share for share in (0.4, 0.7)]
    page.mouse("mousePressed", across[0], box[1] + box[3] / 2)
    page.mouse("mouseMoved", across[1], box[1] + box[3] / 2)
    page.mouse("mouseReleased", across[1], box[1] + box[3] / 2)
    page.until("view.from !== null && document.querySelectorAll('figure .line').length > 0")
    ends = page.run("[view.from, view.to]")
    assert 8 < ends[0] < ends[1] < 34
    labels = (
        "[...document.querySelectorAll('figure')].at(-1).querySelectorAll('text[text-anchor=middle]')[0].textContent"
    )
    page.until(f"+{labels} > 8")
    rows, _ = read_metrics(runs / "base/metrics.jsonl")
    with MetricsWriter(runs / "base", 40) as writer:
        writer.write(42, rows[-1])
    page.until("$('runs').textContent.includes('42 of 40')")
    assert page.run("[view.from, view.to]") == ends
    page.run("window.old = true; location.reload()")
    page.until("window.old === undefined && document.querySelectorAll('.line').length > 0")
    assert page.run("[view.from, view.to]") == pytest.approx(ends)


def test_a_run_that_ended_before_the_zoomed_range_is_no_bar(page: Browser, address: str, runs: Path) -> None:
    shown(page, address, "base", more="&from=50&to=58")
    page.until("document.querySelector('figure svg').textContent === 'nothing in this range'")
    assert page.run("document.querySelectorAll('figure .bar').length") == 0 and page.errors == []
    shown(page, address, "base", "other", more="&from=50&to=58")
    assert page.run("document.querySelector('figure').querySelectorAll('path.line').length") == 1
    assert page.run("document.querySelector('figure .legend').textContent").startswith("other")


def test_the_command_serves_and_a_server_that_is_gone_is_said(page: Browser, runs: Path) -> None:
    command = [sys.executable, str(ROOT / "launch/report.py"), "--serve", "0"]
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background has it ignored
    with subprocess.Popen(command, cwd=runs.parent, stdout=subprocess.PIPE, text=True, preexec_fn=heeds) as serving:
        try:
            assert serving.stdout
            found = re.match(r"http://127\.0\.0\.1:\d+/", serving.stdout.readline())
            assert found
            shown(page, found[0], "base")
            serving.send_signal(signal.SIGINT)
            assert serving.wait(30) == 0
        finally:
            serving.kill()
    page.until("$('status').textContent.includes('does not answer')")
    assert page.run(LINES) == [20]
    assert not list(runs.rglob("report"))
