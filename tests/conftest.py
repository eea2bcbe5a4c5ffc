"""What all tests share: caches of their own, no network, one thread."""

import os
import shutil
import tempfile

import pytest

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "WANDB_MODE": "offline"}


def pytest_configure(config):
    # Before any test module is imported: `datasets` reads these once, at its import. Child processes inherit them.
    config.hf_home = tempfile.mkdtemp(prefix="tests-hf-")
    os.environ["HF_HOME"] = config.hf_home
    os.environ["XDG_CACHE_HOME"] = os.path.join(config.hf_home, "xdg")  # of decoded images
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN"):
        os.environ.pop(name, None)  # they would win over HF_HOME
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_unconfigure(config):
    shutil.rmtree(config.hf_home, ignore_errors=True)


@pytest.hookimpl(trylast=True)  # after the folders have marked their tests
def pytest_collection_modifyitems(items):
    """Order tests so that no worker is left with long ones at the end; those of clusters mostly wait."""
    markers = ("cluster", "slow", "process")

    def place(item):
        return next((place for place, name in enumerate(markers) if item.get_closest_marker(name)), len(markers))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)
