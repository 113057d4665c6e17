"""Whatever the model: the same outputs, an untouched input, a second run that finds nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.check import check
from support.steps import Net
from support.strategies import nets

# More merges, more chances to be wrong; and nothing on the spot to catch it.
WITHOUT_GUARDS: dict[str, Any] = {"cost": "always", "more_work": True, "validate": False}


@given(net=nets(), example_inputs=st.booleans())
def test_any_model(net: Net, example_inputs: bool) -> None:
    again = not net.reads_after_writes
    check(net, net.sizes, batchnorms=None, again=again, example_inputs=example_inputs)


@given(net=nets())
def test_any_model_without_the_cost_rule(net: Net) -> None:
    again = not net.reads_after_writes
    check(net, net.sizes, batchnorms=None, again=again, **WITHOUT_GUARDS)


@pytest.mark.parametrize("how", [{}, WITHOUT_GUARDS], ids=["macs", "always"])
@given(net=nets(linear=True))
def test_any_linear_model(net: Net, how: dict[str, Any]) -> None:
    """Nothing stops a walk: every rule meets every other."""
    check(net, net.sizes, batchnorms=None, again=not net.reads_after_writes, **how)


@pytest.mark.slow
@given(net=nets(most=14))
def test_any_large_model(net: Net) -> None:
    check(net, net.sizes, batchnorms=None, again=not net.reads_after_writes)
