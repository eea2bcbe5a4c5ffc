"""Real samples of a run as a graph takes them, and what the model says of them by the way of training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from data_modules.cells import parse_numbers, read_column
from data_modules.embedded_tables import BUNCHES, open_bunch
from data_modules.load import choose_splits
from data_modules.rows import Rows
from data_modules.splits import Batch
from data_modules.stream import hold
from train.evaluation.graph import Answers, fitted_table
from train.evaluation.results import load_part_of_sequence
from train.evaluation.samples import Part, load_part, open_rows
from train.evaluation.trained_run import TrainedRun, build_model

SIZES = (1, 7, 56)  # samples of a batch: one alone, an odd number, and more


@dataclass(frozen=True)
class Sample:
    """A batch of real samples."""

    inputs: dict[str, torch.Tensor]  # as the graph takes them
    expected: Answers  # of the model, prepared as in training; in the order of the graph's outputs


@torch.no_grad()
def load_real_samples(run: TrainedRun) -> tuple[str, list[Sample]]:
    """Return the name of the split, test or else validation, and batches of its first samples.

    Raises:
        DataError: the data are not there or have changed since training.
    """
    model = build_model(run)
    if run.kind == "stateful_lstm":
        return _cut_sequence(run, model)
    part = load_part(run, None, None, None)
    if run.inputs.task == "table":
        return part.name, _read_table(run, part, model)
    batches = []
    for numbers in _split(len(part.split)):
        stored = part.split.gather(numbers)
        names = {"image": {"images": "inputs"}, "points": {"points": "inputs"}}.get(run.inputs.task)
        names = names or {"tokens": "tokens", "lengths": "lengths"}
        prepared = part.data.prepare(dict(stored), torch.device("cpu"))
        inputs = {name: stored[key] for name, key in names.items()}
        batches.append(Sample(inputs, _answer(run, model, prepared)))
    return part.name, batches


def _split(count: int) -> list[torch.Tensor]:
    """Return the numbers of the first samples by batches, as far as there are any."""
    parts = torch.arange(min(count, sum(SIZES))).tensor_split(torch.tensor(SIZES).cumsum(0)[:-1])
    return [part for part in parts if len(part)]


def _answer(run: TrainedRun, model: nn.Module, prepared: Batch) -> Answers:
    answers = model(*(prepared[name] for name in run.inputs.names)).float()
    return (answers,) if run.kind == "reconstruct" else (answers, answers.softmax(dim=1))


def _read_table(run: TrainedRun, part: Part, model: nn.Module) -> list[Sample]:
    """Read the cells of the split once more: its samples are standardised already."""
    rows, fitted = _open_table(run, part), fitted_table(run)
    columns = [torch.tensor(parse_numbers(read_column(rows, column.name))[0]) for column in fitted.numbers]
    batches = []
    for numbers in _split(len(part.split)):
        stored = part.split.gather(numbers)
        inputs = {"categories": stored["categories"]} if fitted.categories else {}
        if columns:
            inputs["numbers"] = torch.stack([column[part.numbers[numbers]] for column in columns], dim=1)
        prepared = part.data.prepare(dict(stored), torch.device("cpu"))
        batches.append(Sample(inputs, _answer(run, model, prepared)))
    return batches


def _open_table(run: TrainedRun, part: Part) -> Rows:
    """Return the rows among which those of a split are."""
    options = dataclasses.replace(run.data_options, on_bad_sample="skip")
    if options.dataset in BUNCHES:
        return open_bunch(options.dataset)[0]
    opened = open_rows(run, options)
    names = choose_splits(options.dataset, list(opened), options)
    rows = opened[names.get(part.name, names["train"])]  # validation may be cut from the training split
    return hold(rows) if options.streaming else rows


def _cut_sequence(run: TrainedRun, model: nn.Module) -> tuple[str, list[Sample]]:
    """Return pieces of a sequence: one behind another, with the state that the first leaves, and three at once."""
    _, name, sequence = load_part_of_sequence(run, None, None)
    size = run.config["hidden_size"]
    piece = min(64, max(1, len(sequence) // 3))
    samples_1TF = sequence.inputs[None, :piece]
    _, (h, c) = model(samples_1TF, None)
    pieces_BTF = sequence.inputs[: 3 * piece].unflatten(0, (-1, piece))
    zeros = torch.zeros(1, len(pieces_BTF), size)
    batches = []
    for samples, state in ((samples_1TF, (h, c)), (pieces_BTF, (zeros, zeros)), (samples_1TF[:, :1], (h, c))):
        answers, after = model(samples, state)
        batches.append(Sample({"samples": samples, "h": state[0], "c": state[1]}, (answers, *after)))
    return name, batches
