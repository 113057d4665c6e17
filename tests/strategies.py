"""Random module trees in mixed spellings, for properties of the whole pipeline.

A `Net` is a list of steps over the values computed so far, and runs at both sizes of `SIZES` by
construction: a step that raises at one of them is not taken. Tensors are the values while it is
built; later its forward replays the steps, so that tracing sees ordinary straight-line code.
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

CHANNELS = 4
SIZES = ((2, CHANNELS, 9, 8), (1, CHANNELS, 6, 11))
MOST_ELEMENTS = 60_000


@dataclass
class Step:
    """``function(net, *operands)``; `said` is for people."""

    said: str
    operands: tuple[int, ...]
    function: Callable[..., Tensor]


class Net(nn.Module):
    """Runs its steps; the outputs are the last values."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.count = 0
        self.outputs: tuple[int, ...] = (0,)

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(step.function(self, *(values[i] for i in step.operands)))
        results = tuple(values[i] for i in self.outputs)
        return results if len(results) > 1 else results[0]

    def add(self, name: str, part: Any) -> str:
        """Register a module, parameter or plain tensor under a free name."""
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
        return "\n".join([*lines, f"outputs: {self.outputs}"])


IN_PLACE = ("x *= c", "x += ", "_(c)", "relu_", "x.mul_", "in place", "x.add_", "x.sub_")
SAME = ("alias", "contiguous", "dropout")

Made = tuple[str, Callable[..., Tensor]]


def _convolution(draw: st.DrawFn, net: Net, channels: int) -> Made:
    wide = draw(st.sampled_from([channels, channels, channels, CHANNELS, CHANNELS, 8 * CHANNELS]))
    groups = draw(st.sampled_from([1, 1, 1, 2, channels]))
    if channels % groups or wide % groups:
        groups = 1
    shapes = [(1, 1), (3, 3), (3, 3), (1, 3), (3, 1), (5, 5), (2, 2), (4, 3)]
    kernel = draw(st.sampled_from(shapes))
    stride = draw(st.sampled_from([1, 1, 1, 1, 1, 2, (1, 2)]))
    dilation = draw(st.sampled_from([1, 1, 1, 2]))
    same = tuple(dilation * (k - 1) // 2 for k in kernel)
    padding: Any = draw(st.sampled_from([same, same, same, (0, 0), (1, 1), (2, 0)]))
    if stride == 1 and draw(st.integers(0, 5)) == 0:
        padding = "same"
    mode = draw(st.sampled_from(["zeros"] * 6 + ["reflect", "circular"]))
    bias = draw(st.booleans())
    conv = nn.Conv2d(
        channels, wide, kernel, stride, padding, dilation, groups, bias, padding_mode=mode
    )
    name = net.add("conv", conv)
    said = f"conv {channels}->{wide} k{kernel} s{stride} p{padding} d{dilation} g{groups} {mode}"
    spelling = draw(st.sampled_from(["module", "module", "function", "positional"]))
    if mode != "zeros":
        spelling = "module"

    def call(m: Net, x: Tensor) -> Tensor:
        c = m.get_submodule(name)
        if spelling == "function":
            return F.conv2d(
                x, c.weight, bias=c.bias, stride=c.stride, padding=c.padding,
                dilation=c.dilation, groups=c.groups,
            )  # fmt: skip
        if spelling == "positional":
            return torch.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
        return c(x)

    return f"{said} by {spelling}", call


def _transposed(draw: st.DrawFn, net: Net, channels: int) -> Made:
    kernel, stride = draw(st.sampled_from([(1, 1), (3, 1), (2, 2), (4, 2), (1, 2)]))
    padding = draw(st.integers(0, (kernel - 1) // 2))
    groups = draw(st.sampled_from([1, channels]))
    part = nn.ConvTranspose2d(
        channels, channels, kernel, stride, padding, groups=groups, bias=draw(st.booleans())
    )
    name = net.add("up", part)
    said = f"conv_transpose k{kernel} s{stride} p{padding} g{groups}"
    return said, lambda m, x: m.get_submodule(name)(x)


def _norm(draw: st.DrawFn, net: Net, channels: int) -> Made:
    name = net.add("norm", nn.BatchNorm2d(channels, affine=draw(st.booleans())))
    if draw(st.booleans()):
        return "norm", lambda m, x: m.get_submodule(name)(x)

    def call(m: Net, x: Tensor) -> Tensor:
        n = m.get_submodule(name)
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)

    return "F.batch_norm", call


def _constant(draw: st.DrawFn, net: Net, channels: int) -> Made:
    """A constant of any shape that broadcasts: along the channels, the width, or not at all."""
    shape = draw(
        st.sampled_from(
            [(channels, 1, 1), (1, channels, 1, 1), (1,), (), (1, 1, 1), (8,), (channels,)]
        )
    )
    value = torch.rand(shape) + 0.5
    kind = draw(st.sampled_from([nn.Parameter, Tensor.clone]))
    name = net.add("constant", kind(value))
    operations: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "x * c": lambda x, c: x * c,
        "c * x": lambda x, c: c * x,
        "c + x": lambda x, c: c + x,
        "x - c": lambda x, c: x - c,
        "c - x": lambda x, c: c - x,
        "x / c": lambda x, c: x / c,
        "c / x": lambda x, c: c / (x.abs() + 1),
        "mul": lambda x, c: torch.mul(x, other=c.abs()),
        "add": lambda x, c: torch.add(x, c, alpha=-0.5),
        "rsub": lambda x, c: torch.rsub(x, c),
        "x *= c": operator.imul,
        "x += c": operator.iadd,
        "x.sub_(c)": lambda x, c: x.sub_(c),
        "x.div_(c)": lambda x, c: x.div_(c),
    }
    said = draw(st.sampled_from(sorted(operations)))
    return f"{said} {shape}", lambda m, x: operations[said](x, getattr(m, name))


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu_": F.relu_,
    "sigmoid": torch.sigmoid,
    "-x": operator.neg,
    "x * 2": lambda x: x * 2,
    "0.5 - x": lambda x: 0.5 - x,
    "x += 1": lambda x: operator.iadd(x, 1.0),
    "x.mul_(0.5)": lambda x: x.mul_(0.5),
    "contiguous": lambda x: x.contiguous(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "max_pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "one pixel": lambda x: F.adaptive_avg_pool2d(x, 1),
    "alias": lambda x: x,
    "first half": lambda x: x[:, : x.shape[1] // 2],
    "crop": lambda x: x[:, :, 1:-1],
    "clamped in place": lambda x: F.hardtanh(x, inplace=True),
}


def _unary(draw: st.DrawFn, net: Net, channels: int) -> Made:
    said = draw(st.sampled_from(sorted(UNARY)))
    return said, lambda m, x: UNARY[said](x)


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
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
    "x * y": operator.mul,
}
ADDITIONS = sorted(set(BINARY) - {"x * y"})


BRANCHES: tuple[tuple[Any, ...], ...] = ((_convolution,), (_convolution, _norm), (_norm,), ())


class _Builder:
    """A net in the making, with its values at every size."""

    def __init__(self, draw: st.DrawFn, inputs: list[Tensor]) -> None:
        self.draw, self.net = draw, Net()
        self.values = [[x.clone() for x in inputs]]
        self.parts: list[tuple[Step, int]] = []  # layers, which another step may call again

    def take(self, step: Step) -> bool:
        """Append the step if it runs at every size."""
        # In-place operations must not spoil the values when the step is not taken after all.
        copies = [[x.clone() for x in self.values[i]] for i in step.operands]
        try:
            with torch.no_grad():
                made = [
                    step.function(self.net, *arguments) for arguments in zip(*copies, strict=True)
                ]
        except (RuntimeError, ValueError, IndexError):
            return False
        if any(not y.numel() or y.numel() > MOST_ELEMENTS or y.dim() != 4 for y in made):
            return False
        if not all(bool(y.isfinite().all()) and float(y.abs().max()) < 1e4 for y in made):
            return False
        self.values.append([y.clone() for y in made])
        self.net.steps.append(step)
        return True

    def operand(self) -> int:
        """Recent values more often: chains; sometimes an old one: several sources."""
        return max(0, len(self.values) - 1 - self.draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3, 5])))

    def channels(self, value: int) -> int:
        return self.values[value][0].shape[1]

    def layer(self, kind: Any) -> None:
        source = self.operand()
        said, function = kind(self.draw, self.net, self.channels(source))
        step = Step(said, (source,), function)
        if self.take(step):
            self.parts.append((step, self.channels(source)))

    def addition(self) -> None:
        a, b = self.operand(), self.operand()
        said = self.draw(st.sampled_from(sorted(BINARY)))
        self.take(Step(said, (a, b), lambda m, x, y: BINARY[said](x, y)))

    def siblings(self) -> None:
        """Branches over one source, added up at once, as trained blocks do."""
        source = self.operand()
        channels = self.channels(source)
        total: int | None = None
        for _ in range(self.draw(st.integers(2, 4))):
            branch = source
            for kind in self.draw(st.sampled_from(BRANCHES)):
                said, function = kind(self.draw, self.net, self.channels(branch))
                if self.take(Step(said, (branch,), function)):
                    branch = len(self.values) - 1
            if total is None or self.channels(branch) != channels:
                total = branch
                continue
            said = self.draw(st.sampled_from(ADDITIONS))
            step = Step(said, (total, branch), lambda m, x, y, s=said: BINARY[s](x, y))
            if self.take(step):
                total = len(self.values) - 1

    def again(self) -> None:
        """Call a layer a second time: shared modules and tensors."""
        if self.parts:
            step, channels = self.draw(st.sampled_from(self.parts))
            source = self.operand()
            if self.channels(source) == channels:
                self.take(Step(f"again {step.said}", (source,), step.function))

    def block(self) -> None:
        """A net inside the net, called once or twice."""
        source = self.operand()
        inner = _build(self.draw, [x.clone() for x in self.values[source]], 5, nested=True)
        inner.outputs = inner.outputs[-1:]
        name = self.net.add("block", inner)
        function = lambda m, x: m.get_submodule(name)(x)  # noqa: E731
        step = Step(f"block {name}", (source,), function)
        if self.take(step):
            self.parts.append((step, self.channels(source)))


def _build(draw: st.DrawFn, inputs: list[Tensor], most: int, *, nested: bool = False) -> Net:
    builder = _Builder(draw, inputs)
    kinds: list[Callable[[], None]] = [
        lambda: builder.layer(_convolution),
        lambda: builder.layer(_convolution),
        builder.siblings,
        builder.siblings,
        builder.addition,
        lambda: builder.layer(_norm),
        lambda: builder.layer(_constant),
        lambda: builder.layer(_unary),
        builder.again,
        lambda: builder.layer(_transposed),
    ]
    if not nested:
        kinds.append(builder.block)
    for _ in range(draw(st.integers(1, most))):
        draw(st.sampled_from(kinds))()
    last = len(builder.values) - 1
    extra = {max(0, last - i) for i in draw(st.lists(st.integers(1, 4), max_size=2))}
    builder.net.outputs = (*sorted(extra - {last}), last)
    return builder.net


@st.composite
def nets(draw: st.DrawFn, most: int = 8) -> Net:
    """A random module tree in eval mode that runs at both of `SIZES`."""
    torch.manual_seed(draw(st.integers(0, 3)))
    generator = torch.Generator().manual_seed(0)
    net = _build(draw, [torch.randn(size, generator=generator) for size in SIZES], most)
    return net.eval()
