"""Clusters as data: what ships is valid, a mistake in a file is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from conf.errors import UserError
from conf.hardware import CLUSTERS, load_cluster

GOOD = yaml.safe_load((CLUSTERS / "h800.yaml").read_text())


def changed(section: str, **values: object) -> dict:
    return GOOD | {section: GOOD[section] | values}


def test_what_ships_is_read_by_name_and_by_path() -> None:
    for path in CLUSTERS.glob("*.yaml"):
        assert load_cluster(path.stem) == load_cluster(str(path))
    h800 = load_cluster("h800")
    assert h800.gpu.dollars_per_hour == 2 and h800.serving.decode_ep == 144


def missing(section: str, key: str) -> dict:
    return GOOD | {section: {name: value for name, value in GOOD[section].items() if name != key}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (changed("gpu", bf16_tflop=1), "gpu.unknown key bf16_tflop: did you mean bf16_tflops?"),
        (missing("rates", "memory"), "rates.memory is missing"),
        (changed("gpu", memory_gb=-1), "gpu.memory_gb=-1 must be a number > 0"),
        (changed("gpu", memory_gb=float("nan")), "gpu.memory_gb=nan must be"),
        (changed("serving", decode_ep=1.5), "serving.decode_ep=1.5 must be a whole number > 0"),
        (changed("serving", decode_ep=True), "serving.decode_ep=True must be"),
        (changed("rates", linear=1.2), "rates.linear=1.2 is more than the peak"),
        (GOOD | {"gpu": "H800"}, "gpu must be a mapping of name"),
        (["gpu"], "must be a mapping of gpu, network, training, rates"),
    ],
)
def test_a_mistake_is_one_line(values: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="mine.yaml") as caught:
        load_cluster(str(path))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no cluster h80: .*did you mean h800"):
        load_cluster("h80")
    (tmp_path / "x.yaml").write_text("gpu: [")
    with pytest.raises(UserError, match="is not YAML"):
        load_cluster(str(tmp_path / "x.yaml"))
