"""The confusion matrix that is counted beside a test."""

from types import SimpleNamespace

import torch

from train.evaluation import confusion


def test_samples_are_counted_and_fillers_are_not(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(confusion, "draw_confusion_matrix", lambda counts, *_: drawn.append(counts.tolist()))
    runtime = SimpleNamespace(device=torch.device("cpu"), sum=lambda counts: 2.0 * counts, is_main=True)
    matrix = confusion.ConfusionMatrix(["cat", "dog"], tmp_path / "a.png", runtime)
    for _ in range(2):
        slot = SimpleNamespace(count=2, batch={"labels": torch.tensor([0, 1, 1])})
        values = {"loss": torch.zeros(3), "predicted": torch.tensor([1, 1, 0])}
        matrix.watch(slot, values)
        assert list(values) == ["loss"]  # a predicted class has no mean
    matrix.draw(torch.nn.Identity())
    assert drawn == [[[0, 4], [0, 4]]]  # rows are true classes; of two processes that saw the same


def test_disk_that_is_full_does_not_end_a_finished_run(tmp_path):
    said = []
    runtime = SimpleNamespace(device=torch.device("cpu"), sum=lambda counts: counts, is_main=True, say=said.append)
    confusion.ConfusionMatrix(["cat", "dog"], tmp_path / "nowhere" / "a.png", runtime).draw(torch.nn.Identity())
    assert len(said) == 1 and "a.png cannot be written" in said[0]
