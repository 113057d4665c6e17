"""efficientnet_pytorch."""

from __future__ import annotations

from functools import partial

from _libraries.case import Case, Library, named, of_images


def _net(name: str) -> Case:
    return of_images(named("efficientnet_pytorch.EfficientNet").from_name(name), 64, 96)


LIBRARY = Library(
    "efficientnet-pytorch",
    {name: partial(_net, f"efficientnet-{name}") for name in ("b0", "b1")},
)
