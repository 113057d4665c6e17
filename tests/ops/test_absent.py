"""Which calls fail for want of a tensor when an argument is None."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxrep.ops.absent import lacks_operand


@pytest.mark.parametrize(
    "target, args, lacks",
    [
        (torch.cat, ([None, 1],), True),
        (torch.conv2d, (1, 2, None), False),
        (torch.layer_norm, (1, (3,), None, None), False),
        (nn.functional.batch_norm, (1, None, None), False),
        (nn.functional.pad, (None, (1, 1)), True),
        (nn.functional.interpolate, (1, None, 2), False),
        ("clamp", (1, None, 2), False),
        ("norm", (1, 2, None), False),
        ("add", (1, None), True),
        ("matmul", (1, None), True),
        ("sum", (1, None), False),
        ("no_such_method", (1, None), False),
        (max, (1, None), False),
    ],
)
def test_none_for_a_tensor(target: Any, args: tuple[Any, ...], lacks: bool) -> None:
    assert lacks_operand(target, args, {}) is lacks
