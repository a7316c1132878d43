"""The export command: every kind of RUN, its dtypes, and one line with status 2 for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.convert import save_yaml
from conf.schema import OptimConfig, ParallelConfig, RunConfig
from launch.export import main
from model.hf import from_pretrained, save_pretrained
from tests.distributed.helper import run_ranks
from tests.model.hf_cases import make_config, make_net, make_oracle, random_ids, read_tensors
from tests.train.tiny import MODEL, batch, build
from train import checkpoint
from train.checkpoint import TrainState
from train.engine import Engine
from train.optim import build_optimizer, select_trainable
from train.stages import STAGES, resolve_rates

ROOT = Path(__file__).resolve().parents[2]


def test_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = make_net(make_config())
    save_pretrained(net, tmp_path / "run" / "hf")
    assert main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    ids = random_ids()
    assert torch.equal(from_pretrained(tmp_path / "out").logits(ids), net.logits(ids))
    assert main([str(tmp_path / "run"), str(tmp_path / "half"), "dtype=bf16"]) == 0
    written = read_tensors(tmp_path / "half")
    assert written["lm_head.weight"].dtype == torch.bfloat16
    assert main([str(tmp_path / "half"), str(tmp_path / "wide"), "dtype=fp32"]) == 0
    wide = read_tensors(tmp_path / "wide")["lm_head.weight"]
    assert wide.dtype == torch.float32 and torch.equal(wide, written["lm_head.weight"].float())


def test_a_dense_checkpoint_becomes_a_sparse_one(tmp_path: Path) -> None:
    # index_head_dim is DeepSeek-V3.2's 128 where nobody says otherwise
    make_oracle(make_config(), "dense").save_pretrained(tmp_path / "dense")
    assert main([str(tmp_path / "dense"), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model_type"] == "deepseek_v32" and written["index_n_heads"] == 64
    ids = random_ids()
    dense, out = from_pretrained(tmp_path / "dense"), from_pretrained(tmp_path / "out")
    assert torch.equal(dense.logits(ids, attention="dense"), out.logits(ids, attention="dense"))
    assert torch.equal(dense.logits(ids), out.logits(ids))


def train_a_step(run: str) -> dict[str, list[float]]:
    """One step of dense_warmup from `base`, saved as the loop saves it -> a few trained and frozen values."""
    stage = STAGES["dense_warmup"]
    net = from_pretrained(Path(run).parent / "base")
    select_trainable(net, stage)
    optim = resolve_rates(stage, OptimConfig(), MODEL.hidden_size)
    engine = Engine(net, build_optimizer(net, optim), optim, ParallelConfig(zero=1))
    inputs = batch(0)
    out = engine.forward(**inputs, attention="dense", indexer_loss="dense", lm_loss=False, trunk_grad=False)
    engine.backward(out.indexer_kl.sum(), last=True)
    engine.step({"indexer": 1e-2, "trunk": 0.0})
    checkpoint.write(checkpoint.take(engine, TrainState(step=1)), Path(run), keep=2)
    return {name: tensor.flatten().tolist() for name, tensor in net.state_dict().items()}


def test_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    save_pretrained(build(), base)
    config = RunConfig("dense_warmup", str(run), init_from=str(base), model=MODEL)
    run.mkdir()
    save_yaml(config, run / "config.yaml")
    (trained,) = run_ranks(train_a_step, 1, str(run))
    for source, out in ((run, tmp_path / "a"), (run / "checkpoints" / "step_1", tmp_path / "b")):
        assert main([str(source), str(out)]) == 0
        moved = set()
        start = from_pretrained(base).state_dict()
        for name, tensor in from_pretrained(out).state_dict().items():
            assert tensor.flatten().tolist() == trained[name], name
            if not torch.equal(tensor, start[name]):
                moved.add(name)
        assert moved and all(".indexer." in name for name in moved)
    # frozen weights are not in the checkpoint: another base under the same name is another model
    changed = build()
    with torch.no_grad():
        changed.lm_head.weight += 1.0
    save_pretrained(changed, base)
    assert main([str(run), str(tmp_path / "c")]) == 2
    assert "belongs to other starting weights" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{run}", "{out}", "dtype=fp4"], "dtype=fp4 is not known"),
        (["{run}", "{out}", "dtype=bf61"], "did you mean bf16?"),
        (["{run}", "{out}", "type=bf16"], "unknown setting type"),
        (["{run}"], "1 paths are given, not 2: usage"),
        (["{run}/nothing", "{out}"], "holds neither config.json, nor hf/, nor a checkpoint"),
        (["{run}", "{run}"], "holds hf, which no export wrote"),
    ],
)
def test_mistakes(arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    save_pretrained(make_net(make_config()), run / "hf")
    assert main([argument.format(run=run, out=out) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and named in lines[0]
    assert not out.exists()


def test_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "export.py"), str(tmp_path), str(tmp_path / "out"), "dtype=fp4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "dtype=fp4 is not known" in done.stderr


def test_block_fp8(tmp_path: Path) -> None:
    net = make_net(make_config())
    save_pretrained(net, tmp_path / "run" / "hf")
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "dtype=fp8"]) == 0
    save_pretrained(net, tmp_path / "same", dtype=torch.float8_e4m3fn)
    ours, direct = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "same")
    assert ours.keys() == direct.keys() and any(name.endswith("_scale_inv") for name in ours)
    assert all(torch.equal(a.view(torch.uint8), direct[name].view(torch.uint8)) for name, a in ours.items() if a.dim())
