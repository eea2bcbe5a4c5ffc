"""Reconstruction in real processes: killed and restarted the same run, every sample once, pictures, refusals."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load

from data_modules.load import load_data
from data_modules.options import DataOptions
from models.autoencoder import ConvAutoencoder
from models.losses import ssim
from tests.process.conftest import Runs
from tests.sources import everything
from tests.unit.test_reconstruct import write_waves

SIDE, BOTTLENECK = 16, 8
SPLITS = [("train", 50), ("validation", 23)]  # of which the latter divides by neither 2 nor 3
# All that draws or remembers: a VAE, noise, augmentation, an average, the plateau, early stopping; 3 steps an epoch,
# the last with a short batch.
EVERYTHING = [
    "--batch_size", 20, "--slots", 2, "--bottleneck", BOTTLENECK, "--width", 8, "--num_train_epochs", 9,
    "--kl_weight", 0.01, "--input_noise_std", 0.2, "--augment", "crop:2", "flip", "rotate:10",
    "--ema_decay", 0.9, "--learning_rate", 0.02, "--lr_patience", 0, "--eval_every", 2,
    "--early_stopping_patience", 4, "--early_stopping_min_delta", 1, "--log_every", 1, "--checkpoint_every", 4,
]  # fmt: skip
LAST = 10  # the first of five evaluations counts as better, the others do not
FSDP2 = {"processes": 2, "faults": [("use_fsdp2",)]}


def pictures(script, name):
    """Return the bytes of all pictures of reconstructions of a run, by their names."""
    plots = script.folder / name / "plots"
    drawn = [path for path in plots.rglob("*.png") if path.parent != plots or path.name == "worst.png"]
    return {str(path.relative_to(plots)): path.read_bytes() for path in drawn}


def column(script, name, metric):
    return [line[metric] for line in script.metrics(name) if metric in line]


def errors(finished):
    """Return the messages of a run that ended with one."""
    assert "Traceback" not in finished.output, finished.output
    return [line for line in finished.output.splitlines() if line.startswith("error:")]


def outputs(model, images):
    with torch.no_grad():
        return torch.cat([model(images[place : place + 1]) for place in range(len(images))])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs of everything at once that nobody disturbs, named by their number of processes, and their data."""
    script = Runs(tmp_path_factory.mktemp("reconstruct"), "reconstruct")
    script.settings = [*EVERYTHING, "--dataset", write_waves(script.folder / "data", SIDE, SPLITS)]
    for processes in (1, 2):
        script.run(str(processes), *script.settings, processes=processes)
    return script


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Runs on digits with weights as at the start, named by their number of processes."""
    script = Runs(tmp_path_factory.mktemp("counted"), "reconstruct")
    settings = ["--max_train_steps", 1, "--slots", 6, "--batch_size", 66, "--learning_rate", 1e-12]
    for processes in (1, 2, 3):
        script.run(str(processes), *settings, processes=processes)
    return script


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_equals_a_straight_one(straight, processes):
    name = f"killed{processes}"
    faults = [("die_after", 7)]
    finished = straight.start(name, *straight.settings, processes=processes, faults=faults).wait()
    assert -9 in finished.codes, finished.output
    finished = straight.run(name, *straight.settings, processes=processes)
    assert "from step 4" in finished.output or "from step 2" in finished.output  # both within an epoch
    assert "early stop" in finished.output
    straight.assert_same(str(processes), name, LAST)
    assert straight.file(name, LAST, "ema.safetensors") == straight.file(str(processes), LAST, "ema.safetensors")
    assert pictures(straight, name) == pictures(straight, str(processes))
    assert len(set(column(straight, name, "train/learning_rate"))) > 1  # the plateau has acted


def test_number_of_processes_changes_no_sample(straight):
    for metric in ("train/loss", "train/kl", "val/loss", "val/ema_loss", "val/ssim"):
        one, two = (column(straight, name, metric) for name in ("1", "2"))
        assert one == pytest.approx(two, abs=1e-5), metric
    one, two = (load(straight.file(name, LAST)) for name in ("1", "2"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_parts_of_the_loss_are_logged(straight):
    for line in straight.metrics("2"):
        for split in ("train", "val"):
            if f"{split}/loss" not in line:
                continue
            mse, similarity, kl = (line[f"{split}/{name}"] for name in ("mse", "ssim", "kl"))
            assert line[f"{split}/loss"] == pytest.approx(mse + 0.1 * (1 - similarity) + 0.01 * kl, abs=1e-6)
            assert line[f"{split}/mse_share"] + line[f"{split}/ssim_share"] == pytest.approx(1, abs=1e-6)
            assert 0 < line[f"{split}/mse_share"] < 1
        assert "train/psnr" not in line
    assert len(column(straight, "2", "val/psnr")) == LAST / 2


def test_scores_are_means_over_samples(straight):
    """Computed again from the checkpoint, one image at a time."""
    data = load_data(DataOptions(dataset=str(straight.folder / "data")), labelled=False)
    images = everything(data.validation)["inputs"].float() / 255
    model = ConvAutoencoder((3, SIDE, SIDE), BOTTLENECK, 8, vae=True)
    model.load_state_dict(load(straight.file("2", LAST)))
    answers = outputs(model.eval(), images)
    last = next(line for line in reversed(straight.metrics("2")) if "val/loss" in line)
    noises = [-10 * math.log10(float(error)) for error in (answers - images).square().mean(dim=(1, 2, 3))]
    similarities = [float(ssim(one[None], other[None])) for one, other in zip(answers, images)]
    assert last["val/psnr"] == pytest.approx(np.mean(noises), abs=1e-4)
    assert last["val/ssim"] == pytest.approx(np.mean(similarities), abs=1e-5)


def test_every_evaluation_is_drawn(straight):
    steps = [f"step_{step:08d}.png" for step in range(2, LAST + 1, 2)]
    drawn = pictures(straight, "1")
    expected = {f"{folder}/{step}" for folder in ("reconstructions", "samples") for step in steps}
    assert drawn.keys() == expected | {"worst.png"}
    assert all(content[:4] == b"\x89PNG" for content in drawn.values())


def test_every_sample_counts_once_on_any_number_of_processes(counted):
    """269 samples in batches of 64: the mean of batches is another number."""
    first, *others = (counted.metrics(str(processes))[0] for processes in (1, 2, 3))
    for other in others:
        for name in ("val/loss", "val/mse", "val/psnr"):
            assert other[name] == pytest.approx(first[name], abs=1e-6)
    data = load_data(DataOptions(), labelled=False)
    model = ConvAutoencoder(data.inputs.shape)
    model.load_state_dict(load(counted.file("1", 1)))
    images = data.prepare(everything(data.validation), torch.device("cpu"))["inputs"]
    error = (outputs(model.eval(), images) - images).square().mean(dim=(1, 2, 3))
    assert first["val/loss"] == first["val/mse"] == pytest.approx(float(error.mean()), abs=1e-6)
    assert first["val/psnr"] == pytest.approx(float((-10 * error.log10()).mean()), abs=1e-4)
    assert "val/ssim" not in first  # digits are smaller than its window


def test_worst_images_do_not_depend_on_the_processes(counted):
    one, two, three = (pictures(counted, name) for name in ("1", "2", "3"))
    assert one.keys() == {"worst.png", "reconstructions/step_00000001.png"}
    assert one == two == three


def test_stopped_by_sigterm_in_bf16(reconstruct):
    settings = ["--mixed_precision", "bf16", "--max_train_steps", 8, "--batch_size", 160, "--kl_weight", 0.01]
    reconstruct.run("straight", *settings)
    stopped = reconstruct.start("stopped", *settings, faults=[("signal_after", 5, signal.SIGTERM)]).wait()
    assert stopped.code == 75, stopped.output
    assert reconstruct.steps("stopped") == [5]
    reconstruct.run("stopped", *settings)
    reconstruct.assert_same("straight", "stopped", 8)
    assert pictures(reconstruct, "straight") == pictures(reconstruct, "stopped")


def test_fsdp2_killed_and_resumed_equals_straight(reconstruct):
    settings = ["--batch_size", 160, "--kl_weight", 0.01, "--input_noise_std", 0.1, "--ema_decay", 0.9]
    settings += ["--checkpoint_every", 2, "--max_train_steps", 6, "--eval_every", 3, "--slots", 2]
    straight = reconstruct.run("straight", *settings, **FSDP2)
    assert "parameters: DTensor" in straight.output
    killed = {**FSDP2, "faults": [*FSDP2["faults"], ("die_after", 5)]}
    assert -9 in reconstruct.start("killed", *settings, **killed).wait().codes
    assert "resuming" in reconstruct.run("killed", *settings, **FSDP2).output
    reconstruct.assert_same("straight", "killed", 6)
    reconstruct.run("ddp", *settings, processes=2)
    for metric in ("train/loss", "val/loss", "val/ema_loss", "val/psnr"):
        assert column(reconstruct, "straight", metric) == pytest.approx(column(reconstruct, "ddp", metric), rel=1e-5)
    drawn = {name for name in pictures(reconstruct, "ddp") if not name.startswith("samples/")}
    assert pictures(reconstruct, "straight").keys() == drawn  # sharded weights cannot decode alone


def test_fsdp2_measures_gradients_after_the_quick_checks(reconstruct):
    """The checks leave the root's parameters whole, and the loop must not take those for the ones it trains."""
    reconstruct.run("run", "--max_train_steps", 1, "--log_every", 1, **FSDP2)
    assert column(reconstruct, "run", "train/grad_norm")[0] > 0


def test_fsdp2_declines_images_in_colour_with_one_message(straight):
    """Their weights lie in memory channels last."""
    finished = straight.start("sharded", *straight.settings, **FSDP2).wait()
    assert finished.code == 2, finished.output
    (message,) = errors(finished)
    assert "cannot be sharded" in message


@pytest.mark.parametrize("more", [[], ["--kl_weight", 0.01, "--input_noise_std", 0.2, "--augment", "flip"]])
def test_preflight_passes_and_draws_nothing(straight, tmp_path, more):
    script = Runs(tmp_path, "reconstruct")
    data = ["--dataset", straight.folder / "data", "--batch_size", 20] if more else []
    finished = script.run("run", "--preflight", *data, *more, processes=2 if more else 1, pictures=True)
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    found = {finding["check"]: finding["status"] for finding in report["findings"]}
    found.pop("saving")  # times the disk, which others use too
    assert set(found.values()) <= {"pass", "skip"}, finished.output
    assert found["round trip"] == found["overfit one batch"] == "pass"
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == {"first_batch.png", "preflight.png"}


def test_dry_run_writes_nothing(reconstruct):
    reconstruct.run("run", "--dry_run", "--kl_weight", 0.1)
    assert not (reconstruct.folder / "run").exists()


@pytest.mark.parametrize("blocked", ["reconstructions", "worst.png"])
def test_pictures_that_cannot_be_written_end_the_run_with_one_message(reconstruct, blocked):
    path = reconstruct.folder / "run" / "plots" / blocked
    path.parent.mkdir(parents=True)
    if blocked == "worst.png":
        path.mkdir()
    else:
        path.write_text("in the way")
    finished = reconstruct.start("run", "--max_train_steps", 1, processes=2).wait()
    assert finished.code == 1
    (message,) = errors(finished)
    assert str(path) in message and "cannot be written" in message


def test_refused_on_all_processes_with_one_message(reconstruct):
    finished = reconstruct.start("run", "--ssim_weight", 0.5, processes=2).wait()
    assert finished.code == 2
    (message,) = errors(finished)
    assert "--ssim_weight" in message and "8 x 8" in message
    assert not (reconstruct.folder / "run").exists()
