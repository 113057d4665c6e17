"""The state of one graph while it is rewritten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, fx

from fxrep.algebra.recipe import Call, record
from fxrep.analysis import aliasing
from fxrep.analysis.channels import Channels
from fxrep.analysis.dtypes import Dtypes
from fxrep.analysis.memory import Write
from fxrep.analysis.ranks import Ranks
from fxrep.analysis.values import Values
from fxrep.capture.islands import Program
from fxrep.errors import PassError
from fxrep.ops.calls import Calls
from fxrep.planning.plan import Plan
from fxrep.planning.walk import where
from fxrep.reading.reader import read
from fxrep.reading.view import View, double
from fxrep.report import Skip
from fxrep.rewriting.editor import Editor
from fxrep.rewriting.layers import Layer, Lookup
from fxrep.rewriting.naming import names_of
from fxrep.rewriting.waiting import Waiting


@dataclass(eq=False)
class Part:
    """One graph of the model while it is rewritten: the facts known of it, and its editor.

    Attributes:
        program: the graph and its module; the editor alone changes the graph.
        values: the values of the graph, as far as example inputs tell.
        outside: the tensors that code outside the graph may write.
        waiting: plans for layers that are called more than once.
        notes: why a node stayed as it is, by the name of the pass that declined it.
        new_values: values that took the place of others and that the pass has not seen yet.
        weight_users: the nodes that use a layer's weight, by the identity of the weight's owner: a
            module called twice, or a parameter that two modules share, is one weight with two
            users. Layers that fxrep makes are not counted.
    """

    program: Program
    values: Values
    outside: Sequence[Write] = ()
    waiting: Waiting = field(default_factory=Waiting)
    notes: dict[fx.Node, dict[str, Skip]] = field(default_factory=lambda: defaultdict(dict))
    new_values: list[fx.Node] = field(default_factory=list)
    weight_users: dict[int, set[fx.Node]] = field(default_factory=lambda: defaultdict(set))

    @property
    def calls(self) -> Calls:
        """The operators that the nodes of the graph call."""
        return self.program.calls

    @cached_property
    def editor(self) -> Editor:
        """The editor, which makes all changes of the graph."""
        graph, module = self.program.graph, self.program.module
        return Editor(graph, module, names_of(graph, module))

    @cached_property
    def view(self) -> View:
        """The facts known of the graph: analysed at the first use, then kept up to date."""
        graph, calls = self.program.graph, self.calls
        memory = aliasing.analyse(graph, calls, self.outside)
        ranks = Ranks(graph, calls, self.values.ranks, self.program.ranks)
        channels = Channels(graph, calls, ranks.assume_for_later)
        dtypes = Dtypes(graph, calls, {**self.values.dtypes, **self.program.dtypes})
        view = View(graph, calls, read, memory, ranks, channels, dtypes)
        self.editor.listeners.append(view)
        return view

    # --- questions -------------------------------------------------------------------------------

    def where(self, node: fx.Node) -> str:
        """The path of a node's module in the user's model."""
        return self.path(where(node))

    def path(self, name: str) -> str:
        """A path below the program's module as a path in the user's model."""
        return ".".join(each for each in (self.program.path, name) if each)

    def is_identity(self, node: fx.Node) -> bool:
        """Whether a node returns its operand, at most in another shape or memory."""
        reading = self.view.affine(node)
        return reading is not None and reading.is_identity

    def is_layer(self, node: fx.Node) -> bool:
        """Whether a node is a convolution or linear layer."""
        reading = self.view.affine(node)
        return reading is not None and reading.is_layer

    def shared_layers(self, plan: Plan) -> dict[fx.Node, set[fx.Node]]:
        """Layers of a plan's region whose weight has users outside the region, with all users.

        Users in other graphs do not count: they keep the layer, and this graph gets a new one.
        """
        shared = {}
        for node in plan.region:
            reading = self.view.affine(node)
            if reading is not None and reading.weight is not None:
                users = {n for n in self.weight_users[id(reading.owner)] if not n._erased}
                if not users <= set(plan.region):
                    shared[node] = users
        return shared

    def originals(self) -> Lookup:
        """A lookup of the user's tensors and of constants in float64, by path."""
        return _remembered(lambda path: double(self.view.originals[path]))

    def exact(self) -> Lookup:
        """A lookup of all tensors in float64, by path; weights that fxrep made are computed anew.

        A constant is what the model computes in its own dtype, and only then widened.
        """
        return _remembered(self._exact)

    def _exact(self, path: str) -> Tensor:
        view = self.view
        if path in view.derived:
            value: Tensor = record(view.derived[path]).run(lambda p: double(view.originals[p]))
            return value
        return double(view.originals[path] if path in view.computed else view.tensor(path))

    # --- changes ---------------------------------------------------------------------------------

    def count_weights(self) -> None:
        """Note which nodes use which weight."""
        for node in self.program.graph.nodes:
            reading = self.view.affine(node)
            if reading is not None and reading.weight is not None:
                self.weight_users[id(reading.owner)].add(node)

    def carry_out(self, plans: Sequence[Plan], layers: Sequence[Layer]) -> list[str]:
        """Put new layers in place of the regions of equal plans, which share them.

        Returns:
            The paths of the layers below the program's module.
        """
        view = self.view
        targets = self.editor.names.paths_for(plans, layers)
        for target, layer in zip(targets, layers, strict=True):
            self.editor.install(target, layer.module)
            for name, expr in zip(("weight", "bias"), layer.exprs, strict=True):
                if expr is not None:
                    view.derived[f"{target}.{name}"] = expr
        for plan in plans:
            view.ranks.use_deferred_assumptions()
            for value in plan.assumes_batched:
                view.ranks.use_assumption(value)
            self.new_values.append(self.editor.carry_out(plan, targets))
        return targets

    def store(self, node: fx.Node, value: Tensor, expr: Call) -> None:
        """Store the value of a constant expression in place of its computation."""
        sources = [self.view.originals[path] for path in self.view.sources(expr)]
        path, stored = self.editor.store(node, value)
        self.view.computed[path] = expr
        if any(source.requires_grad for source in sources):
            self.view.trained.add(id(stored))

    def take_new_values(self) -> list[fx.Node]:
        """The values that took the place of others since the last call."""
        values, self.new_values = self.new_values, []
        return values

    def guard(self) -> None:
        """Make the graph raise at ranks other than those that its rewrites assume."""
        for node, rank in self.view.ranks.guards():
            self.editor.guard(node, rank)

    def lint(self) -> None:
        """Make sure that the graph is well formed and that its targets exist.

        Raises:
            PassError: it is not; a pass must have changed it without the editor.
        """
        graph, module = self.program.graph, self.program.module
        try:
            graph.lint()
            for node in graph.nodes:
                if node.op == "call_module":
                    module.get_submodule(str(node.target))
                elif node.op == "get_attr":
                    owner, _, name = str(node.target).rpartition(".")
                    getattr(module.get_submodule(owner), name)
        except Exception as error:
            name = self.program.path or "the model"
            raise PassError(
                f"the graph of {name} is broken ({type(error).__name__}: {error}): a pass changed "
                "it by itself; passes= finds which one"
            ) from error


def _remembered(function: Callable[[str], Tensor]) -> Lookup:
    known: dict[str, Tensor] = {}

    def lookup(path: str) -> Tensor:
        if path not in known:
            known[path] = function(path)
        return known[path]

    return lookup
