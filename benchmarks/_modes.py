"""Ways to run a model for inference, side by side: a conversion, then an execution.

A conversion makes a module of a module (nothing, torch.fx's fuse, the authors' converter, fxrep),
an execution makes a call of a module and its inputs (eager, Inductor, an engine). To add a way, add
a line to `MODES`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx.experimental.optimization import fuse as torch_fuse
from torch.utils._pytree import tree_leaves

import fxrep
from fxrep.errors import OptionError
from fxrep.torch_compile.backend import compile_graph

Inputs = tuple[Any, ...]
Call = Callable[[], Any]

WARM_UP = 3  # calls; CUDA graphs warm up, record, and only then replay


class Absent(Exception):
    """A mode that does not exist for this model or on this machine, and why."""


@dataclass(frozen=True)
class Mode:
    """One way to run a model.

    Attributes:
        name: in tables and for `--modes`.
        conversion: a key of `CONVERSIONS`.
        execution: a key of `EXECUTIONS`.
        devices: the types of device it runs on.
        needs: packages that must be importable.
    """

    name: str
    conversion: str
    execution: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether fxrep has a part in it."""
        return self.runs.startswith("fxrep")

    @property
    def runs(self) -> str:
        """The conversion whose layers it runs: the backend converts on its own."""
        return "fxrep" if self.execution.startswith("backend") else self.conversion

    @property
    def engine(self) -> bool:
        """Whether it runs outside torch, where torch's profiler sees nothing."""
        return bool(self.needs)

    @property
    def missing_packages(self) -> list[str]:
        """Those it needs that are not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run on this machine, or None."""
        if device.type not in self.devices:
            return f"not on {device.type}"
        lacking = self.missing_packages
        return f"{', '.join(lacking)} not installed" if lacking else None


# --- conversions: module and inputs -> module ---------------------------------------------------


def _nothing(model: nn.Module, _: Inputs) -> nn.Module:
    return model


def _fused(model: nn.Module, _: Inputs) -> nn.Module:
    return torch_fuse(model)


def _author(model: nn.Module, _: Inputs) -> nn.Module:
    """The converter that the authors of a timm model, or of one like it, wrote for it."""
    names = ("fuse", "reparameterize", "switch_to_deploy")
    if not any(hasattr(module, name) for module in model.modules() for name in names):
        raise Absent("no converter")
    try:
        from timm.utils.model import reparameterize_model
    except ImportError as error:
        raise Absent(f"timm, which calls the converter, does not import: {error}") from error
    converted: nn.Module = reparameterize_model(model)
    return converted


def _fxrep(model: nn.Module, _: Inputs) -> nn.Module:
    return fxrep.optimize(model)


def _measured(model: nn.Module, inputs: Inputs) -> nn.Module:
    """What is in doubt decided by the clock, as eager runs it."""
    return fxrep.optimize(model, inputs, cost="measure")


CONVERSIONS: dict[str, Callable[[nn.Module, Inputs], nn.Module]] = {
    "none": _nothing,
    "fx-fuse": _fused,
    "author": _author,
    "fxrep": _fxrep,
    "fxrep-measured": _measured,
}


# --- executions: module and inputs -> call ------------------------------------------------------


def _eager(model: nn.Module, inputs: Inputs) -> Call:
    return lambda: model(*inputs)


def _inductor(model: nn.Module, inputs: Inputs) -> Call:
    return _compiled(inputs, lambda: torch.compile(model, dynamic=False))


def _freezing(model: nn.Module, inputs: Inputs) -> Call:
    # Dynamo reads the global setting only; the option keeps its code apart from the unfrozen.
    with torch._inductor.config.patch(freezing=True):
        return _compiled(
            inputs, lambda: torch.compile(model, dynamic=False, options={"freezing": True})
        )


def _cudagraphs(model: nn.Module, inputs: Inputs) -> Call:
    return _compiled(inputs, lambda: torch.compile(model, dynamic=False, mode="reduce-overhead"))


def _backend(**options: Any) -> Callable[[nn.Module, Inputs], Call]:
    """`torch.compile(backend="fxrep")`, by its function: a clone need not be installed."""

    def run(model: nn.Module, inputs: Inputs) -> Call:
        return _compiled(
            inputs,
            lambda: torch.compile(
                model, dynamic=False, backend=compile_graph, options=options or None
            ),
        )

    return run


def _compiled(inputs: Inputs, compile_model: Callable[[], Callable[..., Any]]) -> Call:
    """Compile and warm up.

    Raises:
        RuntimeError: dynamo had nothing to compile, or took another mode's code for it.
    """
    before = counters["stats"]["unique_graphs"]
    compiled = compile_model()
    for _ in range(WARM_UP):
        compiled(*inputs)
    if counters["stats"]["unique_graphs"] == before:
        raise RuntimeError("dynamo compiled nothing anew")
    return lambda: compiled(*inputs)


_ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}


def _onnx(model: nn.Module, inputs: Inputs) -> bytes:
    """The model as ONNX, exported on the CPU."""
    if not all(isinstance(x, Tensor) for x in inputs):
        raise Absent("exported for tensors as inputs only")
    given = tuple(x.cpu().contiguous() for x in inputs)
    exported = torch.onnx.export(
        model.cpu().to(memory_format=torch.contiguous_format), given, dynamo=True, verbose=False
    )
    assert exported is not None
    proto: bytes = exported.model_proto.SerializeToString()
    return proto


def _onnxruntime(model: nn.Module, inputs: Inputs) -> Call:
    import onnxruntime as ort

    device = _device(inputs)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    if device.type == "cpu":
        options.intra_op_num_threads = torch.get_num_threads()
        providers: list[Any] = ["CPUExecutionProvider"]
    else:
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise Absent("this onnxruntime has no CUDA (python -m pip install onnxruntime-gpu)")
        cuda = {
            "device_id": device.index or 0,
            # Torch's own stream, which is what the timer's events are recorded in.
            "user_compute_stream": str(torch.cuda.current_stream(device).cuda_stream),
            "use_tf32": int(torch.backends.cudnn.allow_tf32),
        }
        providers = [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
    results = [torch.empty_like(x).contiguous() for x in tree_leaves(model(*inputs))]
    session = ort.InferenceSession(_onnx(model, inputs), options, providers=providers)
    given = [x.contiguous() for x in inputs]
    binding = session.io_binding()
    for bind, names, tensors in (
        (binding.bind_input, session.get_inputs(), given),
        (binding.bind_output, session.get_outputs(), results),
    ):
        for named, x in zip(names, tensors, strict=True):
            kind, shape = _ONNX_TYPES[x.dtype], tuple(x.shape)
            bind(named.name, device.type, device.index or 0, kind, shape, x.data_ptr())

    def call() -> list[Tensor]:
        session.run_with_iobinding(binding)
        return results

    return _keeping(call, given)


def _openvino(model: nn.Module, inputs: Inputs) -> Call:
    import openvino as ov

    if inputs[0].dtype is not torch.float32:
        raise Absent("measured in fp32 only: its tensors are NumPy's, which has no bf16")
    core = ov.Core()
    compiled = core.compile_model(
        core.read_model(_onnx(model, inputs)),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",  # it would choose bf16 where the CPU has it
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    given = [x.contiguous() for x in inputs]
    for index, x in enumerate(given):
        request.set_input_tensor(index, ov.Tensor(x.numpy(), shared_memory=True))

    def call() -> list[Tensor]:
        request.infer()
        return [torch.from_numpy(tensor.data) for tensor in request.output_tensors]

    return _keeping(call, given)


def _keeping(call: Call, alive: list[Tensor]) -> Call:
    """The same call, for as long as which the tensors live whose memory an engine shares."""
    return lambda alive=alive: call()


def _tensorrt(model: nn.Module, inputs: Inputs) -> Call:
    import torch_tensorrt

    dtype = inputs[0].dtype
    compiled = torch_tensorrt.compile(
        model,
        ir="dynamo",
        inputs=list(inputs),
        enabled_precisions={dtype},
        disable_tf32=not torch.backends.cudnn.allow_tf32,
        min_block_size=1,
    )
    for _ in range(WARM_UP):
        compiled(*inputs)
    return lambda: compiled(*inputs)


def _device(inputs: Inputs) -> torch.device:
    return next(x.device for x in tree_leaves(inputs) if isinstance(x, Tensor))


EXECUTIONS: dict[str, Callable[[nn.Module, Inputs], Call]] = {
    "eager": _eager,
    "inductor": _inductor,
    "freezing": _freezing,
    "cudagraphs": _cudagraphs,
    "backend": _backend(),
    "backend-freezing": _backend(freezing=True),
    "backend-cudagraphs": _backend(mode="reduce-overhead"),
    "backend-freezing-cudagraphs": _backend(mode="reduce-overhead", freezing=True),
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt": _tensorrt,
}

_CPU, _CUDA = ("cpu",), ("cuda",)
_ORT, _OV, _TRT = ("onnxruntime", "onnxscript"), ("openvino", "onnxscript"), ("torch_tensorrt",)

MODES: tuple[Mode, ...] = (
    Mode("eager", "none", "eager"),
    Mode("fx-fuse", "fx-fuse", "eager"),
    Mode("author", "author", "eager"),
    Mode("fxrep", "fxrep", "eager"),
    Mode("fxrep-measured", "fxrep-measured", "eager"),
    Mode("inductor", "none", "inductor"),
    Mode("inductor-freezing", "none", "freezing"),
    Mode("author+inductor-freezing", "author", "freezing"),
    Mode("fxrep+inductor", "fxrep", "inductor"),
    Mode("fxrep+inductor-freezing", "fxrep", "freezing"),
    Mode("backend-fxrep", "none", "backend"),
    Mode("backend-fxrep-freezing", "none", "backend-freezing"),
    Mode("inductor-cudagraphs", "none", "cudagraphs", _CUDA),
    Mode("fxrep+inductor-cudagraphs", "fxrep", "cudagraphs", _CUDA),
    Mode("backend-fxrep-cudagraphs", "none", "backend-cudagraphs", _CUDA),
    Mode("backend-fxrep-freezing-cudagraphs", "none", "backend-freezing-cudagraphs", _CUDA),
    Mode("onnxruntime", "none", "onnxruntime", needs=_ORT),
    Mode("fxrep+onnxruntime", "fxrep", "onnxruntime", needs=_ORT),
    Mode("openvino", "none", "openvino", _CPU, _OV),
    Mode("fxrep+openvino", "fxrep", "openvino", _CPU, _OV),
    Mode("tensorrt", "none", "tensorrt", _CUDA, _TRT),
    Mode("fxrep+tensorrt", "fxrep", "tensorrt", _CUDA, _TRT),
)


def chosen(names: list[str] | None, device: torch.device) -> tuple[Mode, ...]:
    """The modes with these names, or all that can run on this machine.

    Raises:
        OptionError: there is no mode of that name.
    """
    if names is None:
        return tuple(mode for mode in MODES if mode.missing(device) is None)
    known = {mode.name: mode for mode in MODES}
    for name in names:
        if name not in known:
            raise OptionError(
                f"--modes {name}: there is no such mode; there are {', '.join(known)}"
            )
    wanted = {"eager", *names}  # what every speed-up is over
    return tuple(mode for mode in MODES if mode.name in wanted)
