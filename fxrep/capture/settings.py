"""The settings of the process that a forward may set: recorded, compared, and put back.

Not all that there are: what Python's library registers for good (exit functions, types of files),
signals and files are left to the user.
"""

from __future__ import annotations

import decimal
import gc
import locale
import logging
import os
import sys
from collections.abc import Iterator
from functools import partial
from logging import Logger
from typing import Any

import torch

from fxrep.capture.kept import Items, Kept, Names, Setting


def process() -> list[Kept]:
    """The settings that change what code computes, prints or costs."""
    return [*_of_torch(), *_of_numpy(), *_of_python()]


def default_device() -> torch.device | None:
    """The device of ``torch.set_default_device``, if any."""
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _set_cudnn(enabled: bool, benchmark: bool, deterministic: bool, allow_tf32: bool) -> None:
    torch.backends.cudnn.set_flags(  # type: ignore[no-untyped-call]
        _enabled=enabled,
        _benchmark=benchmark,
        _deterministic=deterministic,
        _allow_tf32=allow_tf32,
    )


def _of_torch() -> list[Kept]:
    cudnn, options = torch.backends.cudnn, torch._tensor_str.PRINT_OPTS
    return [
        Setting("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
        Setting(
            "the choice of deterministic algorithms",
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda saved: torch.use_deterministic_algorithms(saved[0], warn_only=saved[1]),
        ),
        Setting(
            "the precision of matrix products",
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
        Setting(
            "settings of cuDNN",
            lambda: (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
            lambda saved: _set_cudnn(*saved),
        ),
        Setting(
            "the detection of anomalies",
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda saved: torch.set_anomaly_enabled(*saved),
        ),
        Setting("the default device", default_device, torch.set_default_device),
        Setting("the number of threads", torch.get_num_threads, torch.set_num_threads),
        Setting(
            "options of printing",
            lambda: tuple(vars(options).values()),
            lambda saved: vars(options).update(zip(vars(options), saved, strict=True)),
        ),
    ]


def _of_numpy() -> Iterator[Kept]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return

    def read() -> tuple[Any, ...]:
        return numpy.geterr(), numpy.geterrcall(), numpy.getbufsize()

    def write(saved: tuple[Any, ...]) -> None:
        numpy.seterr(**saved[0])
        numpy.seterrcall(saved[1])
        numpy.setbufsize(saved[2])

    yield Setting("NumPy's errors", read, write)
    yield Setting(
        "NumPy's options of printing",
        numpy.get_printoptions,
        lambda saved: numpy.set_printoptions(**saved),
    )


def _of_python() -> Iterator[Kept]:
    yield Setting("the limit of recursion", sys.getrecursionlimit, sys.setrecursionlimit)
    yield Setting("the interval of threads", sys.getswitchinterval, sys.setswitchinterval)
    yield Setting("the collection of garbage", _collection, _set_collection)
    yield Setting("the working directory", _directory, _set_directory)
    yield Setting(
        "the locale",
        lambda: locale.setlocale(locale.LC_ALL),
        lambda saved: locale.setlocale(locale.LC_ALL, saved),
    )
    # A trace runs in a copy of the context, which has the same object.
    decimals = decimal.getcontext()
    yield Setting(
        "the precision of decimals", lambda: decimals.prec, partial(setattr, decimals, "prec")
    )
    yield _Logging()
    yield Names(vars(sys), ("stdin", "stdout", "stderr", "excepthook", "displayhook"))
    arguments = Items(sys.argv)
    arguments.what = "the arguments of the program"
    yield arguments


def _collection() -> tuple[Any, ...]:
    return gc.isenabled(), gc.get_threshold()


def _set_collection(saved: tuple[Any, ...]) -> None:
    (gc.enable if saved[0] else gc.disable)()
    gc.set_threshold(*saved[1])


def _directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _set_directory(saved: str | None) -> None:
    if saved is not None:
        os.chdir(saved)


class _Logging:
    """The levels and handlers of all loggers: there are hundreds."""

    what = "the logging"

    def __init__(self) -> None:
        found = logging.root.manager.loggerDict.values()
        self.loggers = [logging.root, *(each for each in found if isinstance(each, Logger))]
        self.saved = self._read()

    def _read(self) -> list[Any]:
        return [
            logging.root.manager.disable,
            [each.level for each in self.loggers],
            [[*each.handlers] for each in self.loggers],
            [each.disabled for each in self.loggers],
            [each.propagate for each in self.loggers],
        ]

    def changed(self) -> bool:
        """Whether a level or a handler is another."""
        return self._read() != self.saved

    def restore(self) -> None:
        """Set what they were."""
        logging.disable(self.saved[0])
        for each, level, handlers, disabled, propagate in zip(
            self.loggers, *self.saved[1:], strict=True
        ):
            if each.level != level:
                each.setLevel(level)
            each.handlers[:] = handlers
            each.disabled, each.propagate = disabled, propagate
