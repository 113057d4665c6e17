"""Every exception fxrep raises on purpose. Catch :class:`FxrepError` to catch them all.

A message says what is wrong, where (argument or module path), the value found, and how to fix it.
"""

from __future__ import annotations


class FxrepError(Exception):
    """Base of all errors raised by fxrep."""


class ModelError(FxrepError):
    """The model cannot be optimized as it is.

    It is no ``torch.nn.Module``, is a ScriptModule, is in training mode, holds lazy (not yet
    materialised), meta or fake parameters, or cannot be copied.
    """


class InputError(FxrepError):
    """``example_inputs`` is no tensor, tuple or dict, or the model does not run on it."""


class OptionError(FxrepError):
    """An option such as ``passes=`` or ``cost=`` has a value fxrep does not know."""


class PassError(FxrepError):
    """A pass raised, gave an answer that cannot be carried out, or left a broken graph.

    The message names the pass and the node; the exception of the pass is the ``__cause__``.
    """


class EquivalenceError(FxrepError):
    """The optimized model as a whole gives other results than the original on the inputs given."""


class SpecializationError(FxrepError):
    """The optimized forward was called with another value for an argument that is a constant.

    Tracing makes arguments that are not tensors (flags, ``None``, sizes) constants of the graph:
    another value needs its own call of :func:`fxrep.optimize`.
    """


class ReportError(FxrepError):
    """:func:`fxrep.report` was given a module that fxrep neither optimized nor compiled."""
