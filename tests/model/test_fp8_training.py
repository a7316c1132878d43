"""precision=fp8 through the whole model: which weights run in FP8, and that what is trained is what is exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import model.layers
import model.mla
import model.moe
from model import Transformer, save_pretrained
from model.fp8 import AMAX_FLOOR
from model.hf_files import Checkpoint
from model.hf_names import slots, stored_dtype
from model.ops.fp8_linear import fp8_round_weight
from model.ops.settings import OpSettings
from tests.train import tiny

FP8 = OpSettings(fp8_linear="emulate")
FORMS = {  # stage -> what the forward is asked for
    "pretrain": {"attention": "dense"},
    "dense_warmup": {"attention": "dense", "indexer_loss": "dense"},
    "sparse_adapt": {"attention": "sparse", "indexer_loss": "selected"},
}


class Calls:
    """The weights that went through the FP8 ops, and the dtype of what was multiplied with them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[int] = set()
        for module, name, place in (
            (model.layers, "fp8_linear", 1),
            (model.moe, "fp8_grouped_linear", 2),
            (model.mla, "fp8_round_weight", 0),
        ):
            monkeypatch.setattr(module, name, self.recorded(getattr(module, name), place))

    def recorded(self, real, place: int):
        def call(*args, **kwargs):
            assert kwargs["power_of_two"] is True
            self.seen.add(id(args[place]))
            return real(*args, **kwargs)

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    yield Calls(monkeypatch)


def stored_in_fp8(net: Transformer) -> set[str]:
    """Our names of the parameters that an FP8 checkpoint of DeepSeek's stores in it."""
    fp8 = torch.float8_e4m3fn
    return {s.ours for s in slots(net, net.config) if stored_dtype(s.hf_name, fp8) == fp8}


@pytest.mark.parametrize("form", FORMS)
def test_what_deepseek_stores_in_fp8_runs_in_fp8_and_nothing_else(form: str, calls: Calls) -> None:
    net = tiny.build()
    net.use(FP8)
    out = net(**tiny.batch(0), **FORMS[form])
    assert torch.isfinite(out.token_logprobs).all()
    names = {id(p): name for name, p in net.named_parameters()}
    found = {names[key] for key in calls.seen}
    wanted = stored_in_fp8(net)
    if form == "pretrain":  # nobody asks the indexer there
        wanted = {name for name in wanted if ".indexer." not in name}
    assert found == wanted


def test_without_the_setting_nothing_does(calls: Calls) -> None:
    tiny.build()(**tiny.batch(0), **FORMS["sparse_adapt"])
    assert calls.seen == set()


@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_those_of_fp32_up_to_rounding(form: str) -> None:
    """A gross error (a weight's scale, a transposed block, a lost gradient) is far outside; the op's own tests hold the
    exact numbers."""
    losses, gradients = [], []
    for settings in (OpSettings(), FP8):
        net = tiny.build()
        net.use(settings)
        out = net(**tiny.batch(0), **FORMS[form])
        loss = -out.token_logprobs.sum() - out.mtp_logprobs.sum()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)
    assert gradients[0].keys() == gradients[1].keys()
    exact, rounded = (torch.cat([g.flatten() for g in found.values()]) for found in gradients)
    assert float(torch.cosine_similarity(exact, rounded, dim=0)) > 0.97
    for name, gradient in gradients[0].items():
        if ".experts." not in name:  # a token whose choice of experts flips moves a whole expert's gradient
            alike = torch.cosine_similarity(gradient.flatten(), gradients[1][name].flatten(), dim=0)
            assert float(alike) > 0.8, (name, float(alike))


def test_an_fp8_export_stores_the_weights_that_training_multiplied_by(tmp_path: Path) -> None:
    net = tiny.build()
    save_pretrained(net, tmp_path / "hf", torch.float8_e4m3fn)
    stored, state = Checkpoint(tmp_path / "hf"), net.state_dict()
    compared = 0
    for slot in slots(net, net.config):
        if slot.ours in stored_in_fp8(net):
            weight = state[slot.ours] if slot.expert is None else state[slot.ours][slot.expert]
            assert float(weight.abs().max()) > AMAX_FLOOR  # below it the stored block has a larger scale
            assert torch.equal(stored.read(slot.hf_name), fp8_round_weight(weight, power_of_two=True)), slot.hf_name
            compared += 1
    assert compared > 20
