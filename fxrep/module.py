"""Names in pickles of modules that were made before fxrep had folders."""

from __future__ import annotations

from fxrep.capture.graph_forward import GraphForward as GraphForward
from fxrep.capture.records import _NodeName as _NodeName
from fxrep.capture.records import _NodeRecord as _NodeRecord
from fxrep.capture.records import _TorchName as _TorchName
from fxrep.capture.rewritten import RewrittenModule as RewrittenModule
from fxrep.capture.rewritten import _empty as _empty
