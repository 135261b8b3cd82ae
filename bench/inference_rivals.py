"""What a pruned network is timed against: the same network, dense, in each engine that is there."""

import contextlib
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .timing import CLOCKS, Clock

WORKER = Path(__file__).with_name("deepsparse_worker.py")


class MissingError(Exception):
    """Why a rival cannot run here."""


@dataclass(frozen=True)
class Setting:
    """One network, its inputs [count, batch, 3, size, size], and how it runs."""

    model: nn.Module
    inputs: Tensor
    threads: int
    clock: Clock
    folder: Path
    deepsparse: str | None  # another interpreter


Run = Callable[[int], tuple[Tensor, float]]


@dataclass(frozen=True)
class Engine:
    """`run(i)` gives the output for input i and the seconds it took."""

    run: Run
    role: str = "rival"
    tolerance: float = 1e-3  # of the largest output


def timed(setting: Setting, call: Callable[[Any], Any], inputs: Any) -> Run:
    now = CLOCKS[setting.clock]

    def run(i: int) -> tuple[Tensor, float]:
        torch.set_num_threads(setting.threads)
        x = inputs[i]
        start = now()
        output = call(x)
        seconds = now() - start
        return torch.as_tensor(output), seconds

    return run


def onnx_file(setting: Setting) -> Path:
    """The dense network with its zeros as numbers, batch norms folded by the exporter."""
    path = setting.folder / f"batch{setting.inputs.shape[1]}.onnx"
    if not path.exists():
        options: dict[str, Any] = {
            "opset_version": 13,
            "dynamo": False,
        }  # DeepSparse reads no newer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.onnx.export(setting.model, (setting.inputs[0],), str(path), **options)
    return path


def onnx_runtime(setting: Setting) -> Engine:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError("onnxruntime is not installed") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(onnx_file(setting)), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    arrays = setting.inputs.numpy()
    return Engine(timed(setting, lambda x: session.run(None, {name: x})[0], arrays))


def openvino(setting: Setting, precision: str) -> Engine:
    try:
        import openvino as ov
    except ImportError as error:
        raise MissingError("openvino is not installed") from error
    core = ov.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise MissingError("this CPU has no bf16 instructions that OpenVINO uses")
    compiled = core.compile_model(
        core.read_model(str(onnx_file(setting))),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": setting.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
        },
    )
    request = compiled.create_infer_request()
    arrays = setting.inputs.numpy()
    tolerance = 1e-3 if precision == "f32" else 0.1
    role = "rival" if precision == "f32" else "16-bit rival"
    run = timed(setting, lambda x: request.infer([x])[0].copy(), arrays)
    return Engine(run, role, tolerance)


def torch_eager(setting: Setting) -> Engine:
    model = setting.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in setting.inputs]
    return Engine(timed(setting, model, inputs))


def torch_compiled(setting: Setting) -> Engine:
    """With freezing, which folds and prepacks the weights."""
    import torch._inductor.config as config

    model = setting.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in setting.inputs]
    torch.compiler.reset()
    with config.patch(freezing=True):
        function = torch.compile(model)
        try:
            function(inputs[0])
        except Exception as error:
            raise MissingError(f"torch.compile fails: {str(error).splitlines()[:1]}") from error
    return Engine(timed(setting, function, inputs))


@contextlib.contextmanager
def deepsparse(setting: Setting) -> Iterator[Engine]:
    """In its own process, since no Python has both it and this torch; it times itself."""
    if setting.deepsparse is None:
        raise MissingError("give --deepsparse-python, an interpreter with deepsparse 1.8")
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        inputs, output = Path(folder, "inputs.npy"), Path(folder, "output.npy")
        np.save(inputs, setting.inputs.numpy())
        arguments = [onnx_file(setting), inputs, output, setting.threads, setting.clock]
        command = [setting.deepsparse, str(WORKER), *map(str, arguments)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes) as worker:
            if not any(line.strip() == "ready" for line in answers(worker)):
                raise MissingError("deepsparse does not start in that interpreter")

            def run(i: int) -> tuple[Tensor, float]:
                assert worker.stdin is not None
                worker.stdin.write(f"{i}\n")
                worker.stdin.flush()
                seconds = float(next(answers(worker)))
                return torch.from_numpy(np.load(output)), seconds

            yield Engine(run, "sparse rival")


def answers(worker: "subprocess.Popen[str]") -> Iterator[str]:
    assert worker.stdout is not None
    yield from iter(worker.stdout.readline, "")


def always(make: Callable[[Setting], Engine]) -> Callable[[Setting], Any]:
    return lambda setting: contextlib.nullcontext(make(setting))


RIVALS: dict[str, Callable[[Setting], Any]] = {
    "ONNX Runtime": always(onnx_runtime),
    "OpenVINO": always(lambda setting: openvino(setting, "f32")),
    "OpenVINO bf16": always(lambda setting: openvino(setting, "bf16")),
    "torch eager": always(torch_eager),
    "torch.compile": always(torch_compiled),
    "DeepSparse": deepsparse,
}
