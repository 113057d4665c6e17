"""The driver: the passes run over the graphs of a capture until none of them changes a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor, fx

from fxrep.analysis.values import Examples, recorded_run
from fxrep.capture.islands import Capture
from fxrep.errors import FxrepError, PassError
from fxrep.planning.cost import CostModel
from fxrep.planning.plan import Plan
from fxrep.planning.rule import Answer, Drop, Fold, Joint, Pass, Same
from fxrep.planning.walk import where
from fxrep.refusal import Refusal
from fxrep.report import Report, Rewrite, Skip
from fxrep.rewriting import measure, notes, sharing
from fxrep.rewriting import validate as validation
from fxrep.rewriting.layers import Layer, build
from fxrep.rewriting.measure import Timing
from fxrep.rewriting.part import Part
from fxrep.rewriting.preparing import prepared
from fxrep.rewriting.pruning import prune

# A rewrite may enable another pass. Real models reach the fixpoint in two or three rounds.
MOST_ROUNDS = 100


@dataclass(frozen=True)
class Settings:
    """The options of a session.

    Attributes:
        passes: the passes, in order.
        costs: cost models, which decide which rewrites pay. The passes run with one after the
            other until none of them allows another rewrite.
        validate: whether each rewrite is checked.
        measures: whether rewrites whose profit is in doubt are timed.
    """

    passes: tuple[Pass, ...]
    costs: tuple[CostModel, ...]
    validate: bool
    measures: bool = False


def rewrite(captured: Capture, settings: Settings, example_inputs: object = None) -> Session:
    """Rewrite the graphs of a capture in place.

    Args:
        captured: the model and its graphs.
        settings: the options.
        example_inputs: as given to `optimize`.
    """
    with torch.no_grad():  # reading the weight of a weight_norm computes it
        examples = Examples(example_inputs)
        if settings.measures:
            examples = recorded_run(captured, example_inputs)
        parts = [prepared(program, examples.values(program)) for program in captured.programs]
        session = Session(captured, settings, parts)
        for part in parts:
            session.rewrite(part)
    session.finish()
    return session


@dataclass(eq=False)
class Session:
    """The rewriting of one model by `optimize`, or of one graph by `torch.compile`.

    Attributes:
        captured: the model and its graphs.
        settings: the options.
        parts: the graphs.
        rewrites: the entries of the report so far.
    """

    captured: Capture
    settings: Settings
    parts: list[Part]
    rewrites: list[Rewrite] = field(default_factory=list)

    # --- the loop --------------------------------------------------------------------------------

    def rewrite(self, part: Part) -> None:
        """Run the passes over one graph, with one cost model after the other, to a fixpoint."""
        costs = self.settings.costs
        changed = True
        while changed:
            changed = any([self.to_fixpoint(part, cost) for cost in costs]) and len(costs) > 1

    def to_fixpoint(self, part: Part, cost: CostModel) -> bool:
        """Run the passes until none changes the graph; returns whether any did."""
        for turn in range(MOST_ROUNDS):
            changed = [rule.name for rule in self.settings.passes if self.sweep(rule, part, cost)]
            if not changed:
                return turn > 0
        names = ", ".join(changed)
        raise PassError(f"the passes {names} keep rewriting each other's result: leave one out")

    def sweep(self, rule: Pass, part: Part, cost: CostModel) -> bool:
        """Ask a pass about every node; returns whether the graph changed.

        The order is from the outputs to the inputs, so that the largest region comes first.
        """
        changed = False
        part.waiting.groups.clear()
        ahead = list(part.program.graph.nodes)
        while ahead:
            node = ahead.pop()
            if node._erased:
                continue
            try:
                answer = rule.propose(part.view, node, cost)
                refusal = None if answer is None else self.carry_out(rule, part, node, answer)
            except FxrepError:
                raise
            except Exception as error:
                raise _failure(rule, part, node, f"{type(error).__name__}: {error}") from error
            changed = changed or not (answer is None or refusal)
            # A plan whose root is an identity is also one for its operand, where it is reported.
            quiet = part.is_identity(node) and not isinstance(answer, Same)
            if refusal is not None and not quiet:
                part.notes[node][rule.name] = Skip(rule.name, part.where(node), refusal.reason)
            else:
                part.notes.get(node, {}).pop(rule.name, None)
            ahead += part.take_new_values()
        return changed

    # --- the answers of a pass -------------------------------------------------------------------

    def carry_out(self, rule: Pass, part: Part, node: fx.Node, answer: object) -> Refusal | None:
        """Carry out the answer of a pass about a node.

        Returns:
            The refusal of the pass or of the driver; None if there is none.

        Raises:
            PassError: the answer cannot be carried out.
        """
        about = answer.node if isinstance(answer, Fold | Joint | Drop | Same) else node
        if about is not node:
            what = f"it was asked about this node and answered for {about.name}"
            raise _failure(rule, part, node, what)
        match answer:
            case Refusal():
                return answer
            case Plan():
                return self.try_plan(rule, part, answer)
            case Joint():
                return self.try_joint(rule, part, answer)
            case Fold():
                self.fold(rule, part, answer)
            case Drop():
                self.drop(rule, part, answer)
            case Same():
                return self.try_same(rule, part, answer)
            case _:
                raise _failure(rule, part, node, f"its answer {answer!r} is none of {ANSWERS}")
        return None

    def try_plan(self, rule: Pass, part: Part, plan: Plan) -> Refusal | None:
        """Carry out a plan; if a layer is called more than once, with equal plans for all calls."""
        plans = part.waiting.gather(plan, part.shared_layers(plan))
        return plans if isinstance(plans, Refusal) else self.commit(rule, part, plans)

    def try_joint(self, rule: Pass, part: Part, joint: Joint) -> Refusal | None:
        """Carry out plans that pay together: all or none."""
        if any(part.shared_layers(plan) for plan in joint.plans):
            return Refusal("a layer that reads it is called more than once")
        ready = []
        for plan in joint.plans:
            layers = self.prepare(part, plan)
            if isinstance(layers, Refusal):
                return layers
            ready.append(layers)
        for plan, layers in zip(joint.plans, ready, strict=True):
            self.install(rule, part, [plan], *layers)
        part.editor.erase_tree(joint.node)
        return None

    def fold(self, rule: Pass, part: Part, fold: Fold) -> None:
        """Store the value of a constant expression, or inline it if it is no tensor."""
        location = part.where(fold.node)
        if isinstance(fold.value, Tensor):
            part.store(fold.node, fold.value, fold.expr)
        else:
            part.view.depends_on_content(fold.expr)
            part.editor.inline(fold.node, fold.value)
        self.rewrites.append(notes.folded(rule, location, fold))

    def drop(self, rule: Pass, part: Part, drop: Drop) -> None:
        """Erase a node without readers."""
        if drop.node.users or drop.node.op in ("placeholder", "output"):
            readers = ", ".join(user.name for user in drop.node.users) or "the caller"
            raise _failure(rule, part, drop.node, f"it cannot be dropped: {readers} reads it")
        location = part.where(drop.node)
        part.editor.erase(drop.node)
        self.rewrites.append(notes.removed(rule, location, drop.kind))

    def try_same(self, rule: Pass, part: Part, same: Same) -> Refusal | None:
        """Let the readers of a node read an earlier, equal value."""
        node, value = same.node, same.value
        if node.op == "output":
            raise _failure(rule, part, node, "the output of a graph has no equal")
        if value._erased or value.graph is not node.graph or not value < node:
            reason = f"the value {value.name} that is to be read instead is no earlier node"
            raise _failure(rule, part, node, reason)
        refusal = sharing.refusal(part.view, same)
        if refusal is not None:
            return refusal
        location, kind = part.where(node), notes.kind_of(part, node)
        part.editor.replace(node, value)
        part.editor.erase(node)
        self.rewrites.append(notes.removed(rule, location, kind))
        return None

    # --- from a plan to its layers ---------------------------------------------------------------

    def commit(self, rule: Pass, part: Part, plans: Sequence[Plan]) -> Refusal | None:
        """Carry out equal plans, which share their layers, if that is right and pays."""
        timing = measure.judge(plans, part.view, part.values) if self.settings.measures else None
        if isinstance(timing, Refusal):
            return timing
        ready = self.prepare(part, plans[0])
        if isinstance(ready, Refusal):
            return ready
        self.install(rule, part, plans, *ready, timing)
        return None

    def prepare(self, part: Part, plan: Plan) -> tuple[list[Layer], float | None] | Refusal:
        """The layers of a plan, and their error if they were validated."""
        layers = build(plan, part.view, part.originals())
        if isinstance(layers, Refusal):
            return layers
        error = None
        if self.settings.validate:
            error = validation.check(plan, layers, part.view, part.exact())
        return error if isinstance(error, Refusal) else (layers, error)

    def install(
        self, rule: Pass, part: Part, plans: Sequence[Plan], layers: Sequence[Layer],
        error: float | None, timing: Timing | None = None,
    ) -> None:  # fmt: skip
        """Put layers in place of equal plans, and report it."""
        plan = plans[0]
        before, root = notes.kinds(plan, part.view), where(plan.root)
        targets = part.carry_out(plans, layers)
        location = part.path(", ".join(targets) or root)
        self.rewrites.append(notes.planned(rule, location, plan, before, layers, error, timing))

    # --- the end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """Guard the assumptions, check the graphs, and remove modules that are no longer called.

        Raises:
            PassError: a graph is broken.
        """
        for part in self.parts:
            part.guard()
            part.lint()
            if part.program.is_root:
                prune(part.program)

    def report(self) -> Report:
        """The rewrites by pass, from the inputs to the outputs, and why other nodes stayed."""
        order = [rule.name for rule in self.settings.passes]
        rewrites = sorted(reversed(self.rewrites), key=lambda r: order.index(r.pass_name))
        skipped = [*self.captured.skipped]
        for part in self.parts:
            skipped += notes.skips(part, self.settings.passes)
        return Report(tuple(rewrites), tuple(dict.fromkeys(skipped)))


ANSWERS = ", ".join(getattr(each, "__name__", "None") for each in get_args(Answer))


def _failure(rule: Pass, part: Part, node: fx.Node, reason: str) -> PassError:
    place, text = part.where(node), node.format_node()
    return PassError(f"pass {rule.name!r} failed at node {place!r} ({text}): {reason}")
