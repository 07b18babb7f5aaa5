"""The fixture `op`: each of the ops in turn."""

import pytest
from every_op import OPS, Op


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]
