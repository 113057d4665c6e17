"""What every test shares: threads, Hypothesis profiles, and torchvision on small torch builds."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings


def _make_torchvision_importable() -> None:
    """Declare the two operators torchvision needs when its binary part does not fit this torch.

    A CPU build of torch beside a CUDA build of torchvision cannot load torchvision's operators, and
    then ``import torchvision`` raises for want of their names. The models need neither of them.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


_make_torchvision_importable()

# Nearly all tensors here are tiny: more threads would only wait for each other, for minutes when
# something else runs beside the suite. Two cores are better used by `pytest -n 2`.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random weights in every run, whatever ran before in the same process."""
    torch.manual_seed(0)


# Time limits and health checks are off everywhere: one example may build and trace several models.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
# The same examples every time for whoever just wants to know whether it works; `random` and `wide`
# look for new ones.
settings.register_profile("dev", max_examples=30, derandomize=True, database=None, **_COMMON)
settings.register_profile("ci", max_examples=60, derandomize=True, database=None, **_COMMON)
settings.register_profile("random", max_examples=100, **_COMMON)
settings.register_profile("wide", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
