"""Random module trees in mixed spellings, for properties of the whole pipeline.

A `Net` is a list of steps over the values computed so far, and runs at the first two of its sizes
by construction: a step that raises at one of them is not taken. Tensors are the values while it is
built; later its forward replays the steps, so that tracing sees ordinary straight-line code. The
steps are in `steps.py`; here they are put together, and blocks of several that belong together: a
rule is tempted only by its own structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from support import steps
from support.steps import CHANNELS, Kind, Made, Net, Step

# A net runs at both sizes of a pair. The first has odd ones; what divides at even sizes only, and
# sums that agree there only, need the second. In the third a vector along the width fits, and
# could be one along the channels.
SIZES = (
    ((2, CHANNELS, 9, 8), (1, CHANNELS, 6, 11)),
    ((2, CHANNELS, 8, 12), (1, CHANNELS, 6, 4)),
    ((2, CHANNELS, 9, CHANNELS), (1, CHANNELS, 6, CHANNELS)),
)
# And at these where it can: two sizes leave room for a wrong stride, large ones never broadcast.
MORE_SIZES = ((1, CHANNELS, 7, 10), (1, CHANNELS, 3, 5), (1, CHANNELS, 4, 4))
MOST_ELEMENTS = 60_000
MOST_CHANNELS = 64

LINEAR: tuple[Kind, ...] = (
    steps.convolution,
    steps.convolution,
    steps.pointwise,
    steps.norm,
    steps.affine,
    steps.plain,
    steps.pad,
    steps.pad,
    steps.crop,
    steps.average,
    steps.average,
    steps.rearranged,
    steps.permuted,
    steps.resized,
    steps.upsample,
    steps.pixels,
    steps.averaged,
    steps.nothing,
    steps.linear,
    steps.transposed,
    steps.turned,
)
OTHER: tuple[Kind, ...] = (steps.activation, steps.max_pool, steps.constant, steps.softmax)
# What keeps the size in a branch; the empty branch is the source itself. "conv" has the stride of
# its siblings, "pair" is two convs with paddings that make up for each other.
BRANCHES: tuple[tuple[Any, ...], ...] = (
    ("conv",),
    ("conv", steps.norm),
    (steps.norm,),
    (),
    ("pair",),
    ("pair",),
    ("pair",),
    ("pair",),
    (steps.pointwise, "conv"),
    (steps.pointwise, steps.norm, "conv"),
    (steps.affine, "conv", steps.norm),
    ("conv", steps.nothing),
    (steps.convolution,),
)


class _Builder:
    """A net in the making, with its values at every size."""

    def __init__(self, draw: st.DrawFn, inputs: Sequence[Tensor], *, linear: bool) -> None:
        self.draw, self.net, self.linear = draw, Net(), linear
        self.values: list[list[Any]] = [[x.clone() for x in inputs]]
        self.usable = [0]  # values that are one tensor, and that a later step may read
        self.parts: list[tuple[Step, int]] = []  # layers, which another step may call again
        self.results: set[int] = set()

    # --- one step ---

    def take(self, said: str, operands: Sequence[int], function: Callable[..., Any]) -> int | None:
        """Append the step if it runs at both sizes; the other sizes go when they do not fit."""
        step = Step(said, tuple(operands), function)
        made: list[Any] = []
        for at in range(len(self.values[0])):
            made.append(self._run(step, at))
            if made[-1] is None and at < 2:
                return None
        fits = [at for at, value in enumerate(made) if value is not None]
        self.values = [[value[at] for at in fits] for value in [*self.values, made]]
        self.net.steps.append(step)
        index = len(self.values) - 1
        if isinstance(made[0], Tensor):
            self.usable.append(index)
        return index

    def _run(self, step: Step, at: int) -> Any:
        # In-place operations must not spoil the values when the step is not taken after all.
        copies = tree_map_only(Tensor, Tensor.clone, [self.values[i][at] for i in step.operands])
        try:
            with torch.no_grad():
                value = step.function(self.net, *copies)
        except (RuntimeError, ValueError, IndexError):
            return None
        return tree_map_only(Tensor, Tensor.clone, value) if _sane(value) else None

    def apply(self, kind: Kind, source: int, *, again: bool = False) -> int:
        """The value of a drawn step on `source`, or `source` itself if it does not run."""
        said, function = kind(self.draw, self.net, self.channels(source))
        made = self.take(said, (source,), function)
        if made is None:
            return source
        if again:
            self.parts.append((self.net.steps[-1], self.channels(source)))
        return made

    def in_a_row(self, kinds: Sequence[Kind], source: int) -> int:
        for kind in kinds:
            source = self.apply(kind, source)
        return source

    def operand(self) -> int:
        """Recent values more often: chains; sometimes an old one: several sources."""
        back = self.draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3, 5]))
        return self.usable[max(0, len(self.usable) - 1 - back)]

    def channels(self, value: int) -> int:
        return int(self.values[value][0].shape[1])

    def some(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def sometimes(self, one_in: int = 3) -> bool:
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1

    # --- kinds of steps ---

    def layer(self) -> None:
        kinds = LINEAR if self.linear or not self.sometimes() else OTHER
        self.apply(self.some(kinds), self.operand(), again=True)

    def convolution(self) -> None:
        self.apply(steps.convolution, self.operand(), again=True)

    def _beside(self, value: int) -> int:
        """Another value of the same shape, if there is one."""
        shape = self.values[value][0].shape
        others = [i for i in self.usable if i != value and self.values[i][0].shape == shape]
        return self.some(others[-4:]) if others else self.operand()

    def addition(self) -> None:
        a = self.operand()
        b = self.operand() if self.sometimes() else self._beside(a)
        table = steps.ADDITIONS if self.linear else steps.ADDITIONS | steps.PRODUCTS
        said = self.some(list(table))
        self.take(said, (a, b), lambda m, x, y: table[said](x, y))

    def again(self) -> None:
        """Call a layer a second time: shared modules and tensors."""
        if self.parts:
            step, channels = self.some(self.parts)
            source = self.operand()
            if self.channels(source) == channels:
                self.take(f"again {step.said}", (source,), step.function)

    def block(self) -> None:
        """A net inside the net, called once or twice."""
        source = self.operand()
        inner = _build(self.draw, self.values[source], 5, nested=True, linear=self.linear)
        inner.outputs = inner.outputs[-1:]
        name = self.net.add("block", inner)
        function = lambda m, x: m.get_submodule(name)(x)  # noqa: E731
        self.apply(lambda *_: (f"block {name}", function), source, again=True)

    # --- several steps that belong together ---

    def neighbourhood(self) -> None:
        """Linear steps in a row."""
        kinds = [self.some(LINEAR) for _ in range(self.draw(st.integers(2, 4)))]
        self.in_a_row(kinds, self.operand())

    def chain(self) -> None:
        """Convs in a row, wide inside so that a wrong merge is tempting, padded on any side."""
        value = self.operand()
        if self.sometimes():
            self._pair(value, self.some([1, 1, 2]), CHANNELS)
            return
        links = self.draw(st.integers(2, 3))
        for link in range(links):
            padding: Any = self.some([0, 0, 1, "one-sided"])
            if padding == "one-sided":
                widths = self.some(steps.ONE_SIDED)
                value = self.apply(_padded(widths), value)
                padding = 0
            channels = self.channels(value)
            out = CHANNELS
            if link < links - 1:
                out = min(channels * self.some([8, 8, 2, 1]), MOST_CHANNELS)
            kernel = self.some([(1, 1), (3, 3), (1, 3), (2, 2), (4, 1)])
            if kernel == (1, 1) and link == 0:
                padding = 0
            how = {"padding": padding, "stride": self.some([1, 1, 1, 2])}
            groups = self.some([1, 1, 2, channels, CHANNELS])
            value = self.apply(_conv(out, kernel, groups=groups, **how), value)
            if self.sometimes(4):
                value = self.apply(self.some([steps.norm, steps.affine, steps.plain]), value)

    def _branches(self, source: int, least: int, *, equal: bool) -> list[int]:
        """Values of one size over one source; `equal`: of its channels too."""
        stride = self.some([1, 1, 1, 2])
        out = self.channels(source) if equal or self.draw(st.booleans()) else None
        values = []
        for _ in range(self.draw(st.integers(least, 4))):
            value = source
            if self.sometimes(8):
                value = self.apply(self.some(LINEAR), value)
            for kind in self.some(BRANCHES):
                if kind == "pair":
                    value = self._pair(value, stride, out or CHANNELS)
                else:
                    same = steps.same_size(stride, out)
                    value = self.apply(same if kind == "conv" else kind, value)
            values.append(value)
        return values

    def _pair(self, value: int, stride: int, out: int) -> int:
        """Two convs in a row, together of the size of one; who pads, and on which side, is drawn.

        Where the second one pads, it decides whether the two are one map.
        """
        first, second = self.some([3, 1, 2]), self.some([3, 1, 2])
        inner = self.some([1, stride])
        sides = [(1, 0), (0, 1), (1, 1), (0, 0), (2, 0)]
        between = [self.some(sides)] * 2 if self.sometimes(2) else [self.some(sides), (0, 0)]
        before = []
        for low, high in between:
            both = max(0, first - 1 + inner * (second - 1 - low - high))
            before.append(self.some([both // 2, both, 0]))
            before.append(both - before[-1])
        wide = self.some([self.channels(value), 8 * self.channels(value)])
        links = (
            (before, first, inner, min(wide, MOST_CHANNELS)),
            ([n for sides in between for n in sides], second, stride // inner, out),
        )
        for widths, kernel, step, outputs in links:
            padding: Any = 0
            if widths[0] == widths[1] and widths[2] == widths[3]:
                padding = (widths[2], widths[0])
            else:
                value = self.apply(_padded(tuple(widths)), value)
            how = {"padding": padding, "stride": step, "groups": self.some([1, 1, CHANNELS])}
            value = self.apply(_conv(outputs, (kernel, kernel), **how), value)
        return value

    def siblings(self) -> None:
        """Branches over one source, added up at once, as trained blocks do."""
        total, *branches = self._branches(self.operand(), 2, equal=True)
        for branch in branches:
            said = self.some(list(steps.ADDITIONS))
            function = lambda m, x, y, s=said: steps.ADDITIONS[s](x, y)  # noqa: E731
            made = self.take(said, (total, branch), function)
            total = total if made is None else made

    def concat(self) -> None:
        """Branches over one source or several, concatenated; often something per channel after."""
        source = self.operand()
        values = self._branches(source, 2, equal=False)
        if self.sometimes():
            values = [source, *values[1:]]
        if self.sometimes():
            values = [*values[:3], self._beside(values[-1])]
        self._after(self._join(values))

    def _join(self, values: Sequence[int]) -> int | None:
        said, function = steps.join(self.draw)
        return self.take(said, values, function)

    def _after(self, value: int | None) -> None:
        if value is not None:
            kinds = (steps.norm, steps.affine, steps.pointwise, steps.convolution, steps.pixels)
            self.in_a_row([self.some(kinds) for _ in range(self.draw(st.integers(0, 2)))], value)

    def split(self) -> None:
        """Chunks of channels through nothing or convs, equal or not, joined in any order."""
        source = self.operand()
        said, function = steps.pieces(self.draw, self.channels(source))
        whole = self.take(said, (source,), function)
        if whole is None:
            return
        found = [self._item(whole, i) for i in range(len(self.values[whole][0]))]
        items = [item for item in found if item is not None]
        if self.sometimes(4):  # only one of them is read
            self.apply(steps.convolution, self.some(items))
            return
        equal = _conv(self.some([2, CHANNELS]), (3, 3), padding=1)
        unequal = steps.same_size(1)
        way = self.some(["equal", "equal", "unequal", "some", "none"])
        kinds = {"equal": [equal], "unequal": [unequal], "some": [unequal, None], "none": [None]}
        values: list[Any] = []
        for item in items:
            kind: Any = self.some(kinds[way])  # type: ignore[arg-type]
            values.append(item if kind is None else self.apply(kind, item))
        if self.sometimes():
            values = list(self.draw(st.permutations(values)))
        self._after(self._join(values))

    def _item(self, whole: int, index: int) -> int | None:
        return self.take(f"item {index}", (whole,), lambda m, xs: xs[index])

    def focus(self) -> None:
        """Four strided slices on channels, then a conv; sometimes not the four of a Focus."""
        source = self.operand()
        if self.sometimes():
            self.in_a_row([steps.pixels, steps.convolution], source)
            return
        corners = [(0, 0), (1, 0), (0, 1), (1, 1)]
        if self.sometimes():
            corners = self.some([corners[::-1], corners[:2], [(0, 0), (1, 1), (1, 0)]])
        slices = []
        for row, column in corners:
            said, function = steps.strided(row, column, self.some([2] * 8 + [3]))
            value = self.take(said, (source,), function)
            slices += [] if value is None else [value]
        value = self._join(slices) if slices else None
        if value is not None:
            kernel, padding = self.some([((3, 3), 1), ((1, 1), 0), ((2, 2), (1, 0))])
            self.apply(_conv(CHANNELS, kernel, padding=padding), value)

    def bias_padded(self) -> None:
        """Pointwise layers, a pad of the value they give to zero, and one reader or more."""
        source = self.operand()
        channels, value, before = self.channels(source), source, []
        if not self.sometimes():
            out = self.some([channels, CHANNELS, 2 * CHANNELS])
            kernel, padding = self.some([(1, 0)] * 5 + [(3, 1), (3, 0), (1, 1)])
            bias = self.some([True, False])
            part: nn.Module = nn.Conv2d(channels, out, kernel, padding=padding, bias=bias)
            before.append(self.net.add("conv", part))
            channels = out
        if not before or self.draw(st.booleans()):
            part = nn.BatchNorm2d(channels, affine=self.some([True, True, False]))
            before.append(self.net.add("norm", part))
        for name in before:
            made = self.take(name, (value,), lambda m, x, n=name: m.get_submodule(n)(x))
            if made is None:
                return
            value = made
        width = self.some([1, 1, 2])
        one_sided = [(1, 0, 1, 0), (0, 1, 1, 1), (1, 2, 2, 1)]
        widths = self.some([(width,) * 4, (width,) * 4, *one_sided])
        padded = self.take(
            *_on(value, steps.bias_padded(self.draw, self.net, before, channels, widths))
        )
        if padded is None:
            return
        kernel, stride = self.some([(3, 1), (3, 1), (3, 2), (2, 1), (5, 1)])
        readers = [self.apply(_conv(CHANNELS, (kernel, kernel), stride=stride), padded)]
        if self.draw(st.booleans()):
            pool = steps.layer(self.net, nn.AvgPool2d(kernel, stride), "module avg_pool2d")
            readers.append(self.take(*_on(padded, pool)) or padded)
        if self.draw(st.booleans()):  # the branch beside it reads zeros at the border
            padding = kernel // 2
            beside = _conv(CHANNELS, (kernel, kernel), stride=stride, padding=padding)
            readers.append(self.apply(beside, source))
        for reader in readers[1:]:
            self.take("x + y", (readers[0], reader), lambda m, x, y: x + y)

    def thin(self) -> None:
        """A square kernel and thin ones that read crops where it is padded less."""
        source = self.operand()
        inset = self.some([1, 1, 0, 2])
        out = self.some([CHANNELS, self.channels(source)])
        stride = self.some([1, 1, 2])
        total = self.apply(_conv(out, (3, 3), stride=stride, padding=max(0, 1 - inset)), source)
        rows, columns = (
            (slice(None), slice(None), slice(inset or None, -inset or None)),
            (slice(None), slice(None), slice(None), slice(inset or None, -inset or None)),
        )
        for kernel, cut, said in (((1, 3), rows, "rows"), ((3, 1), columns, "columns")):
            branch = source
            if inset:
                said = f"without the {inset} outer {said}"
                branch = self.take(said, (source,), lambda m, x, c=cut: x[c]) or source
            padding = (kernel[0] // 2, kernel[1] // 2) if not inset else (0, 0)
            branch = self.apply(_conv(out, kernel, stride=stride, padding=padding), branch)
            if self.sometimes():
                branch = self.apply(steps.norm, branch)
            total = self.take("x + y", (total, branch), lambda m, x, y: x + y) or total

    def readers(self) -> None:
        """Convs of equal geometry over one source, perhaps a BatchNorm, that go different ways."""
        source = self.operand()
        if self.draw(st.booleans()):
            source = self.apply(self.some([steps.norm, steps.affine]), source)
        kernel, padding = self.some([((1, 1), 0), ((1, 1), 0), ((3, 3), 1), ((3, 3), 0)])
        how = {"padding": padding, "stride": self.some([1, 1, 2]), "groups": self.some([1, 1, 2])}
        same = steps.table({n: f for n, f in steps.POINTWISE.items() if n == "relu"})
        after = self.some([[], [steps.norm]] if self.linear else [[], [same], [steps.norm, same]])
        if not self.linear and self.sometimes(6):
            after = [steps.activation]  # another one each
        values = []
        for _ in range(self.draw(st.integers(2, 4))):
            out = self.some([CHANNELS, CHANNELS, 2, 6])
            if self.sometimes(8):
                kernel = (1, 3)
            values.append(self.in_a_row([_conv(out, kernel, **how), *after], source))
        way = self.some(["cat", "out", "separate", "sum"])
        if way == "cat":
            self._after(self._join(values))
        elif way == "out":
            self.results.update(values)
        elif way == "sum":
            self.take("x + y", values[:2], lambda m, x, y: x + y)

    def dead(self) -> None:
        """A conv that nobody reads."""
        value = self.apply(steps.convolution, self.operand())
        if value == self.usable[-1] and value:
            self.usable.pop()

    def pixel(self) -> None:
        """One pixel that broadcasts: a sum of sizes that agree at some input sizes only."""
        source = self.operand()
        value = self.in_a_row([steps.averaged, _conv(self.channels(source), (1, 1))], source)
        if not self.linear and self.sometimes():
            value = self.apply(steps.activation, value)
        added = self.take("x + y", (source, value), lambda m, x, y: x + y)
        self.apply(_conv(CHANNELS, (3, 3), padding=1), source if added is None else added)

    def view_of_written(self) -> None:
        """A view is taken, what it looks at is written, and the view is read."""
        source = self.operand()
        view = self.apply(self.some([steps.crop, steps.rearranged, steps.plain]), source)
        written = self.some([steps.plain, steps.affine, steps.plain])
        self.apply(written, source)
        self.in_a_row([self.some([steps.convolution, steps.norm])], view)


def _on(value: int, made: Made) -> tuple[str, tuple[int], Callable[..., Any]]:
    return made[0], (value,), made[1]


def _padded(widths: tuple[int, ...]) -> Kind:
    return lambda draw, net, channels: (
        f"F.pad {widths}",
        lambda m, x: torch.nn.functional.pad(x, widths),
    )


def _conv(out: int, kernel: tuple[int, int], **how: Any) -> Kind:
    return lambda draw, net, channels: steps.conv(draw, net, channels, out, kernel, **how)


def _sane(value: Any) -> bool:
    """Four axes, a bearable size, and numbers whose rounding says something."""
    for y in tree_leaves(value):
        if not isinstance(y, Tensor) or y.dim() != 4 or not 0 < y.numel() <= MOST_ELEMENTS:
            return False
        if y.shape[1] > MOST_CHANNELS or not bool(y.isfinite().all()):
            return False
        # All but zero is what a sum that cancels leaves: rounding, equal to nothing.
        largest = float(y.abs().max())
        if largest > 1e4 or 0 < largest < 1e-4:
            return False
    return True


def _build(
    draw: st.DrawFn, inputs: Sequence[Tensor], most: int, *, linear: bool, nested: bool = False
) -> Net:
    builder = _Builder(draw, inputs, linear=linear)
    kinds: list[Callable[[], None]] = [
        builder.convolution,
        builder.layer,
        builder.layer,
        builder.layer,
        builder.siblings,
        builder.siblings,
        builder.siblings,
        builder.addition,
        builder.neighbourhood,
        builder.neighbourhood,
        builder.chain,
        builder.chain,
        builder.concat,
        builder.concat,
        builder.split,
        builder.bias_padded,
        builder.readers,
        builder.readers,
        builder.thin,
        builder.focus,
        builder.pixel,
        builder.again,
        builder.dead,
        builder.view_of_written,
    ]
    if not nested:
        kinds.append(builder.block)
    for _ in range(draw(st.integers(1, most))):
        draw(st.sampled_from(kinds))()
    *earlier, last = builder.usable
    back = draw(st.lists(st.integers(1, 4), max_size=2))
    extra = {earlier[-i] for i in back if i <= len(earlier)} | builder.results
    net = builder.net
    net.outputs = (*sorted(extra - {last}), last)
    net.sizes = tuple(tuple(x.shape) for x in builder.values[0])
    return net


@st.composite
def nets(draw: st.DrawFn, most: int = 6, linear: bool = False) -> Net:
    """A random module tree in eval mode that runs at each of its `sizes`.

    A `linear` one has nothing but linear steps: whatever is in the walk of a pass meets all else.
    """
    torch.manual_seed(draw(st.integers(0, 3)))
    generator = torch.Generator().manual_seed(0)
    sizes = (*draw(st.sampled_from(SIZES)), *MORE_SIZES)
    inputs = [torch.randn(size, generator=generator) for size in sizes]
    return _build(draw, inputs, most, linear=linear).eval()
