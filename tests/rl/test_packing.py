"""Packed rows: every label sits one row before its token, with that token's behaviour log-prob and its sample's
advantage."""

import pytest
import torch

from rl.packing import empty_row, pack_samples
from tests.rl.samples import make_sample


def test_by_hand():
    samples = [make_sample([5, 6], [7, 8, 9], [-0.1, -0.2, -0.3]), make_sample([3], [4], [-0.4], domain="code")]
    (row,) = pack_samples(samples, [1.5, -2.0], 9)
    assert row.input_ids.tolist() == [5, 6, 7, 8, 9, 3, 4, 0, 0]
    assert row.labels.tolist() == [-100, 7, 8, 9, -100, 4, -100, -100, -100]
    assert row.next_ids.tolist() == [6, 7, 8, 9, 0, 4, 0, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 0]
    assert row.doc_start.tolist() == [0] * 5 + [5] * 2 + [9] * 2
    assert row.sequence.tolist() == [-1, 0, 0, 0, -1, 1, -1, -1, -1]
    assert row.behaviour.tolist() == pytest.approx([0, -0.1, -0.2, -0.3, 0, -0.4, 0, 0, 0])
    assert row.advantages.tolist() == [0, 1.5, 1.5, 1.5, 0, -2.0, 0, 0, 0]
    assert row.num_sequences == 2 and row.domains == ("arithmetic", "code")


def test_every_sampled_token_appears_once_whatever_the_row_length():
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(23):
        sizes = torch.randint(1, 9, (2,), generator=generator).tolist()
        ids = torch.randint(10, 99, (sum(sizes),), generator=generator).tolist()
        logprobs = [-(number + i / 16) for i in range(sizes[1])]
        samples.append(make_sample(ids[: sizes[0]], ids[sizes[0] :], logprobs))
    expected = sorted(
        (logprob, token, float(number))
        for number, s in enumerate(samples)
        for token, mask, logprob in zip(s.tokens.ids, s.tokens.loss_mask, s.tokens.behaviour_logprobs, strict=True)
        if mask
    )
    for length in (16, 17, 40, 400):
        rows = pack_samples(samples, [float(i) for i in range(23)], length)
        found = []
        for row in rows:
            at = row.labels != -100
            assert torch.equal(at, row.sequence >= 0)
            found += list(
                zip(row.behaviour[at].tolist(), row.labels[at].tolist(), row.advantages[at].tolist(), strict=True)
            )
        assert sorted(found) == expected
        assert sum(row.num_sequences for row in rows) == len(samples)


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"a sample of 5 tokens does not fit rl.pack_len=4: give rl.pack_len=5"):
        pack_samples([make_sample([1, 2], [3, 4, 5], [0.0] * 3)], [0.0], 4)


def test_an_empty_row_sees_and_trains_nothing():
    row = empty_row(6)
    assert (row.doc_start > torch.arange(6)).all()
    assert (row.labels == -100).all() and (row.sequence == -1).all() and row.num_sequences == 0
