"""Names in pickles of arguments that were made before fxrep had folders."""

from __future__ import annotations

from fxrep.capture.signature import _arguments as _arguments
