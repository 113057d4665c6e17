"""Train-time blocks of the literature, written from their descriptions in two spellings each.

`BLOCKS` lists those that sums, scales and constants describe: a name, a model, the shapes to run it
at and how many layers must be left. The first spelling is the one the authors' code uses (modules,
attributes, `+=`); the second says the same with functions, methods or another order of operands.
What needs chains, padding or pooling is in `blocks_linear` and `blocks_chains`, concatenation and
slices are in `blocks_concat`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from support.models import conv_bn


@dataclass(frozen=True)
class Block:
    """A model, what to run it at, and what must be left of it.

    Args:
        name: of the test.
        make: a new model.
        shapes: input shapes, or tuples of them for several inputs.
        layers: convolution and linear layers left; None where fewer are right but not required.
        batchnorms: BatchNorms left; None for any number.
        operations: operations left, where the number of layers says nothing.
        example_inputs: whether only an example tells the rank, as for Linear and BatchNorm1d.
    """

    name: str
    make: Callable[[], nn.Module]
    shapes: Sequence[Any]
    layers: int | None = 1
    batchnorms: int | None = 0
    operations: int | None = None
    example_inputs: bool = False


def normalise(norm: Any, x: Tensor) -> Tensor:
    """A BatchNorm by its function, keywords and all."""
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
        training=False, eps=norm.eps,
    )  # fmt: skip


class RepVGG(nn.Module):
    """act( BN(conv3x3 x) + BN(conv1x1 x) + BN(x) or 0 ), optionally alpha * the 1x1 branch."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int = 1, groups: int = 1, alpha: bool = False
    ) -> None:
        super().__init__()
        how = {"stride": stride, "groups": groups}
        self.dense = conv_bn(inputs, outputs, 3, padding=1, **how)
        self.point = conv_bn(inputs, outputs, 1, **how)
        keeps = inputs == outputs and stride == 1
        self.identity = nn.BatchNorm2d(inputs) if keeps else None
        self.alpha = nn.Parameter(torch.tensor([0.7])) if alpha else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        kept = 0 if self.identity is None else self.identity(x)
        point = self.point(x) if self.alpha is None else self.alpha * self.point(x)
        return self.act(self.dense(x) + point + kept)


class RepVGGFunctional(RepVGG):
    """The same with functions, methods and the operands the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.dense
        out = normalise(norm, torch.conv2d(x, conv.weight, None, conv.stride, 1, 1, conv.groups))
        conv, norm = self.point
        point = normalise(norm, F.conv2d(x, conv.weight, stride=conv.stride, groups=conv.groups))
        if self.alpha is not None:
            point = torch.mul(point, self.alpha)
        out = point.add(out)
        if self.identity is not None:
            out = torch.add(normalise(self.identity, x), out)
        return F.relu(out)


class ConvModule(nn.Module):
    """The wrapper of YOLO code bases: conv, norm and an activation that may be nothing."""

    def __init__(self, inputs: int, outputs: int, k: int, s: int, p: int, g: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, k, s, p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class RepConv(nn.Module):
    """YOLOv7, YOLOv9 and ultralytics: RepVGG through wrappers, SiLU after it."""

    def __init__(
        self, inputs: int, outputs: int, *, s: int = 1, g: int = 1, bn: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = ConvModule(inputs, outputs, 3, s, 1, g)
        self.conv2 = ConvModule(inputs, outputs, 1, s, 0, g)
        self.bn = nn.BatchNorm2d(inputs) if bn and inputs == outputs and s == 1 else None
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        kept = 0 if self.bn is None else self.bn(x)
        return self.act(self.conv1(x) + self.conv2(x) + kept)


class RepConvSum(RepConv):
    def forward(self, x: Tensor) -> Tensor:
        branches = [self.conv1, self.conv2, *([] if self.bn is None else [self.bn])]
        return self.act(sum(branch(x) for branch in branches))


class Conv2(nn.Module):
    """ultralytics: act(BN(conv3x3 x + conv1x1 x))."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        how: dict[str, Any] = {"groups": groups, "bias": False}
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, **how)
        self.cv2 = nn.Conv2d(inputs, outputs, 1, stride, **how)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x) + self.cv2(x)))


class Conv2InPlace(Conv2):
    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(x)
        y += self.conv(x)
        return F.silu(normalise(self.bn, y), inplace=True)


class QARepVGG(nn.Module):
    """act(BN( BN(conv3x3 x) + alpha * conv1x1(x) + x )), also dilated."""

    def __init__(self, channels: int, *, groups: int = 1, dilation: int = 1) -> None:
        super().__init__()
        how = {"groups": groups, "padding": dilation, "dilation": dilation}
        self.dense = conv_bn(channels, channels, 3, **how)
        self.point = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.alpha = 0.5
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.dense(x) + self.alpha * self.point(x) + x))


class QARepVGGMethods(QARepVGG):
    def forward(self, x: Tensor) -> Tensor:
        y = x.add(self.point(x), alpha=self.alpha)
        return self.bn(y.add_(self.dense(x))).relu_()


class Scale(nn.Module):
    """A learned factor per channel, viewed in every forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, self.channels, 1, 1)


class LinearAdd(nn.Module):
    """YOLOv6: act(BN(s1*conv3x3 x + s2*conv1x1 x + s3*x))."""

    def __init__(self, channels: int, *, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        how: dict[str, Any] = {"groups": groups, "stride": stride, "bias": False}
        self.dense = nn.Conv2d(channels, channels, 3, padding=1, **how)
        self.point = nn.Conv2d(channels, channels, 1, **how)
        self.scales = nn.ModuleList(Scale(channels) for _ in range(3 if stride == 1 else 2))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scales[0](self.dense(x)) + self.scales[1](self.point(x))
        if len(self.scales) > 2:
            y += self.scales[2](x)
        return F.relu(self.bn(y))


class LinearAddReshape(LinearAdd):
    def forward(self, x: Tensor) -> Tensor:
        factors = [scale.weight.reshape(-1, 1, 1) for scale in self.scales]
        parts = [factors[0] * self.dense(x), torch.mul(self.point(x), factors[1])]
        if len(factors) > 2:
            parts.append(x.mul(factors[2][None]))
        return F.relu(self.bn(sum(parts)))


class MobileOne(nn.Module):
    """act( BN(conv1x1) + BN(x) + sum of BN(conv k x k) ), added up from int 0 with +=."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1,
        branches: int = 4, act: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        how = {"stride": stride, "groups": groups}
        keeps = inputs == outputs and stride == 1
        self.identity = nn.BatchNorm2d(inputs) if keeps else None
        self.scale = conv_bn(inputs, outputs, 1, **how) if kernel > 1 else None
        self.convs = nn.ModuleList(
            conv_bn(inputs, outputs, kernel, padding=kernel // 2, **how) for _ in range(branches)
        )
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        kept: Any = 0
        if self.identity is not None:
            kept = self.identity(x)
        scale: Any = 0
        if self.scale is not None:
            scale = self.scale(x)
        out = scale + kept
        for conv in self.convs:
            out += conv(x)
        return self.act(out)


class MobileOneStack(MobileOne):
    """Added up pairwise: sums nested in sums."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [conv(x) for conv in self.convs]
        parts += [] if self.scale is None else [self.scale(x)]
        parts += [] if self.identity is None else [self.identity(x)]
        while len(parts) > 1:
            parts = [
                torch.add(parts[i], parts[i + 1]) if i + 1 < len(parts) else parts[i]
                for i in range(0, len(parts), 2)
            ]
        return self.act(parts[0])


class RepMixer(nn.Module):
    """FastViT: x + gamma * ( MobileOne(x) - BN(x) )."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.mixer = MobileOne(channels, channels, kernel, groups=channels, branches=1, act=False)
        self.gamma = nn.Parameter(torch.linspace(0.1, 1, channels).reshape(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * (self.mixer(x) - self.norm(x))


class RepMixerMethods(RepMixer):
    def forward(self, x: Tensor) -> Tensor:
        difference = torch.sub(self.mixer(x), self.norm(x)).mul(self.gamma)
        return difference.add_(x)


class LargeKernel(nn.Module):
    """RepLKNet and FastViT: BN(dw 31x31) + BN(dw 5x5), strides."""

    def __init__(self, channels: int, *, kernel: int = 31, small: int = 5, stride: int = 1) -> None:
        super().__init__()
        how = {"groups": channels, "stride": stride}
        self.large = conv_bn(channels, channels, kernel, padding=kernel // 2, **how)
        self.small = conv_bn(channels, channels, small, padding=small // 2, **how)

    def forward(self, x: Tensor) -> Tensor:
        out = self.large(x)
        out += self.small(x)
        return out


class LargeKernelSame(LargeKernel):
    """padding='same' where the stride allows it."""

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for conv, norm in (self.small, self.large):
            same = "same" if conv.stride == (1, 1) else conv.padding
            y = F.conv2d(x, conv.weight, None, conv.stride, same, groups=conv.groups)
            parts.append(normalise(norm, y))
        return torch.add(*parts)


class RepVggDw(nn.Module):
    """RepViT: BN( BN(dw3x3 x) + dw1x1 x + x )."""

    def __init__(self, channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = conv_bn(channels, channels, 3, padding=1, groups=channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, groups=channels, bias=bias)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.conv1(x)) + x)


class RepVggDwMethods(RepVggDw):
    def forward(self, x: Tensor) -> Tensor:
        y = x.__radd__(self.conv(x)).add(self.conv1(x))
        return normalise(self.bn, y)


class RepVitHead(nn.Module):
    """RepViT: ( Linear(BN1d x) + Linear(BN1d x) ) / 2."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(features) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(features, classes) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (head(norm(x)) for norm, head in zip(self.norms, self.heads, strict=True))
        return (a + b) / 2


class RepVitHeadFunctional(RepVitHead):
    def forward(self, x: Tensor) -> Tensor:
        pairs: Any = zip(self.norms, self.heads, strict=True)
        a, b = (F.linear(normalise(norm, x), head.weight, head.bias) for norm, head in pairs)
        return torch.div(b.add(a), 2.0)


class Residual(nn.Module):
    """SHViT and EfficientViM: x + BN(dw3x3 x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fn = conv_bn(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


class ResidualInPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fn(x)
        y += x
        return y


class PositionEncoding(nn.Module):
    """Conditional position encoding: x + dw7x7(x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + x


class PositionEncodingMethods(PositionEncoding):
    def forward(self, x: Tensor) -> Tensor:
        conv = self.proj
        y = torch.conv2d(x, conv.weight, conv.bias, padding="same", groups=conv.groups)
        return 1.0 * x + y


class ACNet(nn.Module):
    """BN(kxk) + BN(kx1) + BN(1xk)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1,
        dilation: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        p = dilation * (kernel // 2)
        how = {"stride": stride, "groups": groups, "dilation": dilation}
        self.square = conv_bn(inputs, outputs, kernel, padding=p, **how)
        self.vertical = conv_bn(inputs, outputs, (kernel, 1), padding=(p, 0), **how)
        self.horizontal = conv_bn(inputs, outputs, (1, kernel), padding=(0, p), **how)

    def forward(self, x: Tensor) -> Tensor:
        square = self.square(x)
        vertical = self.vertical(x)
        return square + vertical + self.horizontal(x)


class ACNetNested(ACNet):
    def forward(self, x: Tensor) -> Tensor:
        thin = self.vertical(x)
        thin += self.horizontal(x)
        return torch.add(other=self.square(x), input=thin)


class OREPA(nn.Module):
    """BN(F.conv2d(x, sum of einsum(parameters)))."""

    mean: Tensor

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        width = inputs // groups
        self.origin = nn.Parameter(torch.randn(outputs, width, 3, 3) / 3)
        self.average = nn.Parameter(torch.randn(outputs, width, 1, 1))
        self.expand = nn.Parameter(torch.randn(2 * width, width, 1, 1))
        self.shrink = nn.Parameter(torch.randn(outputs, 2 * width, 3, 3) / 3)
        self.vector = nn.Parameter(torch.randn(4, outputs))
        self.register_buffer("mean", torch.full((1, 1, 3, 3), 1 / 9))
        self.norm = nn.BatchNorm2d(outputs)

    def weight(self) -> Tensor:
        origin = torch.einsum("oihw,o->oihw", self.origin, self.vector[0, :])
        average = torch.einsum("oihw,o->oihw", self.average * self.mean, self.vector[1, :])
        pair = torch.einsum("mi,omhw->oihw", self.expand.squeeze(3).squeeze(2), self.shrink)
        point = F.pad(self.average, [1, 1, 1, 1])
        vector = self.vector.unsqueeze(-1).unsqueeze(-1)[3].view(-1, 1, 1, 1)
        return (
            origin + average + torch.einsum("oihw,o->oihw", pair, self.vector[2]) + point * vector
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight(), stride=self.stride, padding=1, groups=self.groups)
        return F.relu(self.norm(y))


class OREPAMethods(OREPA):
    def weight(self) -> Tensor:
        parts = [
            self.origin,
            self.average.mul(self.mean),
            self.shrink,
            F.pad(self.average, (1,) * 4),
        ]
        parts[2] = torch.tensordot(self.shrink, self.expand.flatten(1), dims=([1], [0])).movedim(
            -1, 1
        )
        return torch.stack(parts).mul(self.vector[..., None, None, None]).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.conv2d(x, self.weight(), None, self.stride, 1, 1, self.groups)
        return normalise(self.norm, y).relu()


class DilatedReparam(nn.Module):
    """UniRepLKNet: BN( BN(dw 13x13) + sum of BN(dw k dilated r) )."""

    BRANCHES = ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))

    def __init__(self, channels: int) -> None:
        super().__init__()
        how: dict[str, Any] = {"groups": channels}
        self.origin = conv_bn(channels, channels, 13, padding=6, **how)
        self.dilated = nn.ModuleList(
            conv_bn(channels, channels, k, padding=r * (k - 1) // 2, dilation=r, **how)
            for k, r in self.BRANCHES
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        for branch in self.dilated:
            out = out + branch(x)
        return self.norm(out)


class DilatedReparamSum(DilatedReparam):
    def forward(self, x: Tensor) -> Tensor:
        return normalise(self.norm, sum(branch(x) for branch in (*self.dilated, self.origin)))


class Implicit(nn.Module):
    """YOLO IDetect: m * conv1x1(x + a), a and m of shape (1, C, 1, 1)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.ia = nn.Parameter(torch.randn(1, inputs, 1, 1))
        self.im = nn.Parameter(1 + 0.1 * torch.randn(1, outputs, 1, 1))
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.im * self.conv(self.ia + x)


class ImplicitMethods(Implicit):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.add(self.ia.expand_as(self.ia))).mul_(self.im)


class FrozenBatchNorm(nn.Module):
    """Detection backbones: scale and shift computed from buffers in every forward."""

    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 1.5, channels))
        self.register_buffer("bias", torch.linspace(-1, 1, channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.reshape(1, -1, 1, 1)
        variance = self.running_var.reshape(1, -1, 1, 1)
        scale = weight * (variance + self.eps).rsqrt()
        bias = self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale
        return x * scale + bias


class FrozenBatchNormSqrt(FrozenBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        deviation = torch.sqrt(self.running_var + self.eps)[:, None, None]
        y = torch.div(x.sub(self.running_mean.view(-1, 1, 1)), deviation)
        return y.mul(self.weight.view(-1, 1, 1)).add_(self.bias[None, :, None, None])


def frozen(kind: type[nn.Module], inputs: int, outputs: int, **how: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, bias=False, **how), kind(outputs), nn.ReLU())


class StandardizedConv(nn.Conv2d):
    """Weight standardisation: the weight is normalised in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = self.weight.std(dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardizedConvBatchNorm(nn.Conv2d):
    """As timm does it: by a batch_norm over the weight in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(
            x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding,
            self.dilation, self.groups,
        )  # fmt: skip


def standardized(kind: Any, inputs: int, outputs: int, **how: Any) -> nn.Module:
    return nn.Sequential(kind(inputs, outputs, 3, **how), nn.BatchNorm2d(outputs))


def weight_normed(new: bool, inputs: int, outputs: int, **how: Any) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, **how)
    with torch.no_grad():  # the old one leaves a weight that deepcopy takes only without a history
        if new:
            torch.nn.utils.parametrizations.weight_norm(conv)
        else:
            torch.nn.utils.weight_norm(conv)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class MaskedConv(nn.Conv2d):
    """A pruning mask kept as a buffer and applied in every forward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5).to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


def masked(inputs: int, outputs: int, **how: Any) -> nn.Module:
    return nn.Sequential(MaskedConv(inputs, outputs, 3, **how), nn.BatchNorm2d(outputs))


def pruned(inputs: int, outputs: int, **how: Any) -> nn.Module:
    """torch's own pruning: a mask and a pre-hook."""
    conv = nn.Conv2d(inputs, outputs, 3, **how)
    with torch.no_grad():
        prune.l1_unstructured(conv, "weight", amount=0.4)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Regrouped(nn.Module):
    """``a(x) + c(h) + b(x) + d(h)``: one layer for each of the two sources."""

    def __init__(self, channels: int, *, groups: int = 1) -> None:
        super().__init__()
        how: dict[str, Any] = {"groups": groups}
        self.a = conv_bn(channels, channels, 3, padding=1, **how)
        self.b = conv_bn(channels, channels, 1, **how)
        self.c = nn.Conv2d(channels, channels, 3, padding=1, **how)
        self.d = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1), **how)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x - 0.5)
        return self.norm(self.a(x) + self.c(h) + self.b(x) + self.d(h))


class RegroupedNested(Regrouped):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x.sub(0.5))
        y = self.a(x).add_(self.c(h))
        return normalise(self.norm, torch.add(y, self.d(h) + self.b(x)))


SIZES = ((2, 8, 9, 9), (1, 8, 12, 7))


EXPECTED = ("layers", "batchnorms", "operations", "example_inputs")


def both(
    name: str, kinds: Sequence[Any], *args: Any, shapes: Any = SIZES, **how: Any
) -> Iterator[Block]:
    """A block of each of `kinds`; what `Block` expects is taken out of `how`."""
    expected = {key: how.pop(key) for key in EXPECTED if key in how}
    said = ",".join([*map(str, args), *(f"{k}={v}" for k, v in how.items())])
    for kind in kinds:
        label = getattr(kind, "__name__", name)
        yield Block(f"{name}-{label}({said})", lambda k=kind: k(*args, **how), shapes, **expected)


def _listed() -> Iterator[Block]:
    vgg = (RepVGG, RepVGGFunctional)
    for how in ({}, {"groups": 4}, {"alpha": True}, {"groups": 8, "alpha": True}):
        yield from both("RepVGG", vgg, 8, 8, **how)
    for how in ({"stride": 2}, {"stride": 2, "groups": 2}, {"stride": 3, "alpha": True}):
        yield from both("RepVGG", vgg, 8, 12, **how)
    for how in ({}, {"bn": True}, {"g": 8, "bn": True}, {"s": 2}):
        yield from both("RepConv", (RepConv, RepConvSum), 8, 8, **how)
    for how in ({}, {"stride": 2}, {"groups": 4}):
        yield from both("Conv2", (Conv2, Conv2InPlace), 8, 16, **how)
    for how in ({}, {"groups": 2}, {"dilation": 2}, {"groups": 8, "dilation": 3}):
        yield from both("QARepVGG", (QARepVGG, QARepVGGMethods), 8, **how)
    for how in ({}, {"stride": 2}, {"groups": 4}):
        yield from both("LinearAdd", (LinearAdd, LinearAddReshape), 8, **how)
    one = (MobileOne, MobileOneStack)
    yield from both("MobileOne", one, 8, 8, 3, groups=8)
    yield from both("MobileOne", one, 8, 8, 3, groups=8, stride=2, branches=1)
    yield from both("MobileOne", one, 8, 16, 1, branches=3)
    yield from both("MobileOne", one, 8, 8, 1, branches=1, act=False)
    yield from both("MobileOne", one, 8, 8, 5, groups=2, branches=2)
    yield from both("RepMixer", (RepMixer, RepMixerMethods), 8)
    yield from both("RepMixer", (RepMixer, RepMixerMethods), 8, 7)
    large = (LargeKernel, LargeKernelSame)
    yield from both("LargeKernel", large, 8)
    yield from both("LargeKernel", large, 8, kernel=7, small=3, stride=2)
    for bias in (True, False):
        yield from both("RepVggDw", (RepVggDw, RepVggDwMethods), 8, bias=bias)
    heads = (RepVitHead, RepVitHeadFunctional)
    yield from both("RepViT-head", heads, 8, 5, shapes=((2, 8), (3, 8)), example_inputs=True)
    yield from both("Residual", (Residual, ResidualInPlace), 8)
    yield from both("CPE", (PositionEncoding, PositionEncodingMethods), 8)
    for how in ({}, {"stride": 2}, {"groups": 4}, {"dilation": 2}):
        yield from both("ACNet", (ACNet, ACNetNested), 8, 8, **how)
    yield from both("ACNet", (ACNet, ACNetNested), 8, 4, 5, groups=2)
    for how in ({}, {"stride": 2}, {"groups": 2}):
        yield from both("OREPA", (OREPA, OREPAMethods), 8, 8, **how)
    yield from both("UniRepLKNet", (DilatedReparam, DilatedReparamSum), 8)
    for outputs in (6, 18):
        yield from both("Implicit", (Implicit, ImplicitMethods), 8, outputs)
    for how in ({}, {"stride": 2, "padding": 1, "groups": 4}):
        for name, kinds, make in (
            ("FrozenBatchNorm", (FrozenBatchNorm, FrozenBatchNormSqrt), frozen),
            ("standardised", (StandardizedConv, StandardizedConvBatchNorm), standardized),
            ("weight_norm", (True, False), weight_normed),
        ):
            for kind in kinds:
                said = f"{name}-{getattr(kind, '__name__', kind)}({how or ''})"
                yield Block(said, lambda m=make, k=kind, h=how: m(k, 8, 8, **h), SIZES)
        yield from both("mask", (masked, pruned), 8, 8, **how)
    for how in ({}, {"groups": 4}):
        yield from both("regrouped", (Regrouped, RegroupedNested), 8, layers=2, **how)


BLOCKS: tuple[Block, ...] = tuple(_listed())
