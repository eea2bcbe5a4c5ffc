"""Pictures of reconstructions: which samples, on how many processes, and where their pixels are."""

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from train.engine import gallery as galleries
from train.engine.errors import TrainingError
from train.engine.gallery import SHOWN, WORST, Gallery
from train.engine.plots import LARGEST_CELL, SMALLEST_CELL, draw_images

quick = settings(deadline=None, max_examples=60)  # the clock of a shared machine proves nothing


class Half(nn.Module):
    """Answers with half of each image, and notes in which mode."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, images):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return images / 2


class Processes:
    """Runs the same work on several fake processes at once; each has a runtime of its own."""

    def __init__(self, count):
        self.count = count
        self.barrier = threading.Barrier(count)
        self.box = [None] * count

    def exchange(self, rank, value):
        self.box[rank] = value
        self.barrier.wait(20)
        everyone = list(self.box)
        self.barrier.wait(20)
        return everyone

    def runtime(self, rank):
        def on_main(work):
            outcome = None
            if rank == 0:
                try:
                    outcome = work()
                except TrainingError as error:
                    outcome = error
            outcome = self.exchange(rank, outcome)[0]
            if isinstance(outcome, TrainingError):
                raise outcome
            return outcome

        def gather(values):
            everyone = self.exchange(rank, values)
            assert len({(tensor.shape, tensor.dtype) for tensor in everyone}) == 1  # as a real one needs it
            return everyone

        return SimpleNamespace(device=torch.device("cpu"), gather=gather, on_main=on_main)

    def run(self, work):
        """Call `work(rank, runtime)` on all processes and return what each returned or raised."""
        results = [None] * self.count

        def be(rank):
            try:
                results[rank] = work(rank, self.runtime(rank))
            except Exception as error:
                results[rank] = error
                if not isinstance(error, TrainingError):
                    self.barrier.abort()

        threads = [threading.Thread(target=be, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def numbered(numbers):
    """Return images [N, 1, 2, 2] whose pixels are their numbers."""
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def slot(numbers, padding=0):
    """Return a slot of numbered samples, filled up with copies that do not count."""
    return SimpleNamespace(count=len(numbers), batch={"inputs": numbered([*numbers, *[999] * padding])})


def values_of(losses, padding=0):
    return {"loss": torch.tensor([*losses, *[1e6] * padding], dtype=torch.float32)}


def measure(model, batch):
    """Give each sample its number as the loss, and a score."""
    model(batch["inputs"])
    numbers = batch["inputs"][:, 0, 0, 0]
    return {"loss": numbers, "psnr": numbers + 0.25, "kl": numbers}


def build(folder, runtime, step=3, validation=100, **options):
    task = SimpleNamespace(
        splits={"validation": range(validation)},
        load=lambda split, indices, epoch: {"inputs": numbered(indices.tolist())},
        predict=lambda model, batch: model(batch["inputs"]),
    )
    state = SimpleNamespace(progress=SimpleNamespace(step=step))
    return Gallery(folder, runtime, state, task, options.pop("measure", measure), **options)


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, by its path."""
    pictures = {}

    def remember(path, rows, captions):
        pictures[f"{path.parent.name}/{path.name}"] = (rows, captions)

    monkeypatch.setattr(galleries, "draw_images", remember)
    return pictures


def shown(pictures, name):
    """Return the numbers of the samples in a picture."""
    ((title, originals), *_), _ = pictures[name]
    assert title == "original"
    return originals[:, 0, 0, 0].tolist()


@st.composite
def shares(draw):
    """Return, for each process, its slots of different losses; at least one slot each, empty ones among them."""
    total = draw(st.integers(1, 60))
    losses = draw(st.permutations([float(number) for number in range(total)]))
    processes = draw(st.integers(1, 3))
    shares = [[[]] for _ in range(processes)]
    for loss in losses:
        share = shares[draw(st.integers(0, processes - 1))]
        if draw(st.booleans()):
            share.append([])
        share[-1].append(loss)
    return total, shares


@quick
@given(shares(), st.integers(0, 3))
def test_the_worst_of_all_processes_are_drawn_the_worst_first(tmp_path_factory, case, padding):
    total, shares = case
    pictures = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(galleries, "draw_images", lambda path, rows, captions: pictures.update({path.name: rows}))

        def work(rank, runtime):
            gallery = build(tmp_path_factory.getbasetemp() / "gallery", runtime)
            for losses in shares[rank]:
                gallery.watch(slot(losses, padding), values_of(losses, padding))
            gallery.draw(Half())

        assert Processes(len(shares)).run(work) == [None] * len(shares)
    worst = pictures["worst.png"][0][1][:, 0, 0, 0].tolist()
    assert worst == [float(number) for number in range(total)][::-1][:WORST]


def test_each_evaluation_has_worst_images_of_its_own(tmp_path, drawn):
    gallery = build(tmp_path, Processes(1).runtime(0))
    for losses in ([50.0, 60.0], [1.0, 2.0, 3.0]):
        gallery.watch(slot(losses), values_of(losses))
        gallery.draw(Half())
        assert shown(drawn, f"{tmp_path.name}/worst.png") == losses[::-1]


def test_a_loss_that_is_not_a_number_is_the_worst(tmp_path, drawn):
    gallery = build(tmp_path, Processes(1).runtime(0))
    gallery.watch(slot([1.0, 7.0, 2.0]), values_of([1.0, float("nan"), 2.0]))
    gallery.draw(Half())
    assert shown(drawn, f"{tmp_path.name}/worst.png") == [7.0, 2.0, 1.0]


@pytest.mark.parametrize(("validation", "expected"), [(1, [0]), (3, [0, 1, 2]), (8, list(range(8)))])
def test_few_samples_are_all_shown(tmp_path, drawn, validation, expected):
    gallery = build(tmp_path, Processes(1).runtime(0), validation=validation)
    gallery.watch(slot([1.0]), values_of([1.0]))
    gallery.draw(Half())
    assert shown(drawn, "reconstructions/step_00000003.png") == expected


@quick
@given(st.integers(SHOWN, 10**6))
def test_samples_are_shown_from_all_over_validation(validation):
    asked = []
    runtime = Processes(1).runtime(0)
    gallery = build(
        Path("unused"), SimpleNamespace(device=runtime.device, gather=runtime.gather, on_main=lambda work: None)
    )
    gallery._task.splits = {"validation": range(validation)}
    gallery._task.load = lambda split, indices, epoch: (
        asked.append((split, indices, epoch)) or {"inputs": numbered([1])}
    )
    for _ in range(2):
        gallery.watch(slot([1.0]), values_of([1.0]))
        gallery.draw(Half())
    (split, indices, epoch), again = asked
    assert (split, epoch) == ("validation", None)
    assert indices.equal(again[1])
    assert indices[0] == 0 and indices[-1] == validation - 1 and len(indices) == SHOWN
    gaps = indices.diff()
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_a_picture_shows_originals_answers_errors_and_scores(tmp_path, drawn):
    gallery = build(tmp_path, Processes(1).runtime(0), validation=2)
    gallery.watch(slot([0.5]), values_of([0.5]))
    gallery.draw(Half())
    rows, captions = drawn[f"{tmp_path.name}/worst.png"]
    assert [title for title, _ in rows] == ["original", "reconstruction", "error x 4"]
    assert [float(images[0, 0, 0, 0]) for _, images in rows] == [0.5, 0.25, 1.0]
    assert captions == ["0.8 dB  loss 0.5"]  # what else is measured has no place


def test_errors_are_those_of_all_channels(tmp_path, drawn):
    gallery = build(tmp_path, Processes(1).runtime(0), validation=1)
    images = torch.tensor([0.0, 0.2, 0.4]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    gallery._task.load = lambda *_: {"inputs": images}
    gallery.watch(slot([0.5]), values_of([0.5]))
    gallery.draw(Half())
    rows, _ = drawn["reconstructions/step_00000003.png"]
    torch.testing.assert_close(rows[2][1], torch.full((1, 3, 2, 2), 0.1 * 4))


@pytest.mark.parametrize("training", [True, False])
def test_drawing_leaves_the_model_as_it_is(tmp_path, drawn, training):
    model = Half().train(training)
    gallery = build(tmp_path, Processes(1).runtime(0))
    before = torch.random.get_rng_state()
    gallery.watch(slot([0.5]), values_of([0.5]))
    gallery.draw(model)
    assert model.training is training
    assert set(model.modes) == {(False, False)}
    assert before.equal(torch.random.get_rng_state())


def test_samples_of_a_model_stand_in_rows(tmp_path, drawn):
    images = torch.arange(32.0).view(32, 1, 1, 1)
    gallery = build(tmp_path, Processes(1).runtime(0), sample=lambda model: images)
    gallery.watch(slot([0.5]), values_of([0.5]))
    gallery.draw(Half())
    rows, captions = drawn["samples/step_00000003.png"]
    assert [len(part) for _, part in rows] == [SHOWN] * 4 and captions == []
    assert torch.cat([part for _, part in rows]).equal(images)
    assert drawn.keys() == {
        "samples/step_00000003.png", "reconstructions/step_00000003.png", f"{tmp_path.name}/worst.png",
    }  # fmt: skip


def test_only_the_main_process_writes_and_all_hear_of_a_failure(tmp_path):
    (tmp_path / "reconstructions").write_text("in the way")

    def work(rank, runtime):
        gallery = build(tmp_path, runtime)
        gallery.watch(slot([0.5]), values_of([0.5]))
        gallery.draw(Half())

    errors = Processes(2).run(work)
    assert [type(error) for error in errors] == [TrainingError, TrainingError]
    assert "cannot be written" in str(errors[1]) and "reconstructions" in str(errors[1])
    assert [path.name for path in tmp_path.iterdir()] == ["reconstructions"]


# ---- the pixels of a picture -------------------------------------------------------------------------------------


def chessboard(count, channels, height, width):
    """Return images of black and white pixels that differ from each other."""
    pixels = np.random.default_rng(0).integers(0, 2, (count, channels, height, width))
    return torch.from_numpy(pixels.astype(np.float32))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 16, 100])
def test_pixels_are_where_they_belong(tmp_path, channels, side):
    first, second = chessboard(3, channels, side, side), chessboard(2, channels, side, side).flip(-1)
    draw_images(tmp_path / "a.png", [("first", first), ("second", second)], ["a  b", "c"])
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    times = max(SMALLEST_CELL, side) // side
    cell = times * side if SMALLEST_CELL % side == 0 or side > SMALLEST_CELL else SMALLEST_CELL
    assert picture.shape == (2 * (cell + 20) + 14 * 2 + 4, 3 * (cell + 4) + 4, 3)
    centres = ((np.arange(side) + 0.5) * cell / side).astype(int)
    for row, images in enumerate((first, second)):
        for column, image in enumerate(images):
            top, left = row * (cell + 20) + 16, 4 + column * (cell + 4)
            found = picture[top + centres[:, None], left + centres]
            expected = (image.expand(3, -1, -1).permute(1, 2, 0) * 255).byte().numpy()
            assert (found == expected).all(), (row, column)
    empty = picture[cell + 20 + 16 : 2 * (cell + 20) - 4, 4 + 2 * (cell + 4) :]
    assert (empty == 255).all()  # the second row has two images only


def test_values_outside_are_cut_and_large_images_shrink(tmp_path):
    images = torch.stack([torch.full((1, 300, 300), value) for value in (-3.0, 0.5, 7.0)])
    draw_images(tmp_path / "a.png", [("", images)], [])
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (LARGEST_CELL + 24, 3 * (LARGEST_CELL + 4) + 4, 3)
    middles = [4 + column * (LARGEST_CELL + 4) + LARGEST_CELL // 2 for column in range(3)]
    assert picture[80, middles, 0].tolist() == [0, 128, 255]


def test_captions_are_below_their_columns(tmp_path):
    images = torch.ones(2, 1, 8, 8)
    plain, written = (tmp_path / f"{name}.png" for name in ("plain", "written"))
    draw_images(plain, [("", images)], ["", ""])
    draw_images(written, [("", images)], ["", "0.5 dB"])
    one, other = (np.asarray(Image.open(path)) for path in (plain, written))
    rows, columns = np.nonzero((one != other).any(axis=2))
    assert rows.min() >= SMALLEST_CELL + 20 and columns.min() >= SMALLEST_CELL + 8


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 3]))
def test_images_of_any_size_are_drawn(tmp_path_factory, height, width, channels):
    path = tmp_path_factory.getbasetemp() / "any.png"
    draw_images(path, [("title", torch.rand(2, channels, height, width))], ["a", "b"])
    with Image.open(path) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(("height", "width"), [(64, 512), (128, 16)])
def test_cells_of_long_images_are_neither_huge_nor_narrower_than_a_caption(tmp_path, height, width):
    draw_images(tmp_path / "a.png", [("", torch.rand(1, 1, height, width))], ["ssim 0.50"])
    with Image.open(tmp_path / "a.png") as picture:
        assert SMALLEST_CELL <= picture.width - 8 <= LARGEST_CELL
