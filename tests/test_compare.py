"""The tolerance rule itself: it passes what it should and tells where it fails."""

from __future__ import annotations

import pytest
import torch
from compare import assert_as_good_as_torch


def test_an_error_twice_torchs_passes_and_three_times_fails() -> None:
    exact = torch.ones(3, 4, dtype=torch.float64)
    torchs = (exact + 1e-3).float()
    assert_as_good_as_torch(["out"], [(exact - 1.9e-3).float()], [torchs], [exact])
    ours = exact.float()
    ours[1, 2] += 3e-3
    with pytest.raises(AssertionError, match=r"out\[1, 2\] is 1.003.*limit 0.002"):
        assert_as_good_as_torch(["out"], [ours], [torchs], [exact])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_fails(bad: float) -> None:
    exact = torch.ones(5, dtype=torch.float64)
    ours = exact.clone()
    ours[3] = bad
    with pytest.raises(AssertionError, match=r"dx\[3\] is"):
        assert_as_good_as_torch(["dx"], [ours], [exact], [exact])
