"""Models people use: exact in float64, and no more work than their authors' converters leave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fxrep
from support.check import count, distance, inputs_of, lint, randomize, run, untouched

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

pytestmark = pytest.mark.real

# Convolutions, BatchNorms and operations that the authors' own conversion leaves (timm 1.0.31).
# fastvit_t8's leaves 10 BatchNorms and repghostnet_050's 48, of which none is needed.
YARDSTICK = {
    "repvgg_a0": (22, 0, 48),
    "mobileone_s0": (43, 0, 90),
    "mobileone_s4": (67, 0, 162),
    "fastvit_t8": (52, 0, 117),
    "repvit_m1": (103, 0, 199),
    "repghostnet_050": (95, 0, 274),
    "levit_128s": (4, 0, 523),
    "efficientvit_m0": (116, 0, 821),
    "shvit_s1": (77, 0, 360),
}
SIZES = {"levit_128s": 224, "efficientvit_m0": 224, "fastvit_t8": 128}
QUICK = ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repghostnet_050", "shvit_s1", "levit_128s")

# The smallest of some families that have no converter, each with a structure of its own.
OTHERS = ("resnet18", "regnetx_002", "mobilenetv2_035", "dla34", "ghostnetv2_100", "convnext_atto")
VISION = ("googlenet", "squeezenet1_0", "shufflenet_v2_x0_5", "mnasnet0_5")


def exact(model: nn.Module, size: int) -> tuple[nn.Module, Any, Any]:
    """Optimize in float64 and compare; returns the result, and what ran before and after."""
    randomize(model).double().eval()
    calm(model)
    optimized = untouched(model, lambda: fxrep.optimize(model))
    inputs = inputs_of((1, 3, size, size), torch.float64)
    # a copy: some models keep state between calls
    reference = copy.deepcopy(model)
    assert distance(run(optimized, inputs), run(reference, inputs)) < 1e-10
    lint(optimized)
    before, after = count(reference, inputs), count(optimized, inputs)
    assert after.macs <= before.macs and after.layers <= before.layers
    assert after.total <= before.total
    return optimized, before, after


def calm(model: nn.Module) -> None:
    """Keep deep models from amplifying rounding: many layers of random scales overflow."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            module.weight.data.clamp_(0.5, 1.0)


def meets(name: str) -> None:
    model = timm.create_model(name, pretrained=False)
    optimized, _, after = exact(model, SIZES.get(name, 96))
    convs, batchnorms, operations = YARDSTICK[name]
    assert after.convs <= convs, f"{after.convs} convolutions"
    assert after.batchnorms <= batchnorms, fxrep.report(optimized)
    assert after.total <= operations, f"{after.total} operations: {dict(after.kinds)}"


@pytest.mark.parametrize("name", QUICK)
def test_no_more_than_the_authors_converter_leaves(name: str) -> None:
    meets(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(YARDSTICK) - set(QUICK)))
def test_no_more_than_the_authors_converter_leaves_larger(name: str) -> None:
    meets(name)


@pytest.mark.parametrize("name", OTHERS)
def test_timm(name: str) -> None:
    model = timm.create_model(name, pretrained=False)
    optimized, _, after = exact(model, 96)
    assert after.batchnorms == 0, fxrep.report(optimized)


@pytest.mark.parametrize("name", VISION)
def test_torchvision(name: str) -> None:
    kwargs = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **kwargs)
    optimized, _, after = exact(model, 96)
    assert after.batchnorms == 0, fxrep.report(optimized)


def test_single_precision_stays_within_rounding() -> None:
    model = randomize(timm.create_model("repvgg_a0", pretrained=False)).eval()
    calm(model)
    inputs = inputs_of((1, 3, 96, 96), torch.float32)
    optimized = fxrep.optimize(model, inputs)
    report = fxrep.report(optimized)
    assert report.error is not None and report.error < 1e-5
    wide = copy.deepcopy(model).double()
    assert distance(run(optimized, inputs), run(wide, (inputs[0].double(),))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet26t", "densenet121", "efficientnet_lite0", "mobilenetv3_small_050", "hardcorenas_a",
        "rexnetr_200", "skresnet18", "res2net50d", "selecsls42", "tresnet_m", "vovnet39a",
        "xception41", "inception_v3", "inception_v4", "hrnet_w18_small", "cspresnet50",
        "edgenext_xx_small", "mobilevit_xxs", "mobilevitv2_050",
        "nextvit_small", "efficientformer_l1", "swiftformer_xs",
        "starnet_s050", "tiny_vit_5m_224", "levit_conv_128s", "poolformer_s12", "coat_tiny",
        "convit_tiny", "crossvit_tiny_240", "gcresnext26ts", "lcnet_050", "tinynet_e", "fbnetc_100",
        "nfnet_l0", "dpn48b", "pit_ti_224", "visformer_tiny",
    ],
)  # fmt: skip
def test_wide(name: str) -> None:
    model = timm.create_model(name, pretrained=False)
    exact(model, model.default_cfg["input_size"][-1])
