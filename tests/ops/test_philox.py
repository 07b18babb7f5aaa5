"""The dropout's generator: known answers, and one mask in Python, PyTorch and the kernels."""

from __future__ import annotations

import pytest
import reference
import torch

from gpt_ext.ops.philox import attention_keep_mask, philox, residual_keep_mask

# kat_vectors of Random123: counter, key, answer
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    words = philox(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
    assert [int(word) for word in words] == answer
    assert reference.philox(tuple(key), counter) == answer


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
@pytest.mark.parametrize("time", [1, 4, 6])
def test_mask_follows_the_definition(seed: int, time: int, device: str) -> None:
    keep = attention_keep_mask(torch.tensor([seed], device=device), 0.3, 2, 3, time)
    assert torch.equal(keep.cpu(), reference.attention_keep_mask(seed, 0.3, 2, 3, time))


@pytest.mark.parametrize("seed", [-1, 0x1234_5678_9ABC_DEF0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 6), (2, 8), (0, 3), (3, 0)], ids=str)
def test_residual_mask_follows_the_definition(seed: int, shape: tuple, device: str) -> None:
    keep = residual_keep_mask(torch.tensor([seed], device=device), 0.3, *shape)
    assert torch.equal(keep.cpu(), reference.residual_keep_mask(seed, 0.3, *shape))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kernel_draws_the_same_mask(p: float, backend: str) -> None:
    # With v the identity the output's rows are the probabilities, zero where dropped.
    batch, time, heads, seed = 2, 37, 3, 0x1234_5678_9ABC_DEF0
    q = torch.randn(batch, time, heads, time, device=backend)
    v = torch.eye(time, device=backend)[None, :, None].expand_as(q)
    out, _ = torch.ops.gpt_ext.attention_forward(
        q, q, v, 0.1, p, torch.tensor([seed], device=backend), False
    )
    keep = reference.attention_keep_mask(seed, p, batch, heads, time)
    assert torch.equal(out.transpose(1, 2).cpu() != 0, keep.tril())


def test_the_two_masks_differ(device: str) -> None:
    seed = torch.tensor([5], device=device)
    attention = attention_keep_mask(seed, 0.5, 1, 1, 64)[0, 0]
    assert not torch.equal(attention, residual_keep_mask(seed, 0.5, 64, 64))
