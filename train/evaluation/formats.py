"""Files of a graph: torch.export (.pt2) and ONNX, and how far their answers are from the model's."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from train.engine.errors import UsageError
from train.evaluation.graph import Answers, Graph
from train.evaluation.graph_samples import Sample

Format = Literal["onnx", "pt2"]
FORMATS: tuple[Format, ...] = ("onnx", "pt2")
FILES: dict[Format, str] = {"onnx": "model.onnx", "pt2": "model.pt2"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Largest difference of an answer, as a share of the largest one of its output or of 1. Seen: 2e-6 and less.
TOLERANCE = 1e-4


def check_packages(formats: tuple[Format, ...]) -> None:
    """Refuse formats whose packages are missing.

    Raises:
        UsageError: names them.
    """
    missing = [name for name in ONNX_PACKAGES if "onnx" in formats and importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format onnx: needs {', '.join(missing)}: pip install {' '.join(missing)}; or leave it out with "
            "--format pt2"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's (2.13) notes about its own inside, and about torchvision, from the user."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def write_formats(graph: Graph, formats: tuple[Format, ...], folder: Path) -> None:
    """Write the files of the formats into a folder.

    Raises:
        UsageError: torch cannot export the model.
        OSError: a file cannot be written.
    """
    # The plain way makes a constant of an LSTM's number of steps.
    from torch.export._patches import register_lstm_while_loop_decomposition

    sizes = {"batch": torch.export.Dim("batch", min=1)}
    sizes["length"] = torch.export.Dim("length", min=graph.lengths[0], max=graph.lengths[1])
    shapes = {name: {place: sizes[size] for place, size in graph.dynamic[name].items()} for name in graph.examples}
    content: dict[Format, bytes] = {}
    try:
        with _quiet(), register_lstm_while_loop_decomposition():
            program = torch.export.export(graph.module, (), graph.examples, dynamic_shapes=shapes)
            # Through memory: torch's (2.13) writer aborts the process when a disk is full.
            if "pt2" in formats:
                torch.export.save(program, buffer := io.BytesIO())
                content["pt2"] = buffer.getvalue()
            if "onnx" in formats:
                exported = torch.onnx.export(program, output_names=list(graph.outputs), verbose=False)
                assert exported is not None
                content["onnx"] = exported.model_proto.SerializeToString()
    except Exception as error:  # of many kinds, from deep inside of torch
        raise UsageError(
            f"this model cannot be exported by torch {torch.__version__}: {str(error).strip().splitlines()[0]}"
        ) from error
    for kind, data in content.items():
        (folder / FILES[kind]).write_bytes(data)


def open_format(file: Path) -> Callable[[dict[str, torch.Tensor]], Answers]:
    """Return what answers inputs, by name, with the file alone."""
    if file.suffix == ".pt2":
        with _quiet():
            module = torch.export.load(file).module()
        return lambda inputs: tuple(module(**inputs))
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def answer(inputs: dict[str, torch.Tensor]) -> Answers:
        given = {name: values.numpy() for name, values in inputs.items()}
        return tuple(torch.from_numpy(values) for values in session.run(None, given))

    return answer


@torch.no_grad()
def measure_difference(file: Path, samples: list[Sample]) -> float:
    """Return the largest difference of a file's answers from those expected, as TOLERANCE counts it."""
    answer = open_format(file)
    largest = 0.0
    for sample in samples:
        for got, expected in zip(answer(sample.inputs), sample.expected, strict=True):
            if got.shape != expected.shape or not got.isfinite().all():
                return float("inf")
            largest = max(largest, float((got - expected).abs().max() / expected.abs().max().clamp(min=1)))
    return largest


def check_format(file: Path, samples: list[Sample]) -> float:
    """Return the difference of a file's answers.

    Raises:
        UsageError: it is above TOLERANCE.
    """
    difference = measure_difference(file, samples)
    if not difference <= TOLERANCE:
        raise UsageError(
            f"{file.name}: answers differ from the model's by {difference:.2g}, {TOLERANCE:g} is allowed; nothing was "
            "written. Choose another --format, or other versions of torch and onnxruntime"
        )
    return difference
