"""Where pickles made before fxrep had folders look for the arguments of a forward."""

from __future__ import annotations

from fxrep.capture.signature import _arguments as _arguments
