"""Whatever the model: the same outputs, an untouched input, a second run that finds nothing."""

from __future__ import annotations

import pytest
from check import check
from hypothesis import given
from hypothesis import strategies as st
from strategies import SIZES, Net, nets


@given(net=nets(), example_inputs=st.booleans())
def test_any_model(net: Net, example_inputs: bool) -> None:
    check(
        net, SIZES, batchnorms=None, again=not net.reads_after_writes, example_inputs=example_inputs
    )


@given(net=nets())
def test_any_model_without_the_cost_rule(net: Net) -> None:
    """More merges, more chances to be wrong; and nothing on the spot to catch it."""
    again = not net.reads_after_writes
    how = {"cost": "always", "more_work": True, "validate": False}
    check(net, SIZES, batchnorms=None, again=again, **how)


@pytest.mark.slow
@given(net=nets(most=20))
def test_any_large_model(net: Net) -> None:
    check(net, SIZES, batchnorms=None, again=not net.reads_after_writes)
