"""Train-time blocks made of chains, bias-valued padding, crops and pooling, in several spellings.

As in `blocks`: the first spelling is the authors', the others say the same another way.
`LINEAR_BLOCKS` lists what must collapse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.blocks import Block, both, normalise
from support.models import Body, Forward, call, conv_bn

# Odd and even, and one so small that a 3x3 kernel sees both borders at once. What needs more than
# that raises at the last, and is compared at the others.
SIZES = ((2, 8, 9, 9), (1, 8, 12, 7), (1, 8, 3, 2))


Parts = Callable[[], dict[str, Any]]


def spelt(
    name: str, parts: Parts, *forwards: Forward, shapes: Any = SIZES, **expected: Any
) -> Iterator[Block]:
    """A block for each spelling of one forward over the same parts."""
    for i, forward in enumerate(forwards):
        make = lambda f=forward: Body(f, **parts())  # noqa: E731
        yield Block(f"{name}-{i}", make, shapes, **expected)


# --- crops ---------------------------------------------------------------------------------------


class ACNetCropped(nn.Module):
    """ACNet with any padding: thin branches crop where it is less than half a kernel."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, *, padding: int = 0, stride: int = 1,
        groups: int = 1, dilation: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.crop = dilation * (kernel // 2) - padding
        extra = max(0, -self.crop)
        how = {"stride": stride, "groups": groups, "dilation": dilation}
        self.square = conv_bn(inputs, outputs, kernel, padding=padding, **how)
        self.vertical = conv_bn(inputs, outputs, (kernel, 1), padding=(padding, extra), **how)
        self.horizontal = conv_bn(inputs, outputs, (1, kernel), padding=(extra, padding), **how)

    def forward(self, x: Tensor) -> Tensor:
        c = self.crop
        square = self.square(x)
        vertical = self.vertical(x[:, :, :, c:-c] if c > 0 else x)
        horizontal = self.horizontal(x[:, :, c:-c, :] if c > 0 else x)
        return square + vertical + horizontal


class ACNetCroppedByPad(ACNetCropped):
    """Crops as an Ellipsis and as negative padding."""

    def forward(self, x: Tensor) -> Tensor:
        c = max(self.crop, 0)
        out = self.horizontal(F.pad(x, (0, 0, -c, -c)))
        out += self.vertical(x[..., c:-c] if c else x)
        return self.square(x).add_(out)


# --- bias-valued padding -------------------------------------------------------------------------


def pad_assigned(y: Tensor, value: Tensor, p: int) -> Tensor:
    """Padding with `value` as DBB, ECBSR and FMEN write it: with zeros, then overwritten."""
    z = F.pad(y, [p, p, p, p], "constant", 0)
    value = value.view(1, -1, 1, 1)
    z[:, :, 0:p, :] = value
    z[:, :, -p:, :] = value
    z[:, :, :, 0:p] = value
    z[:, :, :, -p:] = value
    return z


def pad_columns_first(y: Tensor, value: Tensor, p: int) -> Tensor:
    """The same in another order, by other indices."""
    z = F.pad(input=y, pad=(p,) * 4)
    value = value[None, :, None, None]
    z[..., -p:] = value
    z[..., :p] = value
    z[..., -p:, :] = value
    z[..., :p, :] = value
    return z


def pad_shifted(y: Tensor, value: Tensor, p: int) -> Tensor:
    """The same without assignments: zero is padded where `value` is subtracted."""
    value = value.reshape(-1, 1, 1)
    return F.pad(y - value, (p, p, p, p)) + value


Pad = Callable[[Tensor, Any, int], Tensor]


class BNAndPad(nn.Module):
    """BatchNorm, then padding with what it makes of zero."""

    def __init__(self, channels: int, p: int, pad: Pad) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.p, self.pad = p, pad

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        if self.p == 0:
            return y
        bn: Any = self.bn
        deviation = torch.sqrt(bn.running_var + bn.eps)
        value = bn.bias.detach() - bn.running_mean * bn.weight.detach() / deviation
        return self.pad(y, value, self.p)


class IdentityBased1x1(nn.Module):
    """A 1x1 whose kernel is a parameter plus the identity, added up in every forward."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        width = channels // groups
        self.conv = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.groups = groups
        self.identity = torch.eye(width).repeat(groups, 1).reshape(channels, width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight + self.identity.to(self.conv.weight.device).type_as(
            self.conv.weight
        )
        return F.conv2d(x, kernel, None, stride=1, padding=0, dilation=1, groups=self.groups)


class DBB(nn.Module):
    """Diverse Branch Block: BN(kxk) + BN(1x1) + BN(avgpool(pad(BN(1x1)))) + BN(kxk(pad(BN(1x1)))).

    A depthwise one has no 1x1 branch and pools its input itself.
    """

    pad: Pad = staticmethod(pad_assigned)

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1,
        identity: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        p = kernel // 2
        grouped: dict[str, Any] = {"groups": groups, "bias": False}
        strided = {"stride": stride, **grouped}
        self.origin = conv_bn(inputs, outputs, kernel, padding=p, **strided)
        depthwise = groups == outputs
        self.point = None if depthwise else conv_bn(inputs, outputs, 1, **strided)
        self.average = nn.Sequential()
        if not depthwise:
            self.average.append(nn.Conv2d(inputs, outputs, 1, **grouped))
            self.average.append(BNAndPad(outputs, p, self.pad))
        self.average.append(nn.AvgPool2d(kernel, stride, p if depthwise else 0))
        self.average.append(nn.BatchNorm2d(outputs))
        middle = inputs if identity else 2 * inputs
        self.pair = nn.Sequential(
            IdentityBased1x1(inputs, groups)
            if identity
            else nn.Conv2d(inputs, middle, 1, **grouped),
            BNAndPad(middle, p, self.pad),
            nn.Conv2d(middle, outputs, kernel, **strided),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        if self.point is not None:
            out += self.point(x)
        out += self.average(x)
        out += self.pair(x)
        return F.relu(out)


class DBBColumnsFirst(DBB):
    pad = staticmethod(pad_columns_first)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.add(self.pair(x), self.average(x))
        origin, norm = self.origin
        out = out + normalise(norm, call(origin, x))
        return torch.relu(out if self.point is None else self.point(x) + out)


class DBBShifted(DBB):
    pad = staticmethod(pad_shifted)


class ECB(nn.Module):
    """ECBSR: conv3x3 + (1x1 -> 3x3) + three (1x1 -> depthwise scale * mask) + x."""

    pad: Pad = staticmethod(pad_assigned)

    def __init__(self, inputs: int, outputs: int, *, multiplier: int = 2) -> None:
        super().__init__()
        middle = multiplier * outputs
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.first = nn.ModuleList(
            nn.Conv2d(inputs, width, 1) for width in (middle, outputs, outputs, outputs)
        )
        self.second = nn.Conv2d(middle, outputs, 3)
        self.scales = nn.ParameterList(torch.randn(outputs, 1, 1, 1) for _ in range(3))
        self.shifts = nn.ParameterList(torch.randn(outputs) for _ in range(3))
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        self.masks = nn.ParameterList(
            nn.Parameter(mask.expand(outputs, 1, 3, 3).clone(), requires_grad=False)
            for mask in (sobel, sobel.T, laplacian)
        )
        self.keeps = inputs == outputs
        self.act = nn.PReLU(outputs)

    def padded(self, x: Tensor, i: int) -> Tensor:
        point: Any = self.first[i]
        y = F.conv2d(input=x, weight=point.weight, bias=point.bias, stride=1)
        return self.pad(y, point.bias, 1)

    def filtered(self, x: Tensor, i: int) -> Tensor:
        mask = self.scales[i] * self.masks[i]
        y = self.padded(x, i + 1)
        return F.conv2d(y, weight=mask, bias=self.shifts[i], stride=1, groups=mask.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y + F.conv2d(self.padded(x, 0), self.second.weight, self.second.bias)
        y = y + self.filtered(x, 0) + self.filtered(x, 1) + self.filtered(x, 2)
        if self.keeps:
            y += x
        return self.act(y)


class ECBColumnsFirst(ECB):
    pad = staticmethod(pad_columns_first)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.second(self.padded(x, 0)), *(self.filtered(x, i) for i in range(3))]
        y = sum(parts).add_(call(self.conv, x))
        return self.act(torch.add(x, y) if self.keeps else y)


class ECBShifted(ECB):
    pad = staticmethod(pad_shifted)


class RRRB(nn.Module):
    """FMEN: conv1x1( conv3x3(pad(e)) + e ) + x with e = conv1x1(x), padded with its bias."""

    pad: Pad = staticmethod(pad_assigned)

    def __init__(self, channels: int, ratio: int = 2) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, ratio * channels, 1)
        self.fea = nn.Conv2d(ratio * channels, ratio * channels, 3)
        self.reduce = nn.Conv2d(ratio * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(x)
        kept = out
        out = self.fea(self.pad(out, self.expand.bias, 1)) + kept
        out = self.reduce(out)
        out += x
        return out


class RRRBColumnsFirst(RRRB):
    pad: Pad = staticmethod(pad_columns_first)

    def forward(self, x: Tensor) -> Tensor:
        e = call(self.expand, x)
        y = torch.add(e, call(self.fea, self.pad(e, self.expand.bias, 1)))
        return x + call(self.reduce, y)


class RRRBShifted(RRRB):
    pad = staticmethod(pad_shifted)


class Middle(nn.Module):
    """A biased 1x1, padded with its bias on some sides only, then an unpadded kernel."""

    def __init__(
        self, outputs: int = 8, *, rows: int = 1, columns: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.first = nn.Conv2d(8, 64, 1, groups=groups)
        self.second = nn.Conv2d(64, outputs, (1 + 2 * rows, 1 + 2 * columns), groups=groups)

    def padded(self, y: Tensor) -> Tensor:
        r, c = self.rows, self.columns
        z = F.pad(y, (c, c, r, r))
        value = self.first.bias.view(1, -1, 1, 1)
        if r:
            z[:, :, :r] = value
            z[:, :, -r:] = value
        if c:
            z[:, :, :, :c] = value
            z[:, :, :, -c:] = value
        return z

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.padded(self.first(x)))


class MiddleByConstant(Middle):
    """One value for all channels can be padded by F.pad itself."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.first.bias.data.fill_(0.75)  # the same in float32 and float64

    def padded(self, y: Tensor) -> Tensor:
        return F.pad(y, (self.columns,) * 2 + (self.rows,) * 2, value=0.75)


# --- chains --------------------------------------------------------------------------------------


class Conv3XC(nn.Module):
    """SPAN, its training branches: 1x1 -> 3x3 unpadded -> 1x1 of the padded input, + 1x1."""

    def __init__(
        self, inputs: int, outputs: int, *, gain: int = 2, s: int = 1, bias: bool = True,
        relu: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sk = nn.Conv2d(inputs, outputs, 1, s, bias=bias)
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, inputs * gain, 1, bias=bias),
            nn.Conv2d(inputs * gain, outputs * gain, 3, s, bias=bias),
            nn.Conv2d(outputs * gain, outputs, 1, bias=bias),
        )
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), "constant", 0)
        out = self.conv(padded) + self.sk(x)
        return F.leaky_relu(out, negative_slope=0.05) if self.relu else out


class Conv3XCFunctional(Conv3XC):
    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.conv
        y = call(second, call(first, nn.ZeroPad2d(1)(x)))
        y = call(self.sk, x).add_(call(third, y))
        return F.leaky_relu_(y, 0.05) if self.relu else y


class SESR(nn.Module):
    """Collapsible linear block: conv1x1(conv kxk to many channels) + x."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, width: int = 64) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, width, kernel, padding=kernel // 2)
        self.squeeze = nn.Conv2d(width, outputs, 1)
        self.keeps = inputs == outputs
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze(self.expand(x))
        if self.keeps:
            y = y + x
        return self.act(y)


class SESRFunctional(SESR):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.expand.weight, self.expand.bias, padding="same")
        y = torch.conv2d(y, self.squeeze.weight, self.squeeze.bias)
        return F.prelu(torch.add(x, y) if self.keeps else y, self.act.weight)


class RepDWConvS(nn.Module):
    """RepNeXt, small kernels: dw3x3 + dw(3,1) + dw(1,3) + dw2x2 dilated by 2."""

    def __init__(self, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        how: dict[str, Any] = {"groups": channels, "stride": stride}
        self.conv_3_3 = nn.Conv2d(channels, channels, 3, padding=1, **how)
        self.conv_3_w = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1), **how)
        self.conv_3_h = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), **how)
        self.conv_2_2 = nn.Conv2d(channels, channels, 2, padding=1, dilation=2, **how)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_3_3(x) + self.conv_3_w(x) + self.conv_3_h(x) + self.conv_2_2(x)


class RepDWConvSSum(RepDWConvS):
    def forward(self, x: Tensor) -> Tensor:
        return sum(call(layer, x) for layer in reversed(list(self.children())))  # type: ignore[return-value]


class RepDWConvM(nn.Module):
    """RepNeXt, medium: 7x7 + 5x3 + 3x5 + (1,7)->(7,1) + (1,5)->(5,1), each stride on its axis."""

    def __init__(self, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        dw: dict[str, Any] = {"groups": channels}
        both_axes = {"stride": stride, **dw}
        self.conv_7_7 = nn.Conv2d(channels, channels, 7, padding=3, **both_axes)
        self.conv_5_3 = nn.Conv2d(channels, channels, (5, 3), padding=(2, 1), **both_axes)
        self.conv_3_5 = nn.Conv2d(channels, channels, (3, 5), padding=(1, 2), **both_axes)
        self.pairs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(
                    channels, channels, (1, k), (1, stride), (0, k // 2), bias=False, **dw
                ),
                nn.Conv2d(
                    channels, channels, (k, 1), (stride, 1), (k // 2, 0), bias=False, **dw
                ),
            )
            for k in (7, 5)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_7_7(x) + self.conv_5_3(x) + self.conv_3_5(x)
        return out + self.pairs[0](x) + self.pairs[1](x)


class RepDWConvMInPlace(RepDWConvM):
    def forward(self, x: Tensor) -> Tensor:
        y = call(self.pairs[1][1], call(self.pairs[1][0], x))
        y += self.pairs[0](x)
        y.add_(self.conv_3_5(x)).add_(self.conv_5_3(x))
        return torch.add(y, self.conv_7_7(x))


def _listed() -> Iterator[Block]:
    how: dict[str, Any]
    cropped = (ACNetCropped, ACNetCroppedByPad)
    for how in (
        {}, {"stride": 2}, {"groups": 4}, {"padding": 1}, {"padding": 2}, {"dilation": 2},
    ):  # fmt: skip
        yield from both("ACNet-crop", cropped, 8, 8, shapes=SIZES, **how)
    yield from both("ACNet-crop", cropped, 8, 4, 5, padding=1, groups=2)
    yield from both("ACNet-crop", cropped, 8, 12, 5, padding=1, stride=2)

    dbb = (DBB, DBBColumnsFirst, DBBShifted)
    for how in ({}, {"identity": True}, {"groups": 2, "identity": True}, {"groups": 8}):
        for stride in ({}, {"stride": 2}):
            yield from both("DBB", dbb, 8, 8, shapes=SIZES, **how, **stride)
    yield from both("DBB", dbb, 8, 12, groups=4, shapes=SIZES)
    yield from both("DBB", dbb, 8, 12, 5, stride=2)
    yield from both("DBB", dbb, 8, 8, 5, groups=8)

    ecb = (ECB, ECBColumnsFirst, ECBShifted)
    for outputs in (8, 6):
        yield from both("ECB", ecb, 8, outputs, shapes=SIZES)
    yield from both("ECB", ecb, 8, 8, multiplier=4, shapes=SIZES)
    for how in ({}, {"ratio": 4}):
        yield from both("RRRB", (RRRB, RRRBColumnsFirst, RRRBShifted), 8, shapes=SIZES, **how)
    middle = (Middle, MiddleByConstant)
    for how in ({}, {"groups": 2}, {"rows": 2}, {"rows": 0}, {"columns": 0, "groups": 8}):
        yield from both("bias-padded", middle, 8, shapes=SIZES, **how)

    for how in ({}, {"s": 2}, {"bias": False}, {"relu": True, "s": 2}):
        yield from both("Conv3XC", (Conv3XC, Conv3XCFunctional), 8, 8, shapes=SIZES, **how)
    yield from both("Conv3XC", (Conv3XC, Conv3XCFunctional), 8, 12, gain=1, shapes=SIZES)
    for args in ((8, 8), (8, 8, 5), (8, 4, 3), (8, 12, 5, 128)):
        yield from both("SESR", (SESR, SESRFunctional), *args, shapes=SIZES)
    for how in ({}, {"stride": 2}):
        yield from both("RepNeXt-S", (RepDWConvS, RepDWConvSSum), 8, shapes=SIZES, **how)
        yield from both("RepNeXt-M", (RepDWConvM, RepDWConvMInPlace), 8, shapes=SIZES, **how)


LINEAR_BLOCKS: tuple[Block, ...] = tuple(_listed())
