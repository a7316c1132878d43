"""samples.jsonl survives kills: cut back to the checkpoint, torn lines left out, hostile text kept as data."""

import json
from pathlib import Path

from rl.samples import SamplesWriter, sample_row
from tests.rl.samples import make_sample


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_rows_are_cut_back_on_resume(tmp_path: Path):
    sample = make_sample([1], [2], [0.0], text='</think>"\n\x00\ud800<script>', prompt="p", answer="a")
    writer = SamplesWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, [sample_row(sample, 0.5), sample_row(sample, None)])
    whole = (tmp_path / "samples.jsonl").read_bytes()
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"step": 1, "torn')
    SamplesWriter(tmp_path, resume_step=2)
    assert [row["step"] for row in lines(tmp_path)] == [1, 1, 2, 2]
    assert lines(tmp_path)[0]["text"] == sample.text and lines(tmp_path)[1]["advantage"] is None
    again = SamplesWriter(tmp_path, resume_step=2)
    again.write(3, [sample_row(sample, 0.5), sample_row(sample, None)])
    assert (tmp_path / "samples.jsonl").read_bytes() == whole


def test_a_fresh_start_drops_what_an_attempt_without_checkpoint_left(tmp_path: Path):
    SamplesWriter(tmp_path).write(1, [sample_row(make_sample([1], [2], [0.0]), 0.0)])
    SamplesWriter(tmp_path)
    assert lines(tmp_path) == []
