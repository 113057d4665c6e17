"""Names in pickles of modules that were made before fxrep had folders."""

from __future__ import annotations

from fxrep.capture.assemble import GraphForward as GraphForward
from fxrep.capture.assemble import RewrittenModule as RewrittenModule
from fxrep.capture.assemble import _empty as _empty
from fxrep.capture.assemble import _NodeName as _NodeName
from fxrep.capture.assemble import _NodeRecord as _NodeRecord
from fxrep.capture.assemble import _TorchName as _TorchName
