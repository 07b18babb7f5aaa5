"""Fixtures of the ops' tests: each op in turn, each SIMD level in turn."""

from collections.abc import Iterator

import pytest
from every_op import OPS, Op

from gpt_ext import _C


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]


@pytest.fixture(params=_C.supported_simd_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every SIMD level that this CPU has, which is forced meanwhile."""
    chosen = _C.simd_level()
    _C.set_simd_level(request.param)
    yield request.param
    _C.set_simd_level(chosen)
