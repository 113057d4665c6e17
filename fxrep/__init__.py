"""fxrep: re-parameterize convolutional networks, exactly, for any nn.Module."""

from __future__ import annotations

from fxrep.errors import EquivalenceError as EquivalenceError
from fxrep.errors import FxrepError as FxrepError
from fxrep.errors import InputError as InputError
from fxrep.errors import ModelError as ModelError
from fxrep.errors import OptionError as OptionError
from fxrep.errors import PassError as PassError
from fxrep.errors import ReportError as ReportError
from fxrep.errors import SpecializationError as SpecializationError
from fxrep.ops.op import Op as Op
from fxrep.ops.spellings import register as register
from fxrep.ops.table import elementwise as elementwise
from fxrep.passes import default_passes as default_passes
from fxrep.pipeline import optimize as optimize
from fxrep.pipeline import report as report
from fxrep.planning.cost import CostModel as CostModel
from fxrep.planning.cost import Work as Work
from fxrep.planning.plan import Plan as Plan
from fxrep.planning.rule import Drop as Drop
from fxrep.planning.rule import Fold as Fold
from fxrep.planning.rule import Joint as Joint
from fxrep.planning.rule import Pass as Pass
from fxrep.planning.rule import Same as Same
from fxrep.reading.view import Affine as Affine
from fxrep.reading.view import View as View
from fxrep.refusal import Refusal as Refusal
from fxrep.registry import refresh as refresh
from fxrep.report import Report as Report
from fxrep.report import Rewrite as Rewrite
from fxrep.report import Skip as Skip

__version__ = "0.1.0"
