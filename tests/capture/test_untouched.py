"""Nothing of the user's is written: not by a trace, not by a run, not when `optimize` raises.

Each member of `support/hostile.py` is a forward that writes something. It must come out as it went
in, and the optimized model must go on writing as the original does, from where the original was.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fxrep
from support import hostile
from support.hostile import HARMLESS, MEMBERS, PLACES, REFUSED, Count, Made, habit
from support.profiles import IS_WIDE
from support.strategies import nets
from support.world import differences, world

NAMES = list(MEMBERS)


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    yield
    reset()


def reset() -> None:
    """Undo what the original itself does to the process."""
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    torch.autograd.set_detect_anomaly(False)
    torch.set_printoptions(profile="default")
    np.seterr(divide="warn")
    random.seed(0)


def twice(model: nn.Module, *sizes: tuple[int, ...]) -> list[Tensor]:
    """The results of two calls, one after the other."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    inputs = [torch.randn(s, generator=torch.Generator().manual_seed(5)) for s in sizes]
    with torch.no_grad():
        results = [leaf for x in inputs for leaf in tree_leaves(model(x))]
    reset()
    return results


def assert_untouched(
    make: Callable[[], tuple[nn.Module, list[object]]],
    *sizes: tuple[int, ...],
    refused: bool = False,
    **options: Any,
) -> nn.Module | None:
    """Optimize one world, and compare the results with those of the original in another one."""
    expected = twice(make()[0], *sizes)
    model, watched = make()
    before, optimized = world(model, *watched), None
    try:
        optimized = fxrep.optimize(model, **options)
    except (fxrep.ModelError, fxrep.PassError) as error:
        assert refused, str(error)
    changed = differences(before, world(model, *watched))
    reset()
    assert not changed, "\n".join(changed)
    if optimized is not None:
        assert not refused
        for got, wanted in zip(twice(optimized, *sizes), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    return optimized


def of_member(name: str, place: str, examples: bool) -> None:
    def make() -> tuple[nn.Module, list[object]]:
        made = MEMBERS[name]()
        return hostile.model(made, place), made.watched

    size = (2, hostile.CHANNELS, 6, 6)
    inputs = torch.randn(size) if examples else None
    optimized = assert_untouched(make, size, size, refused=name in REFUSED, example_inputs=inputs)
    if optimized is not None and name not in HARMLESS:
        skipped = fxrep.report(optimized).skipped
        assert any(skip.pass_name == "capture" and skip.reason for skip in skipped), name


@pytest.mark.parametrize("name", NAMES)
def test_member(name: str) -> None:
    at = NAMES.index(name)
    of_member(name, PLACES[at % len(PLACES)], at % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("examples", [False, True], ids=["", "examples"])
@pytest.mark.parametrize("place", PLACES)
def test_members_everywhere(place: str, examples: bool) -> None:
    """All of them with the wide profile; otherwise a sixth, in turns."""
    turn = 2 * list(PLACES).index(place) + examples
    for name in NAMES if IS_WIDE else NAMES[turn % 6 :: 6]:
        of_member(name, place, examples)


# --- members together with random nets ---------------------------------------------------------

# One of them needs its own number of channels; the second call of the other finds another image.
ANYWHERE = [n for n in NAMES if not n.startswith("batch_norm_training") and n not in REFUSED]


class Mixed(nn.Module):
    """Side effects before and after a net, in a forward of their own or in its own."""

    def __init__(self, before: list[nn.Module], net: Any, after: list[nn.Module]) -> None:
        super().__init__()
        self.before, self.net, self.after = nn.Sequential(*before), net, nn.ModuleList(after)

    def forward(self, x: Tensor) -> Tensor:
        results = self.net(self.before(x))
        last = results[-1] if len(self.net.outputs) > 1 else results
        for each in self.after:
            last = each(last)
        return last


def explode(view: Any, node: Any, cost: Any) -> None:
    raise ValueError("a pass that raises")


@given(
    nets(most=2),
    st.lists(st.sampled_from(ANYWHERE), max_size=2),
    st.lists(st.sampled_from(ANYWHERE), min_size=1, max_size=2),
    st.booleans(),
    st.integers(0, 5),
)
def test_members_among_random_layers(
    net: Any, before: list[str], after: list[str], examples: bool, way: int
) -> None:
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def make() -> tuple[nn.Module, list[object]]:
        own = copy.deepcopy(net)
        own.load_state_dict(state)
        made = [[MEMBERS[name]() for name in names] for names in (before, after)]
        watched = [each for group in made for m in group for each in m.watched]
        model = Mixed([m.module for m in made[0]], own, [m.module for m in made[1]])
        return model.eval(), watched

    sizes = net.sizes[:2]
    options: dict[str, Any] = {"example_inputs": torch.randn(sizes[0])} if examples else {}
    if way == 0:
        options["passes"] = [fxrep.Pass("explode", explode)]
    raises = way == 0 and _has_nodes(make, options)
    assert_untouched(make, *sizes, refused=raises, **options)


@pytest.mark.parametrize("before", ["attribute_of_a_parameter", "count-of_class"])
@pytest.mark.parametrize("after", [["buffers_item"], ["buffers_item", "count-of_class"]])
def test_a_part_that_is_rolled_back_hides_nothing(before: str, after: list[str]) -> None:
    """What was written before it in the same trace is put back with what it wrote."""

    def make() -> tuple[nn.Module, list[object]]:
        made = [[MEMBERS[name]() for name in names] for names in ([before], after)]
        watched = [each for group in made for m in group for each in m.watched]
        modules = [[m.module for m in group] for group in made]
        return nn.Sequential(*modules[0], nn.BatchNorm2d(4), *modules[1]).eval(), watched

    assert_untouched(make, (2, 4, 5, 6), (2, 4, 5, 6))


def _has_nodes(make: Callable[[], Any], options: Any) -> bool:
    try:
        fxrep.optimize(make()[0], **options)
    except fxrep.PassError:
        return True
    finally:
        reset()
    return False


# --- what one module writes, another one reads ---------------------------------------------------


def reader(state: Any) -> nn.Module:
    return habit(lambda self, x: x * (1 + self.s.n), s=state).module


def writer(state: Any) -> nn.Module:
    return habit(lambda self, x: x * float(self.s.step()), s=state).module


@pytest.mark.parametrize("order", ["wr", "rw", "rwr", "r(w)r", "(r)(w)"])
def test_state_that_a_sibling_writes_is_read_at_each_call(order: str) -> None:
    def make() -> tuple[nn.Module, list[object]]:
        torch.manual_seed(0)
        state = Count()
        parts: list[nn.Module] = []
        for letter in order.replace("(", "").replace(")", ""):
            parts += [writer(state) if letter == "w" else reader(state), nn.Conv2d(4, 4, 1)]
        if "(" in order:
            parts[0] = nn.Sequential(parts[0], nn.Conv2d(4, 4, 1))
        return nn.Sequential(*parts).eval(), [state]

    assert_untouched(make, (1, 4, 5, 5), (1, 4, 5, 5))


def test_a_parent_that_writes_the_state_of_its_child() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.child = nn.Conv2d(4, 4, 1), reader(Count())

        def forward(self, x: Tensor) -> Tensor:
            self.child.s.n += 1
            return self.child(self.conv(x))

    def make() -> tuple[nn.Module, list[object]]:
        torch.manual_seed(0)
        return Parent().eval(), []

    assert_untouched(make, (1, 4, 5, 5), (1, 4, 5, 5))


def test_a_setting_that_is_put_back_before_the_end() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.s = Count()
            self.child = habit(
                lambda m, x: x * (2 if m.s.n else 1) if x.shape[0] else x, s=self.s
            ).module

        def forward(self, x: Tensor) -> Tensor:
            self.s.n = 1
            y = self.child(x)
            self.s.n = 0
            return y

    assert_untouched(lambda: (Parent().eval(), []), (1, 4, 5, 5), (1, 4, 5, 5))


# --- errors, and what must go on folding ----------------------------------------------------------


def test_a_forward_that_raises_after_it_wrote() -> None:
    log: list[int] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        log.append(1)
        self.s.n += 1
        raise KeyError("no result")

    made = habit(forward, log, s=Count())
    model, x = hostile.model(made, "child"), torch.randn(2, 4, 6, 6)
    before = world(model, *made.watched)
    fxrep.optimize(model)
    assert not differences(before, world(model, *made.watched))
    with pytest.raises(fxrep.InputError):
        fxrep.optimize(model, x)
    assert not differences(before, world(model, *made.watched))


def test_the_report_changes_nothing() -> None:
    made = MEMBERS["dataclass-attribute"]()
    optimized = fxrep.optimize(hostile.model(made, "child"))
    before = world(optimized, *made.watched)
    str(fxrep.report(optimized))
    assert not differences(before, world(optimized, *made.watched))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_refusal_names_the_path(name: str) -> None:
    with pytest.raises(fxrep.ModelError, match=r"model\.2.*__deepcopy__"):
        fxrep.optimize(hostile.model(MEMBERS[name](), "child"))


def _reads(make: Callable[[], Any], read: Callable[[Any], Any]) -> Callable[[], Made]:
    return lambda: habit(lambda self, x: x * float(read(self.s)), s=make())


@pytest.mark.parametrize(
    "make",
    [
        _reads(Count, lambda s: s.n + 1),
        _reads(lambda: {"n": 2}, lambda s: s["n"]),
        _reads(lambda: [1, 2], len),
        _reads(lambda: np.ones(3), lambda s: s[0]),
        _reads(lambda: random.Random(0), lambda s: 2.0),
        _reads(lambda: torch.Generator(), lambda s: 2.0),
        lambda: hostile._in_namespace("N = 2\ndef forward(self, x):\n    return x * N\n"),
    ],
)  # fmt: skip
def test_state_that_is_only_read_folds(make: Callable[[], Made]) -> None:
    optimized = fxrep.optimize(hostile.model(make(), "child"))
    assert isinstance(optimized, torch.fx.GraphModule), fxrep.report(optimized)
    assert not [m for m in optimized.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_planted_change_is_found() -> None:
    """The comparison itself can fail."""
    for name in ("dataclass-of_class", "list-scope", "torch_generator-default", "global_name"):
        made = MEMBERS[name]()
        model = hostile.model(made, "child")
        before = world(model, *made.watched)
        model(torch.randn(2, 4, 6, 6))
        assert differences(before, world(model, *made.watched)), name


class Same(nn.Module):
    outputs = (0,)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("second", [n for n in ANYWHERE if n.startswith("context")])
def test_what_a_graph_calls_is_run_in_a_context_of_its_own(second: str) -> None:
    """The trial of a graph runs the opaque modules in it."""

    def make() -> tuple[nn.Module, list[object]]:
        made = [MEMBERS[name]() for name in ("buffers_item", second)]
        model = Mixed([each.module for each in made], Same(), [])
        return model.eval(), [thing for each in made for thing in each.watched]

    assert_untouched(make, (2, 4, 9, 4), (1, 4, 6, 4))
