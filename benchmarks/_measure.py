"""One model in all modes: each built, compared with float64, profiled, then all timed in turns."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from _comparison import short
from _counting import Counts, bytes_of, count, relative_error
from _modes import CONVERSIONS, EXECUTIONS, Absent, Call, Mode
from _profiling import Profile, profiled
from _roofline import Rates, percent
from _subject import Setting, batch_of, example, placed, precision, shapes
from _timing import Effort, Spread, interleaved
from torch import Tensor, nn
from torch._inductor.cudagraph_trees import reset_cudagraph_trees
from torch.utils._pytree import tree_leaves, tree_map_only

from fxrep.cli.models import Example

# A mode is equal when its largest error, relative to the float64 result, is at most this or at most
# `SLACK` times that of eager: rounding differs with the order of operations, but not in kind.
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 4e-2}
SLACK = 3.0


@dataclass(frozen=True)
class Row:
    """A model in a mode.

    Attributes:
        model: its name.
        batch: images.
        input: shapes.
        mode: the name of the mode.
        ours: whether fxrep has a part in it.
        reason: why it was not timed; None if it was.
        equal: whether the result is that of float64; None if there is no result.
        error: largest difference from float64 over the largest value.
        time: quartiles of seconds a forward.
        counts: work of the layers it runs.
        parameters: elements of their weights.
        convs: convolutions run, as profiled; None for engines.
        kernels: kernels run, likewise.
        peak: bytes held at the peak of a forward, weights included; None for engines and for CUDA
            graphs, whose memory is a pool of their own.
        convert_seconds: the conversion took.
        build_seconds: compilation and warm-up took.
    """

    model: str
    batch: int
    input: str
    mode: str
    ours: bool
    reason: str | None = None
    equal: bool | None = None
    error: float | None = None
    time: Spread | None = None
    counts: Counts | None = None
    parameters: int | None = None
    convs: int | None = None
    kernels: int | None = None
    peak: int | None = None
    convert_seconds: float | None = None
    build_seconds: float | None = None


@dataclass(frozen=True)
class Converted:
    """What a conversion made, or why it made nothing."""

    module: nn.Module | None
    counts: Counts | None = None
    parameters: int | None = None
    seconds: float | None = None
    reason: str | None = None


def measure(
    name: str,
    setting: Setting,
    modes: Sequence[Mode],
    effort: Effort,
    progress: Callable[[str, int], Any] = lambda doing, steps: None,
) -> list[Row]:
    """Measure one model; whatever fails is a row that says why.

    Args:
        name: of the model, for `example`.
        setting: device, precision and input.
        modes: to be measured; eager must be among them.
        effort: how long to measure.
        progress: called with what was done and how many of `steps(modes, effort)` that was.

    Raises:
        FxrepError: there is no such model.
    """
    _fresh(setting.device)
    with precision(setting.dtype), _stream(setting.device), _limits(len(modes)), torch.no_grad():
        given = placed(example(name, setting.size, setting.batch), setting)
        blank = Row(name, batch_of(given.inputs), shapes(given.inputs), "", False)
        rows = {m.name: replace(blank, mode=m.name, ours=m.ours) for m in modes}
        try:
            reference = _reference(given)
            rounding = relative_error(_eager(given), reference)
        except Exception as error:
            return [replace(row, reason=f"eager: {short(error)}") for row in rows.values()]
        if not math.isfinite(rounding):
            reason = f"eager is not finite in {setting.dtype}: nothing to compare with"
            return [replace(row, reason=reason) for row in rows.values()]
        converted = {key: _convert(key, given) for key in {m.conversion for m in modes}}
        needed = {m.runs for m in modes} - converted.keys()
        converted |= {key: _convert(key, given) for key in needed}
        allowed = max(TOLERANCE[setting.dtype], SLACK * rounding)
        calls: dict[str, Call] = {}
        for mode in modes:
            progress(f"{name}, batch {blank.batch}: {mode.name}", 0)
            row, call = _build(mode, rows[mode.name], converted, given, reference, allowed)
            rows[mode.name] = row
            if call is not None:
                calls[mode.name] = call
            progress(f"{name}, batch {blank.batch}", 1 if call else 1 + effort.rounds)
        del converted, reference
        times = interleaved(
            calls, setting.device, effort, lambda: progress(f"{name}, batch {blank.batch}", 1)
        )
    return [replace(row, time=times.get(row.mode)) for row in rows.values()]


def steps(modes: Sequence[Mode], effort: Effort) -> int:
    """How many steps of progress `measure` reports."""
    return len(modes) * (1 + effort.rounds)


def _fresh(device: torch.device) -> None:
    """Forget what the model before left: compiled code, CUDA graphs, memory."""
    torch._dynamo.reset()
    if device.type == "cuda":
        reset_cudagraph_trees()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A stream of its own on CUDA: engines treat the default stream as "none given"."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def _limits(modes: int) -> contextlib.AbstractContextManager[Any]:
    """Dynamo's limits for each mode, as if it were alone: it counts all code of one function."""
    config = torch._dynamo.config
    return config.patch(
        recompile_limit=modes * config.recompile_limit,
        accumulated_recompile_limit=modes * config.accumulated_recompile_limit,
    )


def _reference(given: Example) -> Any:
    """What the model, with its weights as they are, gives in float64.

    Raises:
        ValueError: nothing that could be compared.
    """
    exact = copy.deepcopy(given.model).double()
    result = exact(*tree_map_only(Tensor, _double, given.inputs))
    if not any(isinstance(x, Tensor) for x in tree_leaves(result)):
        raise ValueError(f"its result, {type(result).__name__}, holds no tensor to compare")
    return result


def _eager(given: Example) -> Any:
    """What the model gives as it is.

    Raises:
        ValueError: it writes to its inputs, which the modes share.
    """
    inputs = [x for x in tree_leaves(given.inputs) if isinstance(x, Tensor)]
    versions = [x._version for x in inputs]
    result = given.model(*given.inputs)
    if versions != [x._version for x in inputs]:
        raise ValueError("it writes to its inputs: wrap it in a module that clones them")
    return result


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _convert(key: str, given: Example) -> Converted:
    start = time.perf_counter()
    try:
        module = CONVERSIONS[key](given.model, given.inputs).eval()
        seconds = time.perf_counter() - start
        module(*given.inputs)  # a first call may fill caches (LeViT)
        counts = count(lambda: module(*given.inputs))
    except Absent as absent:
        return Converted(None, reason=str(absent))
    except Exception as error:
        return Converted(None, reason=f"{key}: {short(error)}")
    return Converted(module, counts, sum(p.numel() for p in module.parameters()), seconds)


def _build(
    mode: Mode,
    row: Row,
    converted: dict[str, Converted],
    given: Example,
    reference: Any,
    allowed: float,
) -> tuple[Row, Call | None]:
    """The row without a time, and what to time if that makes sense."""
    device = next(x.device for x in tree_leaves(given.inputs) if isinstance(x, Tensor))
    if reason := mode.missing(device):
        return replace(row, reason=reason), None
    source, runs = converted[mode.conversion], converted[mode.runs]
    if source.module is None:
        return replace(row, reason=source.reason), None
    held = _held(device)
    start = time.perf_counter()
    try:
        module = copy.deepcopy(source.module)
        call = EXECUTIONS[mode.execution](module, given.inputs)
        out = call()
        built = time.perf_counter() - start
        error = relative_error(out, reference)
        del out
        seen = None if mode.engine else profiled(call, device)
    except Absent as absent:
        return replace(row, reason=str(absent)), None
    except Exception as error:
        return replace(row, reason=short(error)), None
    pooled = "cudagraphs" in mode.execution
    peak = None if seen is None or pooled else _peak(seen, module, device, held)
    row = replace(
        row,
        equal=error <= allowed,
        error=error,
        counts=runs.counts,
        parameters=runs.parameters,
        convs=None if seen is None else seen.convs,
        kernels=None if seen is None else seen.kernels,
        peak=peak,
        convert_seconds=source.seconds,
        build_seconds=built,
    )
    if not row.equal:
        return replace(row, reason=f"not equal: error {error:.1e}, allowed {allowed:.1e}"), None
    return row, call


def _held(device: torch.device) -> int:
    """Bytes allocated before a mode is built, without the workspaces that CUDA graphs free."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated(device)


def _peak(seen: Profile, module: nn.Module, device: torch.device, held: int) -> int:
    """Bytes at the peak of a forward of this mode alone.

    On CUDA all that was allocated since before it was built; on a CPU, whose allocator keeps no
    books, the weights of its module and what the forward allocates.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - held
    return bytes_of(module) + seen.working


def finished(rows: Sequence[Row], rates: Rates) -> list[dict[str, Any]]:
    """The rows of one model as dictionaries, with what follows from comparing them.

    Args:
        rows: of one model at one batch, as `measure` gives them.
        rates: of the device.

    Returns:
        Dictionaries ready for JSON; times are in milliseconds.
    """
    times = {row.mode: row.time.median for row in rows if row.time}
    eager = times.get("eager")
    best_peer = min((row.time.median for row in rows if row.time and not row.ours), default=None)
    done = []
    for row in rows:
        cells = asdict(row) | {"counts": row.counts and asdict(row.counts)}
        del cells["time"]
        if row.error is not None and not math.isfinite(row.error):
            cells["error"] = None  # JSON has no NaN; the reason says it
        if row.time:
            median = row.time.median
            cells |= {
                "ms": median * 1e3,
                "ms_low": row.time.low * 1e3,
                "ms_high": row.time.high * 1e3,
                "images_per_s": row.batch / median,
                "over_eager": eager and eager / median,
                "over_best_peer": best_peer and best_peer / median,
            }
            if row.counts:
                work = row.counts.macs, row.counts.traffic
                cells["roofline_percent"] = percent(*work, rates, median)
        done.append(cells)
    return done
