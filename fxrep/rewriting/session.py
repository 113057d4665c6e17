"""The driver: the passes run over the graphs of a capture until none of them changes anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from fxrep.algebra.recipe import Call, record
from fxrep.analysis import aliasing
from fxrep.analysis.channels import Channels
from fxrep.analysis.ranks import Ranks
from fxrep.analysis.values import Examples, Values, watched
from fxrep.capture.islands import Capture, Program
from fxrep.ops.calls import Calls
from fxrep.planning.cost import CostModel
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Drop, Fold, Joint, Pass
from fxrep.planning.walk import where
from fxrep.reading import sizes
from fxrep.reading.reader import read
from fxrep.reading.view import Affine, View, double
from fxrep.refusal import Refusal
from fxrep.report import Report, Rewrite, Skip
from fxrep.rewriting import measure
from fxrep.rewriting import validate as validation
from fxrep.rewriting.editor import Editor, Layer, build
from fxrep.rewriting.measure import Timing
from fxrep.rewriting.notes import described, kinds
from fxrep.rewriting.pruning import prune

# A rewrite can open the way for another pass; real models settle in two or three rounds.
MOST_ROUNDS = 100


@dataclass(frozen=True)
class Settings:
    """What a rewrite is asked for.

    Attributes:
        passes: in order.
        costs: decide what is worth it: one after the other, until none finds any more.
        validate: check each rewrite.
        measures: time each whose profit is in doubt.
    """

    passes: tuple[Pass, ...]
    costs: tuple[CostModel, ...]
    validate: bool
    measures: bool = False


def rewrite(captured: Capture, settings: Settings, example_inputs: object = None) -> Session:
    """Rewrite the graphs of a capture in place."""
    with torch.no_grad():  # weight_norm's weight is computed to be read, and must not be tracked
        session = Session(captured, example_inputs, settings)
        for part in session.parts:
            session.rewrite(part)
    session.finish()
    return session


@dataclass(eq=False)
class Part:
    """A program in the making: its graph, what is known of it, and its editor."""

    program: Program
    view: View
    editor: Editor
    values: Values
    # Plans for layers called more than once, until there is an equal one for every call.
    waiting: dict[object, list[Plan]] = field(default_factory=lambda: defaultdict(list))
    # Why a pass declined a node, by its name.
    notes: dict[fx.Node, dict[str, Skip]] = field(default_factory=lambda: defaultdict(dict))

    # The values that took the place of others.
    made: list[fx.Node] = field(default_factory=list)

    def note(self, node: fx.Node) -> Skip | None:
        """Why a node stayed as it is, by the pass that looked last.

        What folding scales has to say of a layer is said of the scale that stays.
        """
        found = [s for name, s in self.notes.get(node, {}).items() if name != "batchnorm"]
        if not _is_layer(self, node) and node in self.notes:
            found = list(self.notes[node].values())
        return found[-1] if found else None


@dataclass(eq=False)
class Session:
    """One call of `optimize`, or one graph of `torch.compile`."""

    captured: Capture
    example_inputs: object
    settings: Settings
    parts: list[Part] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    # The nodes that use a layer's weight, by the weight's identity: a module called twice, or a
    # parameter that two modules share, is one weight with two users.
    users: dict[int, set[fx.Node]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self) -> None:
        examples = Examples(self.example_inputs)
        if self.settings.measures:
            examples = watched(self.captured, self.example_inputs)
        for program in self.captured.programs:
            calls = Calls(program.module)
            aliasing.rename_written(program.graph, calls)
            values = examples.values(program)
            ranks = Ranks(program.graph, calls, values.ranks, program.ranks)
            view = View(
                program.graph,
                calls,
                read,
                aliasing.analyse(program.graph, calls),
                ranks,
                Channels(program.graph, calls, ranks.lean),
            )
            sizes.read_early(view)
            editor = Editor(program.graph, program.module, view, program.keep_modules)
            self.parts.append(Part(program, view, editor, values))
            for node in program.graph.nodes:
                reading = view.read(node)
                if isinstance(reading, Affine) and reading.weight is not None:
                    self.users[id(reading.owner)].add(node)

    def rewrite(self, part: Part) -> None:
        """Run the passes over one graph until none of them changes it."""
        costs = self.settings.costs
        changed = True
        while changed:
            changed = any([self._settle(part, cost) for cost in costs]) and len(costs) > 1

    def _settle(self, part: Part, cost: CostModel) -> bool:
        """Run the passes with one cost model until none changes anything; whether any did."""
        for turn in range(MOST_ROUNDS):
            changed = [p.name for p in self.settings.passes if self._run(p, part, cost)]
            if not changed:
                return turn > 0
        raise AssertionError(f"the passes {changed} keep rewriting each other's result")

    def _run(self, rule: Pass, part: Part, cost: CostModel) -> bool:
        """One sweep, from the outputs to the inputs: the largest region is met first."""
        changed = False
        part.waiting.clear()
        waiting = list(part.program.graph.nodes)
        while waiting:
            node = waiting.pop()
            if node._erased:
                continue
            made = len(part.made)
            answer = rule.propose(part.view, node, cost)
            if isinstance(answer, Fold):
                self._fold(rule, part, answer)
                changed = True
                continue
            if isinstance(answer, Plan):
                answer = self._apply(rule, part, answer)
                changed = changed or answer is None
            if isinstance(answer, Drop):
                self._drop(rule, part, answer)
                changed = True
                continue
            if isinstance(answer, Joint):
                answer = self._apply_all(rule, part, answer)
                changed = changed or answer is None
            if isinstance(answer, Refusal) and not _is_identity(part, node):
                note = Skip(rule.name, self._where(part, node), answer.reason)
                part.notes[node][rule.name] = note
            else:
                part.notes.get(node, {}).pop(rule.name, None)
            waiting += part.made[made:]  # what took a node's place may be rewritten in turn
        return changed

    def _apply(self, rule: Pass, part: Part, plan: Plan) -> Refusal | None:
        """Carry out a plan; None if it was carried out."""
        shared = self._shared(part, plan)
        if shared:
            key = _signature(plan, part.view)
            # A rewrite in between may have taken a waiting plan apart: the next round plans anew.
            group = [other for other in part.waiting[key] if _stands(other)] + [plan]
            part.waiting[key] = group
            covered = {node for other in group for node in other.region}
            outside = [n for node in shared for n in shared[node] if n not in covered]
            if outside:
                node = next(iter(shared))
                return Refusal(
                    f"{where(node)}: called {len(shared[node])} times, in different surroundings"
                )
            plans = part.waiting.pop(key)
        else:
            plans = [plan]
        return self._carry_out(rule, part, plans)

    def _apply_all(self, rule: Pass, part: Part, joint: Joint) -> Refusal | None:
        """Carry out plans that pay together: all or none."""
        if any(self._shared(part, plan) for plan in joint.plans):
            return Refusal("a layer that reads it is called more than once")
        ready = []
        for plan in joint.plans:
            layers = self._ready(part, plan)
            if isinstance(layers, Refusal):
                return layers
            ready.append(layers)
        for plan, layers in zip(joint.plans, ready, strict=True):
            self._install(rule, part, [plan], *layers)
        part.editor.erase_tree(joint.node)
        return None

    def _shared(self, part: Part, plan: Plan) -> dict[fx.Node, set[fx.Node]]:
        """Layers of the region whose weight is used elsewhere too, with all its users."""
        shared = {}
        for node in plan.region:
            reading = part.view.read(node)
            if isinstance(reading, Affine) and reading.weight is not None:
                # Another graph that calls it keeps the old layer; this one may fold its own.
                users = {
                    n
                    for n in self.users[id(reading.owner)]
                    if not n._erased and n.graph is node.graph
                }
                if not users <= set(plan.region):
                    shared[node] = users
        return shared

    def _carry_out(self, rule: Pass, part: Part, plans: Sequence[Plan]) -> Refusal | None:
        """Carry out equal plans, for they share their layers."""
        timing = measure.judge(plans, part.view, part.values) if self.settings.measures else None
        if isinstance(timing, Refusal):
            return timing
        ready = self._ready(part, plans[0])
        if isinstance(ready, Refusal):
            return ready
        self._install(rule, part, plans, *ready, timing)
        return None

    def _ready(self, part: Part, plan: Plan) -> tuple[list[Layer], float | None] | Refusal:
        """The layers of a plan, and their error if they were validated."""
        view = part.view
        layers = build(plan, view, _memo(lambda path: double(view.originals[path])))
        if isinstance(layers, Refusal) or not self.settings.validate:
            return layers if isinstance(layers, Refusal) else (layers, None)
        error = validation.check(plan, layers, view, _memo(lambda path: _exact(view, path)))
        return error if isinstance(error, Refusal) else (layers, error)

    def _install(
        self, rule: Pass, part: Part, plans: Sequence[Plan], layers: Sequence[Layer],
        error: float | None, timing: Timing | None = None,
    ) -> None:  # fmt: skip
        plan, view = plans[0], part.view
        before = kinds(plan, view)
        targets = part.editor.place(plans, layers)
        location = self._location(part, targets, plan)
        for each in plans:
            part.made.append(part.editor.replace(each, targets))
        for target, layer in zip(targets, layers, strict=True):
            part.editor.install(target, layer.module)
            for name, expr in zip(("weight", "bias"), layer.exprs, strict=True):
                view.derived.pop(f"{target}.{name}", None)
                if expr is not None:
                    view.derived[f"{target}.{name}"] = expr
        self.rewrites.append(described(rule, location, plan, before, layers, error, timing))

    def _fold(self, rule: Pass, part: Part, fold: Fold) -> None:
        """Store the value of a constant expression, or write it where it is read."""
        node, value = fold.node, fold.value
        part.view.forget(*node.users)
        location = self._where(part, node)
        if not isinstance(value, Tensor):
            part.view.depends_on_content(fold.expr)
            for user in list(node.users):
                user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
                user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)
        else:
            sources = [part.view.originals[path] for path in record(fold.expr).paths]
            path = part.editor.store(node, value, any(t.requires_grad for t in sources))
            part.view.derived[path] = fold.expr
            with part.program.graph.inserting_before(node):
                stored = part.program.graph.get_attr(path)
            part.editor.track(stored)
            stored.meta = dict(node.meta)
            part.view.ranks.same(stored, node)
            node.replace_all_uses_with(stored)
        steps = tuple(step.name for step in record(fold.expr).steps if isinstance(step, Call))
        part.editor.erase_tree(node)
        self.rewrites.append(Rewrite(rule.name, location, steps, ("constant",), 0, 0, 0, 0, 0.0))

    def _drop(self, rule: Pass, part: Part, drop: Drop) -> None:
        location = self._where(part, drop.node)
        part.editor.erase(drop.node)
        self.rewrites.append(Rewrite(rule.name, location, (drop.kind,), (), 0, 0, 0, 0, 0.0))

    def _where(self, part: Part, node: fx.Node) -> str:
        return ".".join(name for name in (part.program.path, where(node)) if name)

    def _location(self, part: Part, targets: Sequence[str], plan: Plan) -> str:
        names = ", ".join(targets) or where(plan.root)
        return ".".join(name for name in (part.program.path, names) if name)

    def report(self) -> Report:
        """What was done: by pass, from the inputs to the outputs; and what was not."""
        order = [p.name for p in self.settings.passes]
        rewrites = sorted(reversed(self.rewrites), key=lambda r: order.index(r.pass_name))
        return Report(tuple(rewrites), tuple(self.skips()))

    def skips(self) -> list[Skip]:
        """What was left alone and why: every BatchNorm that stayed, and every refused merge."""
        found = list(self.captured.skipped)
        for part in self.parts:
            for node in part.program.graph.nodes:
                note = self._batchnorm_note(part, node) if _is_batchnorm(part, node) else None
                if node.op == "call_module" and node.meta.get("owner"):
                    found.extend(self._inner_notes(part, node))
                note = note or part.note(node)
                if note is not None:
                    found.append(note)
        return list(dict.fromkeys(found))

    def _inner_notes(self, part: Part, node: fx.Node) -> list[Skip]:
        """BatchNorms inside a module of torch.nn that runs as one operation."""
        module = part.view.submodule(str(node.target))
        reason = f"inside a torch.nn.{type(module).__name__}, which is called as it is"
        return [
            Skip("capture", f"{self._where(part, node)}.{name}", reason)
            for name, inner in module.named_modules()
            if name and isinstance(inner, nn.modules.batchnorm._BatchNorm)
        ]

    def _batchnorm_note(self, part: Part, node: fx.Node) -> Skip:
        """Why a BatchNorm stayed: what its own rewrite said, or that of the layer it feeds."""
        note = part.note(node)
        if note is not None:
            return note
        place = self._where(part, node)
        users = _readers(part, node)
        for user in users:
            if _is_layer(part, user) and part.notes.get(user):
                return Skip("batchnorm", place, list(part.notes[user].values())[-1].reason)
        feeds = ", ".join(sorted({_name(part, user) for user in users})) or "nothing"
        source = node.all_input_nodes[0]
        while _is_identity(part, source):
            source = source.all_input_nodes[0]
        return Skip(
            "batchnorm",
            place,
            f"no convolution or linear layer next to it: it reads {_name(part, source)} "
            f"and feeds {feeds}",
        )

    def finish(self) -> None:
        """Guard what was assumed and remove the modules that nothing calls any more."""
        for part in self.parts:
            for node, rank in part.view.ranks.guards():
                part.editor.guard(node, rank)
        prune(self.captured, {part.program.path: part.editor.retired for part in self.parts})


def _is_batchnorm(part: Part, node: fx.Node) -> bool:
    reading = part.view.read(node)
    if isinstance(reading, Affine):
        return reading.kind == "batch_norm"
    return isinstance(reading, Refusal) and "BatchNorm" in reading.reason


def _is_identity(part: Part, node: fx.Node) -> bool:
    reading = part.view.read(node)
    return isinstance(reading, Affine) and reading.kind == "identity"


def _readers(part: Part, node: fx.Node) -> list[fx.Node]:
    """Who reads a value, directly or through identities."""
    found: list[fx.Node] = []
    ahead = list(node.users)
    for user in ahead:
        if _is_identity(part, user):
            ahead.extend(user.users)
        else:
            found.append(user)
    return found


def _is_layer(part: Part, node: fx.Node) -> bool:
    reading = part.view.read(node)
    return isinstance(reading, Affine) and reading.weight is not None


def _memo(function: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    known: dict[str, Tensor] = {}

    def lookup(path: str) -> Tensor:
        if path not in known:
            known[path] = function(path)
        return known[path]

    return lookup


def _exact(view: View, path: str) -> Tensor:
    """A tensor of the traced module in float64; what fxrep made is recomputed, not widened."""
    if path in view.derived:
        value: Tensor = record(view.derived[path]).run(lambda p: double(view.originals[p]))
        return value
    return double(view.tensor(path))


def _stands(plan: Plan) -> bool:
    nodes = (*plan.expanded, *(piece.source for piece in plan.pieces))
    return not any(node._erased for node in nodes)


def _signature(plan: Plan, view: View) -> object:
    """Equal for two plans that compute the same from different values."""
    index: dict[fx.Node, object] = {node: i for i, node in enumerate(plan.expanded)}
    for piece in plan.pieces:
        index.setdefault(piece.source, f"source {len(index)}")

    def name(node: fx.Node) -> object:
        return index.get(node, str(node.target))

    def arguments(node: fx.Node) -> str:
        return str(fx.map_arg((node.args, node.kwargs), lambda n: str(name(n))))

    return tuple((node.op, str(node.target), arguments(node)) for node in plan.expanded)


def _name(part: Part, node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input {node.name}"
    if node.op == "call_module":
        return type(part.program.module.get_submodule(str(node.target))).__name__
    return getattr(node.target, "__name__", str(node.target))
