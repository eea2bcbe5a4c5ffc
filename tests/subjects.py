"""Runs that are ready to start, for tests of preflight: as the scripts make them, up to where they train."""

import contextlib

import pytest

DIGITS = {
    "dataset": "digits",
    "learning_rate": 5e-3,
    "weight_decay": 1e-2,
    "lr_scheduler": "one_cycle",
    "label_smoothing": 0.1,
    "num_train_epochs": 40,
}


def classify_subject(folder, *, build=None, **settings):
    """Return the Subject that train/classify.py would examine; by default of digits, with its recipe's settings.

    Args:
        folder: for its run.
        build: takes the place of the script's `build_model`, if given.
        settings: of the run.
    """
    from train import classify

    return _ready(classify, classify.ClassifySettings, folder, build, {**DIGITS, **settings})


def reconstruct_subject(folder, *, build=None, **settings):
    """Return the Subject that train/reconstruct.py would examine; by default of digits."""
    from train import reconstruct

    return _ready(reconstruct, reconstruct.ReconstructSettings, folder, build, settings)


def _ready(script, kind, folder, build, settings):
    from train.engine import training

    subjects = []
    defaults = {"preflight": "full", "output_dir": str(folder), "tracker": ("none",)}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
        patch.setattr(training, "carry_out", lambda subject, *_: subjects.append(subject))
        if build is not None:
            patch.setattr(script, "build_model", build)
        script.main(kind(**{**defaults, **settings}))
    (subject,) = subjects
    if subject.session.run is not None:
        subject.session.run.close()
    return subject


def statuses(findings):
    """Return the status of each check by its name."""
    return {finding.check: finding.status for finding in findings}
