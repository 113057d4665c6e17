"""Blocks with concatenation, splits, slices and siblings, and whole small networks.

As in `blocks`: the first spelling is the authors', the others say the same another way.
`CONCAT_BLOCKS` lists what must collapse, `CHEAPER` what must cost a known share afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.blocks import Block, both, normalise
from support.blocks_linear import (
    SIZES,
    RepDWConvM,
    RepDWConvMInPlace,
    RepDWConvS,
    RepDWConvSSum,
    spelt,
)  # fmt: skip
from support.models import Body, call, conv, conv_bn

WIDE = ((2, 64, 9, 9), (1, 64, 12, 7), (1, 64, 3, 2))
TOKENS = ((2, 7, 8), (1, 4, 8))


class RepNeXtMixer(nn.Module):
    """RepNeXt: BN over the concatenation of identity, small, medium and large kernels.

    One convolution for each operand that is a sum: small 1, medium 1. All four as one 7x7 (or one
    11x11) would be several times the work, since three quarters of the channels need far fewer
    taps. The large pair is (1, 11) -> (11, 1): 22 taps, not 121, and with biases not exact, so 2
    stay. The BatchNorm folds into the convolutions, but the identity keeps its quarter of it.
    """

    kinds: tuple[Any, Any] = (RepDWConvS, RepDWConvM)

    def __init__(self, channels: int, *, bias: bool = True, k: int = 11) -> None:
        super().__init__()
        self.width = channels // 4
        how: dict[str, Any] = {"groups": self.width, "bias": bias}
        small, medium = self.kinds
        self.small, self.medium = small(self.width), medium(self.width)
        self.large = nn.Sequential(
            nn.Conv2d(self.width, self.width, (1, k), padding=(0, k // 2), **how),
            nn.Conv2d(self.width, self.width, (k, 1), padding=(k // 2, 0), **how),
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        i, s, m, large = torch.split(x, [self.width] * 4, dim=1)
        return self.norm(torch.cat((i, self.small(s), self.medium(m), self.large(large)), dim=1))


class RepNeXtMixerChunk(RepNeXtMixer):
    kinds = (RepDWConvSSum, RepDWConvMInPlace)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.chunk(4, 1))
        for i, part in enumerate((self.small, self.medium, self.large), start=1):
            parts[i] = part(parts[i])
        return normalise(self.norm, torch.concat(parts, -3))


class NextViT(nn.Module):
    """BN feeding several 1x1 convs that go different ways: attention over pixels, then an MLP."""

    def __init__(self, channels: int, *, head: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.query, self.key = conv(channels, head, 1), conv(channels, head, 1)
        self.value = conv(channels, channels, 1, bias=False)
        self.mlp = nn.Sequential(
            conv(channels, 2 * channels, 1), nn.ReLU(), conv(2 * channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = self.query(y).flatten(2), self.key(y).flatten(2), self.value(y).flatten(2)
        weight = (q.transpose(1, 2) @ k).softmax(-1)
        x = x + (v @ weight.transpose(1, 2)).reshape(x.shape)
        return x + self.mlp(self.norm2(x))


class NextViTFunctional(NextViT):
    def forward(self, x: Tensor) -> Tensor:
        y = normalise(self.norm1, x)
        parts = [torch.flatten(call(m, y), 2) for m in (self.value, self.key, self.query)]
        v, k, q = parts
        weight = F.softmax(torch.matmul(torch.transpose(q, 1, 2), k), dim=-1)
        x = torch.matmul(v, weight.transpose(1, 2)).view_as(x).add(x)
        return self.mlp(normalise(self.norm2, x)) + x


class BNSiblings(nn.Module):
    """BN feeding a gate and a value: two unpadded convs and a strided one."""

    def __init__(self, inputs: int, outputs: int, *, groups: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        how: dict[str, Any] = {"groups": groups}
        self.gate, self.value = conv(inputs, outputs, 1, **how), conv(inputs, outputs, 1, **how)
        self.down = conv(inputs, outputs, 2, stride=2, bias=False, **how)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return torch.sigmoid(self.gate(y)) * torch.tanh(self.value(y)), torch.relu(self.down(y))


class BNSiblingsFunctional(BNSiblings):
    def forward(self, x: Tensor) -> Any:
        y = normalise(self.norm, x)
        down, gate = call(self.down, y).relu(), call(self.gate, y)
        return call(self.value, y).tanh() * gate.sigmoid_(), down


class BottleneckCSP(nn.Module):
    """YOLO: act(BN(cat(conv(x), conv(y)))) below two ways through the block."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.cv1 = conv_bn(channels, hidden, 1)
        self.middle = conv_bn(hidden, hidden, 3, padding=1)
        self.cv2 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * hidden)
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.cv4 = conv_bn(2 * hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.cv1(x))
        y1 = self.cv3(y + self.act(self.middle(y)))
        y2 = self.cv2(x)
        return self.act(self.cv4(self.act(self.bn(torch.cat((y1, y2), dim=1)))))


class BottleneckCSPFunctional(BottleneckCSP):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = call(self.cv2, x)
        y = F.leaky_relu(self.cv1(x), 0.1)
        y = F.leaky_relu(self.middle(y), 0.1).add(y)
        y = normalise(self.bn, torch.concatenate([call(self.cv3, y), shortcut], -3))
        return F.leaky_relu(self.cv4(F.leaky_relu(y, 0.1)), 0.1)


class CatBN(nn.Module):
    """BN(cat(conv(x), conv(y))) of two sources, and nothing else."""

    def __init__(self, a: int, b: int, *, groups: int = 1, stride: int = 1) -> None:
        super().__init__()
        how: dict[str, Any] = {"groups": groups, "stride": stride, "bias": False}
        self.a = conv(8, a, padding=1, **how)
        self.b = conv(8, b, 1, **how)
        self.bn = nn.BatchNorm2d(a + b)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(x)
        return F.silu(self.bn(torch.cat((self.a(x), self.b(h)), 1)))


class CatBNFunctional(CatBN):
    def forward(self, x: Tensor) -> Tensor:
        parts = (call(self.a, x), self.b(x.sigmoid()))
        return F.silu(normalise(self.bn, torch.cat(tensors=parts, dim=-3)))


class LinearBN(nn.Module):
    """LeViT: Linear over the last axis of (N, L, C), BatchNorm1d over the flattened tokens."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.c = nn.Linear(inputs, outputs, bias=False)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class LinearBNView(LinearBN):
    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.c.weight)
        return normalise(self.bn, x.reshape(-1, x.shape[-1])).view(x.shape)


class LinearResidual(nn.Module):
    """Stochastic depth in training, an ordinary sum in eval: control flow on a flag."""

    def __init__(self, m: nn.Module, drop: float) -> None:
        super().__init__()
        self.m, self.drop = m, drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop > 0:
            keep = torch.rand(x.size(0), *(1,) * (x.dim() - 1), device=x.device).ge_(self.drop)
            return x + self.m(x) * keep.div(1 - self.drop).detach()
        return x + self.m(x)


class LeViT(nn.Module):
    """Conv-BN stem, attention and MLP of Linear-BN, two averaged heads of BN-Linear.

    Layers: stem 1, qkv 1, two matrix products, proj 1, MLP 2, and one head, since both read the
    same mean. The attention reads qkv through views, so that nothing merges across it.
    """

    linear: Any = LinearBN

    def __init__(self, width: int = 8, heads: int = 2, key: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, width, 3, stride=2, padding=1), nn.Hardswish())
        self.heads, self.key = heads, key
        self.qkv = self.linear(width, heads * key * 3)
        self.proj = nn.Sequential(nn.Hardswish(), self.linear(heads * key, width))
        self.mlp = LinearResidual(
            nn.Sequential(self.linear(width, 16), nn.Hardswish(), self.linear(16, width)), 0.1
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(width, 5) for _ in range(2))

    def attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, self.heads, -1)
        q, k, v = qkv.split([self.key] * 3, dim=3)
        weight = q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) * self.key**-0.5
        y = weight.softmax(dim=-1) @ v.permute(0, 2, 1, 3)
        return self.proj(y.transpose(1, 2).reshape(batch, length, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attend(x)
        x = self.mlp(x).mean(1)
        first, second = (out(norm(x)) for out, norm in zip(self.outs, self.norms, strict=True))
        return (first + second) / 2


class LeViTView(LeViT):
    linear = LinearBNView

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.stem(x), 2).permute(0, 2, 1)
        x = torch.add(self.attend(x), x)
        x = torch.mean(self.mlp(x), dim=1)
        parts = [out(normalise(n, x)) for out, n in zip(self.outs, self.norms, strict=True)]
        return 0.5 * (parts[1] + parts[0])


class CascadedAttention(nn.Module):
    """EfficientViT-m: each head reads its chunk and what the head before it gave, in a loop.

    Layers: a qkv and a depthwise conv for each head, two matrix products for each, proj, two for
    the residual MLP. The depthwise residual in front is one more.
    """

    def __init__(self, channels: int = 8, heads: int = 2, key: int = 2) -> None:
        super().__init__()
        width = channels // heads
        self.key, self.width = key, width
        self.front = LinearResidual(conv_bn(channels, channels, 3, padding=1, groups=channels), 0.1)
        self.qkvs = nn.ModuleList(conv_bn(width, 2 * key + width, 1) for _ in range(heads))
        self.dws = nn.ModuleList(conv_bn(key, key, 5, padding=2, groups=key) for _ in range(heads))
        self.proj = nn.Sequential(nn.ReLU(), conv_bn(channels, channels, 1))
        self.mlp = LinearResidual(
            nn.Sequential(conv_bn(channels, 16, 1), nn.ReLU(), conv_bn(16, channels, 1)), 0.0
        )

    def attend(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        chunks = x.chunk(len(self.qkvs), dim=1)
        outputs, feat = [], chunks[0]
        for i, (qkv, dw) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            if i > 0:
                feat = feat + chunks[i]
            y = qkv(feat).view(batch, -1, height, width)
            q, k, v = y.split([self.key, self.key, self.width], dim=1)
            q, k, v = dw(q).flatten(2), k.flatten(2), v.flatten(2)
            weight = (q.transpose(-2, -1) @ k * self.key**-0.5).softmax(dim=-1)
            feat = (v @ weight.transpose(-2, -1)).view(batch, self.width, height, width)
            outputs.append(feat)
        return self.proj(torch.cat(outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        x = x + self.attend(x)
        return self.mlp(x)


class MBConv(nn.Module):
    """TinyViT: conv-BN-act, depthwise-BN-act, conv-BN, residual, act."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(channels, hidden, 1)
        self.conv2 = conv_bn(hidden, hidden, 3, padding=1, groups=hidden)
        self.conv3 = conv_bn(hidden, channels, 1)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        x = F.gelu(self.conv1(x))
        x = F.gelu(self.conv2(x))
        x = self.drop_path(self.conv3(x))
        x += kept
        return F.gelu(x)


class Focus(nn.Module):
    """YOLOv5's stem: conv3x3 of four stride-2 slices, stacked on the channels."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, groups: int = 1) -> None:
        super().__init__()
        self.conv = conv_bn(4 * inputs, outputs, kernel, padding=kernel // 2, groups=groups)

    def slices(self, x: Tensor) -> Tensor:
        return torch.cat(
            (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(self.slices(x)))


class FocusLoop(Focus):
    def slices(self, x: Tensor) -> Tensor:
        columns = [x[:, :, :, i::2] for i in range(2)]
        return torch.concat([y[:, :, i::2] for y in columns for i in range(2)], dim=-3)


class FocusUnshuffle(Focus):
    """Space-to-depth in the order of pixel_unshuffle: the same with other weights."""

    def slices(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2)


class Inception(nn.Module):
    """Three 1x1 convs of one x going different ways, a pooled one, concatenated.

    Layers: the three siblings as one, 3x3, 5x5, and the 1x1 behind the max pooling.
    """

    def __init__(self, inputs: int, width: int = 8) -> None:
        super().__init__()
        self.point = conv_bn(inputs, width, 1)
        self.reduce3, self.reduce5 = conv_bn(inputs, width, 1), conv_bn(inputs, width, 1)
        self.conv3 = conv_bn(width, width, 3, padding=1)
        self.conv5 = conv_bn(width, width, 5, padding=2)
        self.pooled = conv_bn(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch1 = F.relu(self.point(x), inplace=True)
        branch3 = F.relu(self.conv3(F.relu(self.reduce3(x), inplace=True)), inplace=True)
        branch5 = F.relu(self.conv5(F.relu(self.reduce5(x), inplace=True)), inplace=True)
        pooled = F.relu(self.pooled(F.max_pool2d(x, 3, 1, 1)), inplace=True)
        return torch.cat([branch1, branch3, branch5, pooled], 1)


class InceptionFunctional(Inception):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (
            torch.relu(normalise(norm, call(layer, x)))
            for layer, norm in (self.point, self.reduce3, self.reduce5)
        )
        pooled = self.pooled(F.max_pool2d(x, 3, stride=1, padding=1)).relu()
        return torch.concat((a, self.conv3(b).relu_(), self.conv5(c).relu_(), pooled), -3)


class C3(nn.Module):
    """YOLOv5: two 1x1 siblings, a bottleneck behind the first, concatenated into a 1x1.

    Layers: the siblings as one, two in the bottleneck, the last.
    """

    def __init__(self, inputs: int, width: int = 8) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv_bn(inputs, width, 1), conv_bn(inputs, width, 1)
        self.m = nn.Sequential(
            conv_bn(width, width, 1), nn.SiLU(), conv_bn(width, width, 3, padding=1), nn.SiLU()
        )
        self.cv3 = conv_bn(2 * width, inputs, 1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.cv1(x))
        return self.act(self.cv3(torch.cat((y + self.m(y), self.act(self.cv2(x))), 1)))


class C3Functional(C3):
    def forward(self, x: Tensor) -> Tensor:
        other, y = F.silu(self.cv2(x)), F.silu(self.cv1(x))
        return F.silu(self.cv3(torch.cat([self.m(y).add(y), other], dim=1)))


class Heads(nn.Module):
    """Detection heads: three 1x1 convs of one x, returned as they are, in a dict."""

    def __init__(self, inputs: int, *outputs: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(conv(inputs, n, 1) for n in outputs)

    def forward(self, x: Tensor) -> Any:
        return {str(i): torch.sigmoid(head(x)) for i, head in enumerate(self.heads)}


class HeadsFunctional(Heads):
    def forward(self, x: Tensor) -> Any:
        outputs = [call(head, x).sigmoid() for head in reversed(list(self.heads))]
        return {str(i): y for i, y in enumerate(reversed(outputs))}


def pairs(a: Any, b: Any) -> Any:
    return zip(a, b, strict=True)


def _grouped() -> Iterator[Block]:
    """Equal convs of equal chunks in their order, concatenated: one grouped conv."""
    for how in ({}, {"stride": 2, "padding": 1}, {"groups": 2}, {"bias": False, "dilation": 2}):
        for outputs in (2, 6):
            yield from spelt(
                f"chunk, conv, cat ({outputs}, {how or ''})",
                lambda h=how, o=outputs: {
                    "convs": nn.ModuleList(conv(2, o, **h) for _ in range(4)),
                    "norm": nn.BatchNorm2d(4 * o),
                },
                lambda m, x: m.norm(
                    torch.cat([c(y) for c, y in zip(m.convs, x.chunk(4, 1), strict=True)], 1)
                ),
                lambda m, x: normalise(
                    m.norm,
                    torch.concat(
                        [call(c, y) for c, y in pairs(m.convs, torch.split(x, [2] * 4, 1))], -3
                    ),
                ),
                lambda m, x: m.norm(
                    torch.cat(
                        dim=1, tensors=[c(y) for c, y in pairs(m.convs, x.tensor_split(4, 1))]
                    )
                ),
            )  # fmt: skip
    yield from spelt(
        "chunk, conv-BN, cat",
        lambda: {"a": conv_bn(4, 6, 3), "b": conv_bn(4, 6, 3)},
        lambda m, x: torch.cat((m.a(x[:, :4]), m.b(x[:, 4:])), 1),
        lambda m, x: torch.cat([m.a(x.narrow(1, 0, 4)), m.b(x[:, 4:])], -3),
    )


def _concatenated() -> Iterator[Block]:
    yield from spelt(
        "cat of equal convs",
        lambda: {
            "a": conv_bn(8, 4, 3, padding=1), "b": conv(8, 6, padding=1),
            "norm": nn.BatchNorm2d(10),
        },
        lambda m, x: m.norm(torch.cat([m.a(x), m.b(x)], 1)),
        lambda m, x: normalise(m.norm, torch.concat((m.a(x), call(m.b, x)), -3)),
    )  # fmt: skip
    yield from spelt(
        "cat of cats",
        lambda: {"a": conv(8, 2, 1), "b": conv(8, 3, 1), "c": conv(8, 5, 1)},
        lambda m, x: torch.cat([torch.cat([m.a(x), m.b(x)], 1), m.c(x)], 1),
        lambda m, x: torch.cat([m.a(x), torch.cat([m.b(x), m.c(x)], dim=-3)], 1),
    )
    yield from spelt(
        "cat of strided convs",
        lambda: {"a": conv(8, 4, stride=2, padding=1), "b": conv(8, 6, stride=2, padding=1)},
        lambda m, x: torch.cat([m.a(x), m.b(x)], 1),
        lambda m, x: torch.cat((call(m.a, x), call(m.b, x)), 1),
    )
    yield from spelt(
        "1x1 of cat of wide conv and x",
        lambda: {"a": conv(8, 64, padding=1), "b": conv(72, 8, 1)},
        lambda m, x: m.b(torch.cat([m.a(x), x], 1)),
        lambda m, x: call(m.b, torch.cat((call(m.a, x), x), dim=-3)),
    )
    # A sum of one layer for each source: W (a(x) ++ b(h)) = (W1 a)(x) + (W2 b)(h).
    yield from spelt(
        "1x1 of cat of wide convs of two sources",
        lambda: {"a": conv(8, 64, padding=1), "b": conv(8, 64, padding=1), "c": conv(128, 8, 1)},
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x.sigmoid())], 1)),
        lambda m, x: call(m.c, torch.cat((m.a(x), call(m.b, torch.sigmoid(x))), -3)),
        layers=2,
    )
    yield from spelt(
        "BatchNorm into both sides of a concat",
        lambda: {"norm": nn.BatchNorm2d(16), "a": conv(padding=1), "b": conv(16, 8, 1)},
        lambda m, x: m.b(m.norm(torch.cat([x.sigmoid(), m.a(x)], 1))),
        lambda m, x: call(m.b, normalise(m.norm, torch.concat((torch.sigmoid(x), m.a(x)), 1))),
        layers=2,
    )
    # The slice alone says what is needed: a narrower layer, no view.
    narrow: Sequence[Any] = (
        lambda m, x: m.norm(m.a(x))[:, 4:10].relu(),
        lambda m, x: torch.relu(normalise(m.norm, m.a(x)).narrow(1, 4, 6)),
        lambda m, x: m.norm(m.a(x)).split((4, 6, 6), 1)[1].relu(),
    )
    for how in ({}, {"stride": 2, "padding": 1}):
        yield from spelt(
            f"conv, channel slice({how or ''})",
            lambda h=how: {"a": conv(8, 16, **h), "norm": nn.BatchNorm2d(16)},
            *narrow,
            operations=2,
        )


def _listed() -> Iterator[Block]:
    args: tuple[int, ...]
    how: dict[str, Any]
    mixers = (RepNeXtMixer, RepNeXtMixerChunk)
    for how in ({}, {"bias": False}, {"k": 7}):
        yield from both("RepNeXt", mixers, 16, layers=4, batchnorms=None, **how, shapes=SIXTEEN)
    # Siblings may merge where that pays: the layers are bounded by `check`.
    nextvit = (NextViT, NextViTFunctional)
    for args in ((8,), (12,)):
        shapes = tuple((n, args[0], h, w) for n, _, h, w in SIZES)
        yield from both("NextViT", nextvit, *args, shapes=shapes, layers=None)
    for how in ({}, {"groups": 4}):
        siblings = (BNSiblings, BNSiblingsFunctional)
        yield from both("BN-siblings", siblings, 8, 8, shapes=SIZES, layers=None, **how)
    csp = (BottleneckCSP, BottleneckCSPFunctional)
    yield from both("CSP", csp, 8, 4, shapes=SIZES, layers=None)
    yield from both("CSP", csp, 8, 8, shapes=SIZES, layers=None)
    for args, how in (((8, 8), {}), ((4, 12), {"groups": 2}), ((6, 2), {"stride": 2})):
        kinds = (CatBN, CatBNFunctional)
        yield from both("cat-BN", kinds, *args, shapes=SIZES, layers=2, **how)
    images = ((2, 3, 9, 9), (1, 3, 12, 7))
    yield from both("LeViT", (LeViT, LeViTView), layers=8, shapes=images, example_inputs=True)
    linears = (LinearBN, LinearBNView)
    for args in ((8, 8), (8, 12)):
        yield from both("Linear-BN", linears, *args, shapes=TOKENS, example_inputs=True)
    yield from both("EfficientViT-m", (CascadedAttention,), layers=12, shapes=SIZES)
    yield from both("TinyViT", (MBConv,), 8, 16, layers=3, shapes=SIZES)

    focus = (Focus, FocusLoop, FocusUnshuffle)
    for args, how in (((3, 8), {}), ((3, 12, 1), {}), ((3, 8, 5), {}), ((4, 8), {"groups": 2})):
        shapes = tuple((n, args[0], h, w) for n, h, w in ((2, 8, 8), (1, 12, 6), (1, 9, 8)))
        if how:  # groups read slices, not channels: only unshuffled channels stay neighbours
            yield from both("Focus", focus[2:], *args, shapes=shapes, operations=2, **how)
        else:
            yield from both("Focus", focus, *args, shapes=shapes, operations=2)
    for args in ((64,), (64, 16)):
        inception = (Inception, InceptionFunctional)
        yield from both("Inception", inception, *args, shapes=WIDE, layers=4)
    yield from both("C3", (C3, C3Functional), 64, shapes=WIDE, layers=4)
    yield from both("heads", (Heads, HeadsFunctional), 64, 8, 8, 8, shapes=WIDE)
    yield from both("heads", (Heads, HeadsFunctional), 64, 4, 1, 10, shapes=WIDE)
    yield from _grouped()
    yield from _concatenated()


SIXTEEN = tuple((n, 16, h, w) for n, _, h, w in SIZES)
CONCAT_BLOCKS: tuple[Block, ...] = tuple(_listed())


# --- a known share of the work -------------------------------------------------------------------


class Transition(nn.Module):
    """DenseNet: avgpool2(conv1x1(relu(BN x))); the BatchNorm in front of the ReLU stays."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=bias)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.relu(self.norm(x))))


class TransitionFunctional(Transition):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(call(self.conv, torch.relu(normalise(self.norm, x))), 2)


EVEN = ((2, 8, 8, 8), (1, 8, 12, 6))


def _cheaper() -> Iterator[tuple[Block, float]]:
    """Blocks with the share of their convolutions' work that is left, at even sizes."""
    for kind in (Transition, TransitionFunctional):
        for outputs, bias in ((8, False), (4, False), (8, True)):
            make = lambda k=kind, o=outputs, b=bias: k(8, o, bias=b)  # noqa: E731
            name = f"DenseNet-{kind.__name__}({outputs}, {bias})"
            yield Block(name, make, EVEN, batchnorms=1), 1 / 4
    rows: tuple[tuple[str, float, Callable[[], Any], Any], ...] = (
        # Every resize treats the channels alike and keeps a constant: the 1x1 goes below it.
        ("nearest", 1 / 4, lambda: conv(8, 4, 1),
         lambda m, x: m.a(F.interpolate(x, scale_factor=2))),
        ("bilinear", 1 / 4, lambda: conv(8, 8, 1),
         lambda m, x: m.a(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))),
        ("Upsample", 1 / 4, lambda: conv(8, 8, 1, bias=False),
         lambda m, x: call(m.a, nn.Upsample(scale_factor=2, mode="bicubic")(x))),
        ("conv-BN, pool", 1 / 4, lambda: conv_bn(8, 8, 1),
         lambda m, x: F.avg_pool2d(m.a(x), 2).relu()),
        ("uncounted padding", 1 / 4, lambda: conv(8, 8, 1),
         lambda m, x: F.avg_pool2d(m.a(x), 3, 2, 1, count_include_pad=False)),
        ("channel slice", 3 / 8, lambda: conv(8, 16, padding=1),
         lambda m, x: m.a(x)[:, 4:10]),
        ("strided slice", 1 / 4, lambda: conv(8, 8, padding=1),
         lambda m, x: m.a(x)[:, :, ::2, ::2]),
        ("wide pair", 1 / 32, lambda: nn.Sequential(conv(8, 128, 1), conv(128, 8, 1)),
         lambda m, x: m.a(x).relu()),
    )  # fmt: skip
    for name, share, make_layer, forward in rows:
        model = lambda f=forward, a=make_layer: Body(f, a=a())  # noqa: E731
        yield Block(name, model, EVEN), share


CHEAPER: tuple[tuple[Block, float], ...] = tuple(_cheaper())
