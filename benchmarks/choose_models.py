"""Write models.txt: the smallest model with a convolution of every timm and torchvision family."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import _torchvision  # noqa: F401
import timm
import torch
import torchvision
from torch import nn

LIST = Path(__file__).with_name("models.txt")
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def main() -> None:
    chosen = [*_timm(), *_torchvision_families()]
    header = (
        f"# The smallest model with a convolution of every family: timm {timm.__version__}, "
        f"torchvision {torchvision.__version__}.\n# family  model  parameters; "
        "made by choose_models.py\n"
    )
    LIST.write_text(header + "".join(f"{a} {b} {n}\n" for a, b, n in chosen))
    print(f"{len(chosen)} families")


def _timm() -> Iterator[tuple[str, str, int]]:
    for module in timm.list_modules():
        # test_* are made for timm's own unit tests and are nobody's network.
        names = timm.list_models(module=module, exclude_filters="test_*")
        sizes = {name: _parameters(lambda n=name: timm.create_model(n)) for name in names}
        yield from _smallest(f"timm.{module}", "timm", sizes)


def _torchvision_families() -> Iterator[tuple[str, str, int]]:
    models = torchvision.models
    families: dict[str, dict[str, int | None]] = {}
    for name in models.list_models():
        builder = models.get_model_builder(name)
        family = builder.__module__.removeprefix("torchvision.models.")
        if family.startswith("quantization"):
            continue
        dense = family.startswith(("detection", "segmentation"))
        options = {"weights_backbone": None} if dense else {}
        families.setdefault(family, {})[name] = _parameters(lambda b=builder, o=options: b(**o))
    for family, sizes in sorted(families.items()):
        yield from _smallest(f"torchvision.{family}", "torchvision", sizes)


def _smallest(
    family: str, library: str, sizes: dict[str, int | None]
) -> Iterator[tuple[str, str, int]]:
    known = {name: size for name, size in sizes.items() if size is not None}
    if known:
        name = min(known, key=lambda n: (known[n], n))
        print(f"{family}: {name} ({known[name]:,} parameters, {len(known)} models)", flush=True)
        yield family, f"{library}:{name}", known[name]


def _parameters(build: Callable[[], nn.Module]) -> int | None:
    """Parameters of a model with a convolution, None for any other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                model = build()
        except Exception:  # some build tensors that meta cannot: then for real
            try:
                model = build()
            except Exception as error:
                print(f"  not built: {type(error).__name__}: {str(error)[:80]}")
                return None
    if not any(isinstance(m, _CONVOLUTIONS) for m in model.modules()):
        return None
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
