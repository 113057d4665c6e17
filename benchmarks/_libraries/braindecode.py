"""braindecode: networks for electroencephalograms."""

from __future__ import annotations

from functools import partial
from typing import Any

from _libraries.case import Case, Library, named, noise

_CHANNELS, _RATE, _SECONDS = 8, 128, 4


def _net(name: str, **options: Any) -> Case:
    times = _RATE * _SECONDS
    given: dict[str, Any] = {"n_chans": _CHANNELS, "n_outputs": 3, "n_times": times, "sfreq": _RATE}
    model = named(f"braindecode.models.{name}")(**(given | options))
    # Their last layers are made for one length: another batch is all that may change.
    return Case(model, (noise(1, _CHANNELS, times),), (noise(3, _CHANNELS, times),))


LIBRARY = Library(
    "braindecode",
    {
        name: partial(_net, name)
        for name in (
            "ATCNet", "CTNet", "Deep4Net", "EEGConformer", "EEGInceptionERP", "EEGInceptionMI",
            "EEGITNet", "EEGNet", "EEGNeX", "EEGSimpleConv", "EEGTCNet", "FBCNet", "IFNet",
            "SCCNet", "ShallowFBCSPNet", "SPARCNet", "TIDNet", "TSception", "MSVTNet",
            "AttentionBaseNet", "BDTCN", "ContraWR", "FBMSNet",
        )
    },
)  # fmt: skip
