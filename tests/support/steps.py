"""The steps of random nets: what one of them can compute, in the spellings that models use.

A kind is a plain function `(draw, net, channels)` that registers what it needs and answers with its
name and the function to run. A kind may answer with something that does not fit its input: the
builder tries each step and does not take one that raises. Simple choices stand first: Hypothesis
shrinks towards them.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from support.models import call

CHANNELS = 4


@dataclass
class Step:
    """``function(net, *operands)``; `said` is for people."""

    said: str
    operands: tuple[int, ...]
    function: Callable[..., Any]


class Net(nn.Module):
    """Runs its steps; the outputs are the last values."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.count = 0
        self.outputs: tuple[int, ...] = (0,)
        self.sizes: tuple[tuple[int, ...], ...] = ()  # of inputs it runs at

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(step.function(self, *(values[i] for i in step.operands)))
        results = tuple(values[i] for i in self.outputs)
        return results if len(results) > 1 else results[0]

    def add(self, name: str, part: Any) -> str:
        """Register a module, parameter or plain tensor under a free name."""
        if isinstance(part, nn.Module):
            part.eval()  # a BatchNorm in train mode refuses one pixel of one image
        self.count += 1
        name = f"{name}{self.count}"
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter) and part.numel() % 2:
            self.register_buffer(name, part)
        else:
            setattr(self, name, part)
        return name

    @property
    def reads_after_writes(self) -> bool:
        """Whether a value written in place is read later by the name it had before.

        fx writes ``z += c`` as an assignment, so that a second trace sees one name for what were
        two, and may rewrite what the first run had to leave alone.
        """
        written = {s.operands[0] for s in self.steps if any(w in s.said for w in IN_PLACE)}
        aliases = {s.operands[0] for s in self.steps if s.said in SAME}
        inner = any(m.reads_after_writes for m in self.children() if isinstance(m, Net))
        return inner or bool(written and (aliases or self._read_again(written)))

    def _read_again(self, written: set[int]) -> bool:
        reads = Counter(i for s in self.steps for i in s.operands)
        reads.update(self.outputs)
        return any(reads[i] > 1 for i in written)

    def extra_repr(self) -> str:
        lines = [f"{i}: {s.said} of {s.operands}" for i, s in enumerate(self.steps, 1)]
        return "\n".join([*lines, f"outputs: {self.outputs}, sizes: {self.sizes}"])


IN_PLACE = ("x *= c", "x += ", "_(c)", "relu_", "x.mul_", "in place", "x.add_", "x.sub_")
SAME = ("alias", "contiguous", "dropout")

Made = tuple[str, Callable[..., Any]]
Kind = Callable[[st.DrawFn, Net, int], Made]
Pair = tuple[int, int]


def layer(net: Net, part: nn.Module, said: str) -> Made:
    """A call of a module."""
    name = net.add("layer", part)
    return said, lambda m, x: m.get_submodule(name)(x)


def table(functions: dict[str, Callable[..., Tensor]]) -> Kind:
    """One of several functions that need nothing but their input."""

    def kind(draw: st.DrawFn, net: Net, channels: int) -> Made:
        said = draw(st.sampled_from(list(functions)))
        return said, lambda m, x: functions[said](x)

    return kind


# --- convolutions and other layers --------------------------------------------------------------


def conv(
    draw: st.DrawFn,
    net: Net,
    channels: int,
    out: int,
    kernel: Pair,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: int = 1,
    groups: int = 1,
    bias: bool | None = None,
    mode: Any = "zeros",
) -> Made:
    """One convolution, by any spelling; groups that do not fit become 1."""
    if channels % groups or out % groups:
        groups = 1
    bias = draw(st.booleans()) if bias is None else bias
    part = nn.Conv2d(
        channels, out, kernel, stride, padding, dilation, groups, bias, padding_mode=mode
    )
    name = net.add("conv", part)
    said = f"conv {channels}->{out} k{kernel} s{stride} p{padding} d{dilation} g{groups} {mode}"
    spelling = draw(st.sampled_from(["module", "module", "function", "positional"]))
    if mode != "zeros":
        spelling = "module"

    def run(m: Net, x: Tensor) -> Tensor:
        c = m.get_submodule(name)
        if spelling == "function":
            return call(c, x)
        if spelling == "positional":
            return torch.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
        return c(x)

    return f"{said} {'biased' if bias else 'unbiased'} by {spelling}", run


def convolution(draw: st.DrawFn, net: Net, channels: int) -> Made:
    wide = draw(st.sampled_from([channels, channels, channels, CHANNELS, CHANNELS, 8 * CHANNELS]))
    groups = draw(st.sampled_from([1, 1, 1, 2, channels]))
    shapes = [(1, 1), (3, 3), (3, 3), (1, 3), (3, 1), (5, 5), (2, 2), (4, 3)]
    kernel = draw(st.sampled_from(shapes))
    stride = draw(st.sampled_from([1, 1, 1, 1, 1, 2, (1, 2)]))
    dilation = draw(st.sampled_from([1, 1, 1, 2]))
    same = tuple(dilation * (k - 1) // 2 for k in kernel)
    padding: Any = draw(st.sampled_from([same, same, same, (0, 0), (1, 1), (2, 0)]))
    if stride == 1 and draw(st.integers(0, 5)) == 0:
        padding = "same"
    mode = draw(st.sampled_from(["zeros"] * 6 + ["reflect", "replicate", "circular"]))
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    return conv(draw, net, channels, wide, kernel, groups=groups, mode=mode, **how)


def pointwise(draw: st.DrawFn, net: Net, channels: int) -> Made:
    out = draw(st.sampled_from([channels, CHANNELS, 2 * channels, 6, max(1, channels // 2)]))
    groups = draw(st.sampled_from([1, 1, 1, 2, channels]))
    return conv(draw, net, channels, out, (1, 1), groups=groups)


def same_size(stride: int, out: int | None = None) -> Kind:
    """Convs that may be added up or concatenated: their sizes agree at every input size."""

    def kind(draw: st.DrawFn, net: Net, channels: int) -> Made:
        wide = out or draw(st.sampled_from([channels, CHANNELS, 3, 2 * channels]))
        kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (3, 1), (5, 5)]))
        padding = (kernel[0] // 2, kernel[1] // 2)
        groups = draw(st.sampled_from([1, 1, 1, 2, channels]))
        return conv(
            draw, net, channels, wide, kernel, stride=stride, padding=padding, groups=groups
        )

    return kind


def transposed(draw: st.DrawFn, net: Net, channels: int) -> Made:
    kernel, stride = draw(st.sampled_from([(1, 1), (3, 1), (2, 2), (4, 2), (1, 2), (3, 2)]))
    padding = draw(st.integers(0, (kernel - 1) // 2))
    groups = draw(st.sampled_from([1, 2, channels]))
    if channels % groups:
        groups = 1
    more = draw(st.integers(0, stride - 1))
    part = nn.ConvTranspose2d(
        channels, channels, kernel, stride, padding, more, groups, bias=draw(st.booleans())
    )
    return layer(net, part, f"conv_transpose k{kernel} s{stride} p{padding} o{more} g{groups}")


def norm(draw: st.DrawFn, net: Net, channels: int) -> Made:
    name = net.add("norm", nn.BatchNorm2d(channels, affine=draw(st.booleans())))
    if draw(st.booleans()):
        return "norm", lambda m, x: m.get_submodule(name)(x)

    def call(m: Net, x: Tensor) -> Tensor:
        n: Any = m.get_submodule(name)
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)

    return "F.batch_norm", call


def linear(draw: st.DrawFn, net: Net, channels: int) -> Made:
    """A stack of Linears on the channels, the width or everything; back to four axes."""
    where = draw(st.sampled_from(["channels last", "tokens", "flat", "width"]))
    width = {"channels last": channels, "tokens": channels, "flat": 2 * channels, "width": 4}[where]
    parts: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        wide = draw(st.sampled_from([width, 4, 4 * width, 3]))
        parts.append(nn.Linear(width, wide, bias=draw(st.booleans())))
        width = wide
        # Four tokens of four features: which axis is normalised does not show in the shapes.
        if where in ("flat", "tokens") and draw(st.integers(0, 2)) == 0:
            parts.append(nn.BatchNorm1d(4 if where == "tokens" else width))
    name = net.add("stack", nn.Sequential(*parts))

    def call(m: Net, x: Tensor) -> Tensor:
        stack = m.get_submodule(name)
        if where == "channels last":
            return stack(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if where == "tokens":
            tokens = F.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2)
            return stack(tokens).transpose(1, 2).unflatten(2, (2, 2))
        if where == "flat":
            return stack(F.adaptive_avg_pool2d(x, (1, 2)).flatten(1))[:, :, None, None]
        return stack(F.adaptive_avg_pool2d(x, (None, 4)))

    return f"Linear on {where}: {[str(p) for p in parts]}", call


# --- constants ----------------------------------------------------------------------------------

AFFINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x * c": lambda x, c: x * c,
    "c * x": lambda x, c: c * x,
    "c + x": lambda x, c: c + x,
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "x / c": lambda x, c: x / c,
    "mul": lambda x, c: torch.mul(x, other=c.abs()),
    "add": lambda x, c: torch.add(x, c, alpha=-0.5),
    "rsub": lambda x, c: torch.rsub(x, c),
    "scale and shift": lambda x, c: torch.addcmul(c, x, c),
    "x *= c": operator.imul,
    "x += c": operator.iadd,
    "x.sub_(c)": lambda x, c: x.sub_(c),
    "x.div_(c)": lambda x, c: x.div_(c),
}
DIVIDED = {"c / x": lambda x, c: c / (x.abs() + 1)}


def _constants(operations: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> Kind:
    def kind(draw: st.DrawFn, net: Net, channels: int) -> Made:
        """A constant of any shape that broadcasts: along the channels, the width, or not at all."""
        per_channel = [(channels, 1, 1), (1, channels, 1, 1)]
        shape = draw(st.sampled_from([*per_channel, (1,), (), (1, 1, 1), (4,), (channels,)]))
        value = torch.rand(shape) + 0.5
        if draw(st.integers(0, 3)) == 0:
            value = value * (torch.randint(0, 2, shape) * 2 - 1)  # some scales negative
        wrap = draw(st.sampled_from([nn.Parameter, Tensor.clone]))
        name = net.add("constant", wrap(value))
        said = draw(st.sampled_from(list(operations)))
        return f"{said} {shape}", lambda m, x: operations[said](x, getattr(m, name))

    return kind


affine = _constants(AFFINE)
constant = _constants(AFFINE | DIVIDED)


def nothing(draw: st.DrawFn, net: Net, channels: int) -> Made:
    """A branch that contributes zero."""
    if draw(st.booleans()):
        return "x * 0.0", lambda m, x: x * 0.0
    name = net.add("layer_scale", nn.Parameter(torch.zeros(channels, 1, 1)))
    return "layer scale of zeros", lambda m, x: getattr(m, name) * x


# --- padding and cropping -----------------------------------------------------------------------

ONE_SIDED = [(1, 0, 1, 0), (0, 1, 0, 1), (0, 0, 2, 1), (2, 0, 0, 1), (1, 2, 0, 0), (0, 0, 0, 2)]
NEGATIVE = [(-1, 0, 0, 0), (-1, 1, 0, -1), (0, -1, -1, 1), (1, 0, 0, -2)]
PADDED: dict[str, Any] = {
    "reflect": nn.ReflectionPad2d,
    "replicate": nn.ReplicationPad2d,
    "circular": nn.CircularPad2d,
}


def pad(draw: st.DrawFn, net: Net, channels: int) -> Made:
    kind = draw(st.sampled_from(["zeros"] * 5 + ["constant", "constant", *PADDED, "channels"]))
    if kind == "channels":
        value = draw(st.sampled_from([0.0, 1.0]))
        return f"F.pad on channels {value}", lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1), value=value)
    widths = draw(st.sampled_from([(1, 1, 1, 1), (2, 2, 2, 2), *ONE_SIDED, *NEGATIVE]))
    value = draw(st.sampled_from([0.5, -1.0])) if kind == "constant" else 0.0
    said = f"pad {widths} {kind} {value}"
    if draw(st.integers(0, 2)) == 0:
        if kind in PADDED:
            return layer(net, PADDED[kind](widths), f"module {said}")
        part = nn.ConstantPad2d(widths, value) if value else nn.ZeroPad2d(widths)
        return layer(net, part, f"module {said}")
    if kind in PADDED:
        return f"F.{said}", lambda m, x: F.pad(x, widths, mode=kind)
    if value or draw(st.booleans()):
        return f"F.{said}", lambda m, x: F.pad(x, widths, "constant", value)
    return f"F.{said}", lambda m, x: F.pad(x, list(widths))


crop = table(
    {
        "x[:, :, 1:-1, 1:-1]": lambda x: x[:, :, 1:-1, 1:-1],
        "x[:, :, 1:-1]": lambda x: x[:, :, 1:-1],
        "x[..., 1:]": lambda x: x[..., 1:],
        "x[:, :, 2:, :-1]": lambda x: x[:, :, 2:, :-1],
        "x[:, :, ::2, ::2]": lambda x: x[:, :, ::2, ::2],
        "x[..., 1::2, ::2]": lambda x: x[..., 1::2, ::2],
        "x[:, :, 1::2, 1::2]": lambda x: x[:, :, 1::2, 1::2],
        "x[..., ::3]": lambda x: x[..., ::3],
        "x[:, :, 1:-1:2]": lambda x: x[:, :, 1:-1:2],
        "x[:, :, :5, 1:6]": lambda x: x[:, :, :5, 1:6],
        "x[:, :, -4:]": lambda x: x[:, :, -4:],
        "x[..., -5::2]": lambda x: x[..., -5::2],
        "x[:, :, 1:2]": lambda x: x[:, :, 1:2],
        "narrow": lambda x: x.narrow(2, 1, 4),
        "up to a size": lambda x: x[:, :, : x.shape[2] - 1, : x.shape[3] // 2],
        "slice of a slice": lambda x: x[:, :, 1:][..., ::2][:, :, :-1],
        "x[:1]": lambda x: x[:1],
    }
)
# Linear, and no convolution: nothing may take them for one.
turned = table(
    {
        "transposed": lambda x: x.transpose(2, 3),
        "permuted": lambda x: x.permute(0, 1, 3, 2),
        "x.flip(3)": lambda x: x.flip(3),
        "rolled": lambda x: torch.roll(x, 1, 3),
    }
)


def strided(row: int, column: int, step: int = 2) -> Made:
    return (
        f"x[:, :, {row}::{step}, {column}::{step}]",
        lambda m, x: x[:, :, row::step, column::step],
    )


# --- channels -----------------------------------------------------------------------------------


def _two_groups(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


rearranged = table(
    {
        "x[:, 1:]": lambda x: x[:, 1:],
        "x[:, :2]": lambda x: x[:, :2],
        "x[:, -2:]": lambda x: x[:, -2:],
        "x[:, ::2]": lambda x: x[:, ::2],
        "x[:, 1::2]": lambda x: x[:, 1::2],
        "x[:, 0:1]": lambda x: x[:, 0:1],
        "first half": lambda x: x[:, : x.shape[1] // 2],
        "x[:, 1:3, 1:]": lambda x: x[:, 1:3, 1:],
        "x.narrow(1, 1, 2)": lambda x: x.narrow(1, 1, 2),
        "x[:, 0].unsqueeze(1)": lambda x: x[:, 0].unsqueeze(1),
        "x.flip(1)": lambda x: x.flip(1),
        "x.roll(1, 1)": lambda x: x.roll(1, 1),
        "shuffled": _two_groups,
        "x.repeat(1, 2, 1, 1)": lambda x: x.repeat(1, 2, 1, 1),
        "mean of channels": lambda x: x.mean(1, keepdim=True),
    }
)


def permuted(draw: st.DrawFn, net: Net, channels: int) -> Made:
    """Channels in another order, or some of them, or one twice."""
    orders = st.lists(st.integers(0, channels - 1), min_size=1, max_size=2 * CHANNELS)
    order = draw(st.one_of(st.permutations(list(range(channels))), orders))
    name = net.add("order", torch.tensor(order))
    spellings: dict[str, Callable[[Net, Tensor], Tensor]] = {
        "list": lambda m, x: x[:, order],
        "tensor": lambda m, x: x[:, getattr(m, name)],
        "index_select": lambda m, x: torch.index_select(x, 1, getattr(m, name)),
    }
    said = draw(st.sampled_from(list(spellings)))
    return f"channels {order} by {said}", spellings[said]


def pieces(draw: st.DrawFn, channels: int) -> Made:
    """All pieces, as a tuple."""
    number = draw(st.integers(2, 4))
    size = draw(st.integers(1, max(1, channels - 1)))
    spellings: dict[str, Callable[[Net, Tensor], Any]] = {
        f"chunk {number}": lambda m, x: x.chunk(number, 1),
        f"torch.chunk {number}": lambda m, x: torch.chunk(x, chunks=number, dim=-3),
        f"split {size}": lambda m, x: torch.split(x, size, 1),
        f"split [{size}, rest]": lambda m, x: x.split([size, channels - size], dim=1),
        f"tensor_split {number}": lambda m, x: torch.tensor_split(x, number, dim=1),
        f"tensor_split ({size},)": lambda m, x: x.tensor_split((size,), 1),
    }
    said = draw(st.sampled_from(list(spellings)))
    return said, spellings[said]


JOINS: dict[str, Callable[..., Tensor]] = {
    "torch.cat": lambda *xs: torch.cat(xs, 1),
    "torch.concat": lambda *xs: torch.concat(list(xs), dim=1),
    "dim=-3": lambda *xs: torch.cat(tensors=list(xs), dim=-3),
    "torch.concatenate": lambda *xs: torch.concatenate(xs, axis=1),  # type: ignore[call-arg]
    # Not on channels.
    "rows": lambda *xs: torch.cat(xs, 2),
    "batch": lambda *xs: torch.cat(xs),
    "stacked": lambda *xs: torch.stack(xs, 2).flatten(1, 2),
}


def join(draw: st.DrawFn) -> Made:
    said = draw(st.sampled_from([*list(JOINS)[:4] * 4, *JOINS]))
    return f"cat by {said}", lambda m, *xs: JOINS[said](*xs)


# --- pooling and resizing -----------------------------------------------------------------------


def average(draw: st.DrawFn, net: Net, channels: int) -> Made:
    kernel: Any = draw(st.sampled_from([2, 2, 3, 3, (2, 3), (1, 2), 1]))
    stride: Any = draw(st.sampled_from([None, 1, 2, (2, 1)]))
    how: dict[str, Any] = {
        "padding": draw(st.sampled_from([0, 0, 1])) if kernel in (2, 3) else 0,
        "ceil_mode": draw(st.sampled_from([False, False, True])),
        "count_include_pad": draw(st.booleans()),
        "divisor_override": draw(st.sampled_from([None, None, None, 4, 1, 3])),
    }
    said = f"avg_pool2d k{kernel} s{stride} {how}"
    if draw(st.booleans()):
        return f"F.{said}", lambda m, x: F.avg_pool2d(x, kernel, stride, **how)
    return layer(net, nn.AvgPool2d(kernel, stride, **how), f"module {said}")


averaged = table(
    {
        "one pixel": lambda x: F.adaptive_avg_pool2d(x, 1),
        "mean": lambda x: x.mean((2, 3), keepdim=True),
        "mean of rows": lambda x: torch.mean(x, dim=[-2], keepdim=True),
        "adaptive (2, 3)": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
        "adaptive (None, 2)": lambda x: F.adaptive_avg_pool2d(x, (None, 2)),
        "sum": lambda x: x.sum((2, 3), keepdim=True) / 64,
    }
)

resized = table(
    {
        "nearest x2": lambda x: F.interpolate(x, scale_factor=2),
        "bilinear x2": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        "nearest (2, 1)": lambda x: F.interpolate(x, scale_factor=(2.0, 1.0), mode="nearest"),
        "bilinear corners": lambda x: F.interpolate(
            x, scale_factor=2, mode="bilinear", align_corners=True
        ),
        "nearest x0.5": lambda x: F.interpolate(x, scale_factor=0.5),
        "bilinear x1.5": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
        "bicubic": lambda x: F.interpolate(x, size=(5, 6), mode="bicubic"),
        "area": lambda x: F.interpolate(x, size=(3, 4), mode="area"),
        "nearest to (7, 5)": lambda x: F.interpolate(x, size=(7, 5)),
        "bilinear to 6": lambda x: F.interpolate(x, 6, mode="bilinear", antialias=True),
        "to twice its size": lambda x: F.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3])),
    }
)


def upsample(draw: st.DrawFn, net: Net, channels: int) -> Made:
    part = draw(
        st.sampled_from(
            [
                nn.Upsample(scale_factor=2),
                nn.Upsample(size=(6, 7), mode="bilinear"),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                nn.UpsamplingNearest2d(scale_factor=2),
            ]
        )
    )
    return layer(net, part, str(part))


def pixels(draw: st.DrawFn, net: Net, channels: int) -> Made:
    """Between channels and pixels; raises where they do not divide."""
    spelling = draw(st.sampled_from(["unshuffle", "shuffle", "Unshuffle", "Shuffle"]))
    if spelling == "unshuffle":
        return "pixel_unshuffle", lambda m, x: F.pixel_unshuffle(x, 2)
    if spelling == "shuffle":
        return "pixel_shuffle", lambda m, x: F.pixel_shuffle(x, 2)
    if spelling == "Unshuffle":
        return layer(net, nn.PixelUnshuffle(2), "PixelUnshuffle")
    return layer(net, nn.PixelShuffle(2), "PixelShuffle")


def max_pool(draw: st.DrawFn, net: Net, channels: int) -> Made:
    kernel, stride, padding = draw(st.sampled_from([(3, 1, 1), (2, 2, 0), (3, 2, 1), (2, 1, 0)]))
    ceil = draw(st.booleans())
    said = f"max_pool k{kernel} s{stride} p{padding} ceil_mode={ceil}"
    if draw(st.booleans()):
        return layer(net, nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil), f"module {said}")
    return said, lambda m, x: F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)


# --- one value to one value, and two to one -----------------------------------------------------


def _first_channel_zero(x: Tensor) -> Tensor:
    x[:, :1] = 0.0
    return x


plain = table(
    {
        "-x": operator.neg,
        "x * 2": lambda x: x * 2,
        "0.5 - x": lambda x: 0.5 - x,
        "x / 3": lambda x: x / 3,
        "x + 0.0": lambda x: x + 0.0,
        "x += 1": lambda x: operator.iadd(x, 1.0),
        "x.mul_(0.5)": lambda x: x.mul_(0.5),
        "contiguous": lambda x: x.contiguous(),
        "dropout": lambda x: F.dropout(x, 0.5, training=False),
        "clone": lambda x: x.clone(),
        "alias": lambda x: x,
        "first channel zero in place": _first_channel_zero,
    }
)

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu_": F.relu_,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "clamped in place": lambda x: F.hardtanh(x, inplace=True),
}
activation = table(POINTWISE)
softmax = table({"softmax": lambda x: torch.softmax(x, 1), "gate": lambda x: x * x.sigmoid()})

ADDITIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "x + y": operator.add,
    "x - y": operator.sub,
    "torch.add": lambda x, y: torch.add(x, other=y),
    "alpha": lambda x, y: torch.add(x, y, alpha=0.5),
    "sub alpha": lambda x, y: torch.sub(x, y, alpha=-2),
    "sum": lambda x, y: sum([x, y]),
    "sum thrice": lambda x, y: sum([x, y, x]),
    "x += y": operator.iadd,
    "x.add_": lambda x, y: x.add_(y),
    "x.sub_": lambda x, y: x.sub_(y, alpha=0.5),
    "halved": lambda x, y: (x + y) / 2,
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x * y": operator.mul,
    "gated": lambda x, y: x * torch.sigmoid(y),
}

# --- bias-valued padding ------------------------------------------------------------------------

RIGHT = "right"
WRONG = ("value", "side", "width", "other channel", "order")


def bias_padded(
    draw: st.DrawFn, net: Net, before: list[str], channels: int, widths: tuple[int, ...]
) -> Made:
    """A pad by zeros, then the value that `before` gives to zero written over it, side by side.

    It is zero padding at the source if the layers named in `before` are pointwise. Sometimes it is
    done wrong: such a model is no such thing, and has to stay what it is.
    """
    fault = draw(st.sampled_from([RIGHT] * 5 + [*WRONG]))
    calls = draw(st.booleans())
    left, right, top, bottom = widths
    zero = net.add("zero", torch.zeros(1, channels, 1, 1))
    skipped = draw(st.integers(0, 3)) if fault == "side" else None
    wider = draw(st.sampled_from([-1, 1])) if fault == "width" else 0

    def value_of(m: Net) -> Tensor:
        value = getattr(m, zero)
        for name in before:
            part: Any = m.get_submodule(name)
            if isinstance(part, nn.Conv2d):
                value = value if part.bias is None else part.bias.view(1, -1, 1, 1)
            elif calls or part.weight is None:
                value = part(value)
            else:
                scale = part.weight / torch.sqrt(part.running_var + part.eps)
                shift = (part.bias - part.running_mean * scale).view(1, -1, 1, 1)
                value = value * scale.view(1, -1, 1, 1) + shift
        if fault == "value":
            return value * 1.25 + 0.25
        return value.flip(1) if fault == "other channel" else value

    def call(m: Net, x: Tensor) -> Tensor:
        value = value_of(m)
        y = F.pad(x, widths)
        if top and skipped != 0:
            y[:, :, 0 : top + wider, :] = value
        if bottom and skipped != 1:
            y[:, :, -bottom:, :] = value
        if left and skipped != 2:
            y[:, :, :, 0:left] = value
        if fault == "order":  # the last side is written too late
            y = y * 1.5
        if right and skipped != 3:
            y[:, :, :, -right:] = value
        return y

    return f"bias-padded {widths} {fault} {skipped} {wider} called={calls}", call
