"""How wide the tests search: the profile of Hypothesis that was chosen."""

from __future__ import annotations

import os

IS_WIDE = os.environ.get("HYPOTHESIS_PROFILE") == "wide"
