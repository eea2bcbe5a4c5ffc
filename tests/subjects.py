"""Runs that are ready to start, for tests of preflight: as train/classify.py makes them, up to where it trains."""

import contextlib

import pytest


class _Ready(Exception):
    """Carries the subject out of the script."""


def classify_subject(folder, *, build=None, **settings):
    """Return the Subject that train/classify.py would examine.

    Args:
        folder: for its run.
        build: takes the place of the script's `build_model`, if given.
        settings: of the run; by default digits with the first recipe's settings.
    """
    from train import classify
    from train.engine import preflight

    def ready(subject):
        raise _Ready(subject)

    defaults = {
        "dataset": "digits",
        "learning_rate": 5e-3,
        "weight_decay": 1e-2,
        "lr_scheduler": "one_cycle",
        "label_smoothing": 0.1,
        "num_train_epochs": 40,
        "output_dir": str(folder),
        "tracker": "none",
    }
    settings = classify.ClassifySettings(**{**defaults, "preflight": "full", **settings})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Ready) as caught:
        patch.setattr(preflight, "preflight", ready)
        patch.setattr(preflight, "warn", ready)
        if build is not None:
            patch.setattr(classify, "build_model", build)
        with contextlib.redirect_stdout(None):
            classify.main(settings)
    (subject,) = caught.value.args
    if subject.session.run is not None:
        subject.session.run.close()
    return subject


def statuses(findings):
    """Return the status of each check by its name."""
    return {finding.check: finding.status for finding in findings}
