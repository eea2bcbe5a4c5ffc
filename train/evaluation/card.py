"""What a person or a program must know of an export: config.json and the model card."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from data_modules.csv_files import MISSING
from train.engine.errors import UsageError
from train.evaluation.formats import FILES, TOLERANCE, Format
from train.evaluation.graph import Graph, fitted_table, normalization_of
from train.evaluation.trained_run import TrainedRun

NOT_TOLD = ("output_dir", "run_name")  # paths and names of the machine it was trained on


def describe_export(run: TrainedRun, graph: Graph, split: str, differences: dict[Format, float]) -> dict[str, Any]:
    """Return config.json: inputs, outputs, classes, settings, scores, versions and how the files were checked."""
    inputs = {}
    for name, example in graph.examples.items():
        shape = [graph.dynamic[name].get(place, size) for place, size in enumerate(example.shape)]
        inputs[name] = {"dtype": str(example.dtype).removeprefix("torch."), "shape": shape}
    return {
        "run": run.path.resolve().name,
        "kind": run.kind,
        "step": run.checkpoint.step,
        "weights": run.weights,
        "inputs": inputs,
        "outputs": list(graph.outputs),
        "class_names": run.class_names,
        "columns": _describe_columns(run),
        "data": run.checkpoint.record["data"],
        "settings": {name: value for name, value in run.config.items() if name not in NOT_TOLD},
        "scores": _find_scores(run),
        "check": {"split": split, "tolerance": TOLERANCE, "difference": differences},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **_find_versions()},
    }


def _describe_columns(run: TrainedRun) -> dict[str, Any]:
    """Return, of tables, the columns of "numbers" in their order, and of "categories" with the codes."""
    if run.kind == "stateful_lstm" or run.inputs.task != "table":
        return {}
    fitted = fitted_table(run)
    categories = []
    for column in fitted.categories:
        codes = {value: code for code, value in enumerate(column.values, start=1)}
        categories.append(
            {"name": column.name, "codes": codes, "unknown": 0, "missing": column.size - 1 if column.missing else 0}
        )
    return {"numbers": [column.name for column in fitted.numbers], "categories": categories}


def _find_scores(run: TrainedRun) -> dict[str, Any]:
    """Return what training said of the checkpoint, and what evaluate.py wrote of it since."""
    progress = run.checkpoint.record["progress"]
    scores: dict[str, Any] = {}
    if progress.get("metrics_step") == run.checkpoint.step:
        scores.update(progress["metrics"])
    for file in sorted(run.path.glob(f"evaluation/*-{run.checkpoint.path.name}*/evaluation.json")):
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{file}: is damaged ({error}); delete it, or run evaluate.py again") from error
        told = report.get("metrics", {})
        scores.update({f"{file.parent.name}/{name}": entry["value"] for name, entry in told.items()})
    return scores


def _find_versions() -> dict[str, str]:
    found = {}
    for name in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # not needed for the other format
            continue
    return found


def write_card(run: TrainedRun, config: dict[str, Any]) -> str:
    """Return the model card, in Markdown."""
    shapes = {name: ", ".join(map(str, one["shape"])) for name, one in config["inputs"].items()}
    inputs = [f"| `{name}` | {one['dtype']} | [{shapes[name]}] |" for name, one in config["inputs"].items()]
    scores = [f"| {name} | {value:.6g} |" for name, value in config["scores"].items()]
    checks = [f"| `{FILES[kind]}` | {value:.2g} |" for kind, value in config["check"]["difference"].items()]
    data, classes = config["data"], ", ".join(f"`{name}`" for name in run.class_names)
    lines = [
        "---",
        "library_name: pytorch",
        "tags:",
        "- exact-training",
        "---",
        f"# {config['run']}, step {config['step']}",
        "",
        f"A model of `{run.kind}`"
        + (f" (`{config['settings']['model']}`)" if run.kind == "classify" else "")
        + f", trained on `{data['name']}` (fingerprint `{data['fingerprint']}`). Weights: "
        + ("the average over training." if run.weights == "ema" else "those of the step."),
        "",
        "## Inputs and outputs",
        "",
        "| input | type | shape |",
        "| --- | --- | --- |",
        *inputs,
        "",
        f"Outputs, float32: {', '.join(f'`{name}`' for name in config['outputs'])}. {_explain(run)}",
        "",
        *([f"Classes, in the order of the outputs: {classes}.", ""] if classes else []),
        *_tell_columns(config["columns"]),
        "## How to load",
        "",
        *_show_loading(config),
        "`model.safetensors` holds the weights alone, by the names of the PyTorch model that this project builds.",
        "",
        "## Scores",
        "",
        *(["| metric | value |", "| --- | --- |", *scores] if scores else ["None were measured at this step."]),
        "",
        "## Check",
        "",
        f"Answers to real samples (split {config['check']['split']}) beside those of the model in float32; the "
        f"difference is a share of the largest answer, or of 1; {TOLERANCE:g} is allowed.",
        "",
        "| file | largest difference |",
        "| --- | --- |",
        *checks,
        "",
        "## Settings and versions",
        "",
        "```json",
        json.dumps({"settings": config["settings"], "versions": config["versions"]}, indent=1, ensure_ascii=False),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _explain(run: TrainedRun) -> str:
    """Return what stays outside of the graph."""
    if run.kind == "stateful_lstm":
        return "`h` and `c` are zeros at first, then `h_after` and `c_after` of the call before."
    task = run.inputs.task
    if task == "image":
        most = round(1 / normalization_of(run).scale)
        fitted = run.preprocessing["fitted"]
        text = f"Pixels are 0 to {most}; they are scaled and normalised inside. "
        if fitted is None:
            return text + "Light on dark, as the scans that it was trained on."
        decoder = fitted["decoder"]
        size = (decoder["width"], decoder["height"])
        resized = f"`PIL.ImageOps.fit(image, {size}, Image.Resampling.BILINEAR)`" if decoder["resize"] else "as it is"
        return text + (
            f"Outside: decode to {decoder['mode']} (of 16 bits the high 8), upright by EXIF, transparent parts white, "
            f"width and height {size}: {resized}."
        )
    if task == "text":
        fitted = run.preprocessing["fitted"]
        return (
            "Outside: `tokenizer.json`, read by the library `tokenizers`; cut to "
            f"{fitted['max_length']} tokens; add {fitted['shift']} to its numbers; {_explain_length(run)}; "
            "a text without a token is the one number 1. `lengths` are without the 0s."
        )
    if task == "table":
        return (
            "Numbers are raw, NaN where one is missing, and finite else; they are filled, flagged and standardised "
            "inside. In text files cells that hold one of "
            f"{', '.join(f'`{cell}`' for cell in MISSING if cell)} or nothing are missing, and spaces around values do "
            "not count."
        )
    return "Points are taken as they are."


def _explain_length(run: TrainedRun) -> str:
    if ":" in run.config["model"]:
        return f"0 behind a text, up to a length of 2 to {run.inputs.max_length}"
    return "0 behind a text, up to any length"


def _tell_columns(columns: dict[str, Any]) -> list[str]:
    if not columns:
        return []
    lines = [f"Columns of `numbers`: {', '.join(columns['numbers'])}.", ""] if columns["numbers"] else []
    if columns["categories"]:
        names = ", ".join(one["name"] for one in columns["categories"])
        lines += [f"Columns of `categories`: {names}. The codes of the values are in `config.json`, `columns`.", ""]
    return lines


def _show_loading(config: dict[str, Any]) -> list[str]:
    made = []
    for name, one in config["inputs"].items():
        shape = [{"batch": 1, "length": 2}.get(size, size) for size in one["shape"]]
        make = "ones" if name in ("tokens", "lengths") else "zeros"
        made.append(f'    "{name}": np.{make}({shape}, np.{one["dtype"]}),')
    lines = ["```python", "import numpy as np", "", "inputs = {", *made, "}"]
    if "onnx" in config["check"]["difference"]:
        lines += ["", "import onnxruntime", "", 'session = onnxruntime.InferenceSession("model.onnx")']
        lines += ["answers = session.run(None, inputs)"]
    if "pt2" in config["check"]["difference"]:
        lines += ["", "import torch", "", 'model = torch.export.load("model.pt2").module()']
        lines += ["answers = model(**{name: torch.from_numpy(values) for name, values in inputs.items()})"]
    return [*lines, "```", ""]
