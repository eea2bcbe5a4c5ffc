"""Reconstruction in one process: settings, refusals, what is measured, and what preflight says of it."""

import dataclasses
import itertools
import math
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train.engine.preflight as preflight
from data_modules.splits import InputSpec
from models.autoencoder import ConvAutoencoder
from tests.sources import encode, write_tree
from tests.subjects import reconstruct_subject, statuses
from train import reconstruct
from train.engine.errors import UsageError
from train.engine.preflight import FULL, QUICK, examine
from train.engine.settings import check_settings
from train.reconstruct import ReconstructSettings, build_measure, build_model, metric_names, settle_on_loss

# All but the timing, which says nothing of bugs and takes the longest.
CHECKS = [check for check in FULL if check is not preflight.check_speed]


def spec(height, width=None, channels=1):
    return InputSpec("image", (channels, height, height if width is None else width))


def settled(side=16, **changes):
    """Return settings with the weight of SSIM that images of this size get."""
    return settle_on_loss(ReconstructSettings(**changes), spec(side))


def write_waves(folder, side=16, splits=(("train", 40), ("validation", 20))):
    """Write images of smooth waves in colour, without labels."""
    chance = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side] / side
    for split, count in splits:
        (folder / split).mkdir(parents=True)
        for number in range(count):
            across, down, start = chance.uniform(0, 6, 3)
            waves = [np.sin(across * columns + down * rows * channel + start) for channel in (1, 2, 3)]
            pixels = ((np.stack(waves, axis=-1) + 1) * 127).astype(np.uint8)
            (folder / split / f"{number}.png").write_bytes(encode(pixels))
    return folder


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """A folder of images that are large enough for SSIM."""
    return write_waves(tmp_path_factory.mktemp("waves") / "images")


# ---- settings ----------------------------------------------------------------------------------------------------


def test_defaults_are_those_that_autoencoders_are_promised():
    defaults = ReconstructSettings()
    assert check_settings(defaults) == []
    assert (defaults.optimizer, defaults.lr_scheduler) == ("adam", "plateau")
    assert (defaults.lr_gamma, defaults.lr_patience, defaults.max_grad_norm) == (0.5, 10, 1.0)
    assert (defaults.early_stopping_patience, defaults.best_metric, defaults.mode) == (20, "val/loss", "min")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bottleneck": 0}, "bottleneck"),
        ({"bottleneck": -3}, "bottleneck"),
        ({"width": 0}, "width"),
        ({"mse_weight": -1.0}, "mse_weight"),
        ({"mse_weight": math.inf}, "mse_weight"),
        ({"ssim_weight": -0.1}, "ssim_weight"),
        ({"ssim_weight": math.nan}, "ssim_weight"),
        ({"input_noise_std": -0.1}, "input_noise_std"),
        ({"kl_weight": math.inf}, "kl_weight"),
        ({"mse_weight": 0.0, "ssim_weight": 0.0}, "mse_weight"),
        ({"mse_weight": 0.0, "ssim_weight": 0.0, "kl_weight": 1.0}, "mse_weight"),
        ({"ssim_weight": 0.0, "multi_scale": True}, "multi_scale"),
        ({"augment": ("flip", "mixup:0.4")}, "augment"),
        ({"validation_fraction": 1.0}, "validation_fraction"),  # of the data
        ({"batch_size": 0}, "batch_size"),  # of training
    ],
)
def test_settings_out_of_range_are_named(changes, named):
    (problem,) = check_settings(ReconstructSettings(**changes))
    assert problem.startswith(f"--{named} ")


@pytest.mark.parametrize(
    "changes",
    [{"mse_weight": 0.0}, {"mse_weight": 0.0, "ssim_weight": 1.0}, {"ssim_weight": 0.0}, {"multi_scale": True}],
)
def test_sound_settings_pass(changes):
    assert check_settings(ReconstructSettings(**changes)) == []


@pytest.mark.parametrize(("height", "width", "weight"), [(8, 8, 0.0), (10, 40, 0.0), (11, 11, 0.1), (64, 64, 0.1)])
def test_the_weight_of_ssim_depends_on_the_size(height, width, weight):
    assert settle_on_loss(ReconstructSettings(), spec(height, width)).ssim_weight == weight
    assert settle_on_loss(ReconstructSettings(), spec(width, height)).ssim_weight == weight


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_weight_that_is_given_stays(weight):
    assert settled(ssim_weight=weight).ssim_weight == weight


@pytest.mark.parametrize(
    ("side", "changes", "parts"),
    [
        (8, {"ssim_weight": 0.5}, ["--ssim_weight", "11 pixels", "8 x 8", "--image_size"]),
        (10, {"ssim_weight": 1.0, "mse_weight": 0.0}, ["--ssim_weight", "10 x 10"]),
        (160, {"multi_scale": True}, ["--multi_scale", "161 pixels", "160 x 160"]),
        (8, {"multi_scale": True, "ssim_weight": 1.0}, ["--multi_scale", "161 pixels"]),
        (8, {"best_metric": "val/ssim"}, ["--best_metric val/ssim", "val/psnr"]),
        (64, {"best_metric": "val/ms_ssim"}, ["--best_metric val/ms_ssim", "val/ssim"]),
        (64, {"best_metric": "val/kl"}, ["--best_metric val/kl"]),
        (64, {"best_metric": "val/ema_loss"}, ["--best_metric val/ema_loss"]),
    ],
)
def test_what_images_of_a_size_do_not_allow_is_refused(side, changes, parts):
    with pytest.raises(UsageError) as caught:
        settled(side, **changes)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_a_loss_without_parts_is_refused_for_small_images():
    """SSIM, which small images do not have, is the only part that is left."""
    with pytest.raises(UsageError):
        settled(8, mse_weight=0.0)


def test_multi_scale_is_accepted_from_161_pixels():
    assert settled(161, multi_scale=True).ssim_weight == 0.1


# ---- the model ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 200))
def test_a_size_that_is_refused_names_sizes_that_work(height, width):
    small, message = ReconstructSettings(bottleneck=2, width=1), ""
    try:
        model = build_model(small, spec(height, width))
    except UsageError as error:
        message = str(error)
    if not message:
        with torch.no_grad():
            assert model(torch.rand(1, 1, height, width)).shape == (1, 1, height, width)
        return
    assert message.startswith("--image_size: ") and "\n" not in message
    sizes = [pair for pair in re.findall(r"(\d+) x (\d+)", message) if pair != (str(height), str(width))]
    assert sizes
    for size in sizes:
        build_model(small, spec(*map(int, size)))


def test_the_settings_reach_the_model():
    model = build_model(ReconstructSettings(bottleneck=5, width=3, kl_weight=0.1), spec(16, channels=3))
    assert model.vae and model.encoder[0].out_channels == 3
    assert model.encode(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    assert not build_model(ReconstructSettings(), spec(16)).vae


# ---- what is measured --------------------------------------------------------------------------------------------


class Watched(ConvAutoencoder):
    """An autoencoder that keeps what it saw and what it answered."""

    def forward(self, images, with_kl=False):
        self.seen = images.detach().clone()
        self.answered = super().forward(images, with_kl)
        return self.answered


def measured(changes=None, side=16, training=False, model=None, images=None):
    """Return the model, the images, and what is measured of them."""
    changes = settled(side, **(changes or {}))
    torch.manual_seed(0)
    model = model or Watched((1, side, side), 4, 2, vae=changes.kl_weight > 0)
    images = torch.rand(6, 1, side, side) if images is None else images
    values = build_measure(changes, spec(side))(model.train(training), {"inputs": images})
    return model, images, values


NAMES = {
    "digits": (8, {}, "loss mse psnr"),
    "no SSIM": (16, {"ssim_weight": 0.0}, "loss mse psnr ssim"),
    "both": (16, {}, "loss mse psnr ssim mse_share ssim_share"),
    "SSIM only": (16, {"mse_weight": 0.0}, "loss mse psnr ssim"),
    "VAE": (16, {"kl_weight": 0.1}, "loss mse psnr ssim mse_share ssim_share kl"),
    "multi-scale": (161, {"multi_scale": True}, "loss mse psnr ssim ms_ssim mse_share ssim_share"),
}


@pytest.mark.parametrize("case", NAMES)
def test_evaluation_gives_what_it_says(case):
    side, changes, names = NAMES[case]
    model = torch.nn.Conv2d(1, 1, 1) if side == 161 else None  # of no size that the autoencoder takes
    _, images, values = measured(changes, side, model=model, images=torch.rand(3, 1, side, side))
    assert values.keys() == set(names.split()) == set(metric_names(settled(side, **changes), side >= 11))
    assert all(value.shape == (len(images),) and value.isfinite().all() for value in values.values())


def test_best_metric_may_be_all_that_is_measured():
    for (side, changes, names), ema in itertools.product(NAMES.values(), ("", "ema_")):
        for name in names.split():
            settled(side, best_metric=f"val/{ema}{name}", ema_decay=0.9 if ema else 0.0, **changes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (0.3, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_the_loss_is_the_weighted_sum_of_its_parts(training, alpha, beta):
    _, _, values = measured({"mse_weight": alpha, "ssim_weight": beta}, training=training)
    similarity = values.get("ssim", torch.ones(6))
    torch.testing.assert_close(values["loss"], alpha * values["mse"] + beta * (1 - similarity))
    if alpha and beta:
        torch.testing.assert_close(values["mse_share"], alpha * values["mse"] / values["loss"])
        torch.testing.assert_close(values["mse_share"] + values["ssim_share"], torch.ones(6))


@pytest.mark.parametrize("training", [True, False])
def test_the_divergence_enters_the_loss(training):
    model, _, values = measured({"kl_weight": 0.5}, training=training)
    kl = model.answered[1]
    assert (kl > 0).all() and values["kl"].equal(kl)
    torch.testing.assert_close(values["loss"], values["mse"] + 0.1 * (1 - values["ssim"]) + 0.5 * kl)
    torch.testing.assert_close(values["mse_share"] + values["ssim_share"], torch.ones(6))
    values["loss"].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_scores_cost_training_nothing():
    _, _, values = measured({"ssim_weight": 0.0}, training=True)
    assert values.keys() == {"loss", "mse"}


def test_inputs_of_training_are_noisy_and_targets_clean():
    images = torch.cat([torch.zeros(2, 1, 16, 16), torch.full((2, 1, 16, 16), 0.5), torch.ones(2, 1, 16, 16)])
    kept = images.clone()
    model, _, values = measured({"input_noise_std": 0.3, "ssim_weight": 0.0}, training=True, images=images)
    assert images.equal(kept)
    assert model.seen.min() == 0 and model.seen.max() == 1
    noise = model.seen[2:4] - 0.5
    assert 0.2 < float(noise.std()) < 0.3  # a little is cut off
    assert (model.seen[0] != model.seen[1]).any()
    torch.testing.assert_close(values["mse"], (model.answered - kept).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_evaluation_sees_no_noise(kl_weight):
    model, images, values = measured({"input_noise_std": 0.3, "kl_weight": kl_weight})
    assert model.seen.equal(images)
    assert values["loss"].equal(measured({"input_noise_std": 0.3, "kl_weight": kl_weight})[2]["loss"])


def test_noise_is_that_of_the_seed():
    one, other = (measured({"input_noise_std": 0.3}, training=True)[0].seen for _ in range(2))
    assert one.equal(other)


def test_an_image_that_bf16_answers_exactly_leaves_the_means_finite():
    """A white image of which bf16 makes exactly 1: a sigmoid of 7 is enough."""

    class White(torch.nn.Module):
        def forward(self, images):
            return torch.sigmoid(torch.full_like(images, 7.0).bfloat16())

    _, _, values = measured(model=White(), images=torch.ones(2, 1, 16, 16))
    assert all(value.isfinite().all() for value in values.values())


# ---- refusals from the command line ------------------------------------------------------------------------------


def write_sentences(folder):
    lines = "".join(f'"a good film {number}",{number % 2}\n' for number in range(30))
    (folder / "text.csv").write_text("text,label\n" + lines)
    return folder / "text.csv"


def write_odd_images(folder):
    """Write images of 4 x 6 pixels, which cannot be halved."""
    return write_tree(folder / "odd")


REFUSED = {
    "SSIM of small images": (None, ["--ssim_weight", "0.5"], ["--ssim_weight", "8 x 8"]),
    "multi-scale": (None, ["--multi_scale"], ["--multi_scale", "161"]),
    "mixup": (None, ["--augment", "mixup:0.4"], ["--augment", "mixup"]),
    "no loss": (None, ["--mse_weight", "0", "--ssim_weight", "0"], ["--mse_weight"]),
    "accuracy": (None, ["--best_metric", "val/accuracy"], ["--best_metric", "val/loss", "val/psnr"]),
    "SSIM of digits": (None, ["--best_metric", "val/ssim"], ["--best_metric", "val/loss", "val/psnr"]),
    "bottleneck": (None, ["--bottleneck", "0"], ["--bottleneck"]),
    "width": (None, ["--width", "-1"], ["--width"]),
    "sizes": (write_odd_images, [], ["--image_size", "8 x 8"]),
    "points": (None, ["--dataset", "blobs"], ["blobs", "image"]),
    "a table": (None, ["--dataset", "wine"], ["wine", "image"]),
    "text": (write_sentences, [], ["image"]),
    "labels": (write_odd_images, ["--label_column", "label"], ["--label_column"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_message_and_nothing_written(tmp_path, monkeypatch, capsys, case):
    write, flags, parts = REFUSED[case]
    if write is not None:
        flags = [*flags, "--dataset", str(write(tmp_path))]
    arguments = ["--output_dir", str(tmp_path / "runs"), "--tracker", "none", *flags]
    monkeypatch.setattr(sys, "argv", ["reconstruct.py", *arguments])
    with pytest.raises(SystemExit) as left:
        reconstruct.run()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert all(part in said for part in parts), said
    assert not (tmp_path / "runs").exists()


# ---- preflight ---------------------------------------------------------------------------------------------------


class Detached(ConvAutoencoder):
    def forward(self, images, with_kl=False):
        return super().forward(images, with_kl).detach()


class DetachedBottleneck(ConvAutoencoder):
    def forward(self, images, with_kl=False):
        return self.decode(self.encoder(images).detach())


class Blind(ConvAutoencoder):
    def forward(self, images, with_kl=False):
        return super().forward(torch.full_like(images, 0.5), with_kl)


def of(kind):
    """Return what builds that model."""
    return lambda settings, inputs: kind(inputs.shape, settings.bottleneck, settings.width)


def leave_bytes(subject):
    """Give pixels in 0..255, as they are stored, to the network and to the loss."""
    load, measure, predict = subject.task.load, subject.measure, subject.task.predict

    def as_bytes(batch):
        return {**batch, "inputs": batch["inputs"] * 255}

    subject.measure = lambda model, batch: measure(model, as_bytes(batch))
    subject.task = dataclasses.replace(
        subject.task,
        load=lambda *arguments: as_bytes(load(*arguments)),
        predict=lambda model, batch: predict(model, as_bytes(batch)),
    )


PLANTED = {
    "decoder's output detached": (of(Detached), None, "gradients"),
    "decoder's input detached": (of(DetachedBottleneck), None, "gradient flow"),
    "input ignored": (of(Blind), None, "outputs differ"),
    "pixels in 0..255": (None, leave_bytes, "scale"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_named(tmp_path, bug):
    build, plant, check = PLANTED[bug]
    subject = reconstruct_subject(tmp_path, build=build)
    if plant is not None:
        plant(subject)
    report = examine(subject, QUICK)
    found = {finding.check: finding for finding in report.findings}
    assert found[check].status == "fail" and found[check].causes, report.table()
    assert report.failed


SOUND = {
    "digits": {},
    "noise": {"input_noise_std": 0.3},
    "VAE": {"kl_weight": 1e-3},
    "images": {"batch_size": 20},
    "SSIM only": {"batch_size": 20, "mse_weight": 0.0, "ssim_weight": 1.0},
    "all": {"batch_size": 20, "kl_weight": 1e-2, "input_noise_std": 0.1, "augment": ("crop:2", "flip", "rotate:10")},
}


def alarms(folder, waves, case, seed):
    data = {"dataset": str(waves)} if "batch_size" in SOUND[case] else {}
    report = examine(reconstruct_subject(folder, seed=seed, **data, **SOUND[case]), CHECKS)
    assert statuses(report.findings)["overfit one batch"] == "pass"
    timed = ("saving",)  # of the disk, which others use too
    alarming = [finding for finding in report.findings if finding.status in ("warn", "fail")]
    return [(seed, finding) for finding in alarming if finding.check not in timed]


@pytest.mark.parametrize("case", ["digits", "all"])
def test_sound_settings_raise_no_false_alarm(tmp_path, waves, case):
    assert alarms(tmp_path, waves, case, 0) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", SOUND)
def test_sound_settings_raise_no_false_alarm_with_other_seeds(tmp_path, waves, case):
    assert [alarm for seed in range(4) for alarm in alarms(tmp_path, waves, case, seed)] == []
