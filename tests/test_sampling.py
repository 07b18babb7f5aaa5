"""What a step reads and draws follows from the seed and the step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from gpt_ext.sampling import Windows, derived_seed


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16])
def test_targets_are_the_tokens_after(dtype: torch.dtype) -> None:
    x, y = Windows(torch.arange(100).to(dtype), 8, seed=0).batch(3, 40)
    assert x.shape == y.shape == (40, 8)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x + 1, y)
    assert torch.equal(x, x[:, :1] + torch.arange(8))


@pytest.mark.parametrize(("tokens", "length"), [(2, 1), (17, 16), (31, 16), (32, 16), (1000, 16)])
def test_an_epoch_has_each_window_once_and_leaves_out_less_than_two(
    tokens: int, length: int
) -> None:
    windows = Windows(torch.arange(tokens), length, seed=5)
    for epoch in range(20):
        starts = sorted(windows.starts(epoch * windows.count, windows.count))
        assert starts[0] >= 0
        assert starts[-1] + length < tokens  # the last target is there
        assert all(b - a == length for a, b in pairwise(starts))
        assert tokens - windows.count * length < 2 * length + 1


def test_epochs_begin_at_every_place_and_have_orders_of_their_own() -> None:
    windows = Windows(torch.arange(103), 4, seed=0)
    epochs = [windows.starts(epoch * windows.count, windows.count) for epoch in range(50)]
    assert {min(epoch) for epoch in epochs} == {0, 1, 2, 3}
    assert len({tuple(epoch) for epoch in epochs}) == 50
    assert all(epoch != sorted(epoch) for epoch in epochs)


def test_parts_of_a_batch_and_any_order_of_asking_give_the_same_windows() -> None:
    tokens = torch.arange(200)
    whole = Windows(tokens, 8, seed=0).starts(0, 96)
    parts = Windows(tokens, 8, seed=0)
    found = {first: parts.starts(first, 4) for first in [*range(48, 96, 4), *range(0, 48, 4)]}
    assert [start for first in range(0, 96, 4) for start in found[first]] == whole
    assert Windows(tokens, 8, seed=1).starts(0, 96) != whole


def test_seeds_differ_by_each_number() -> None:
    seeds = {
        derived_seed(seed, step, rank) for seed in (0, 1) for step in range(50) for rank in (0, 1)
    }
    assert len(seeds) == 200
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derived_seed(1, 2) == derived_seed(1, 2) != derived_seed(12)
