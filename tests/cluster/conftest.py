"""What the tests with a real SLURM, or with machines of their own, share.

With pytest-xdist each worker that gets such a test starts a SLURM of its own, in a second and with ports and a folder
of its own: so nothing is shared, and nobody waits for another worker.
"""

import pytest

from tests.cluster import network as network_module
from tests.cluster.slurm import Slurm, missing_reason


def pytest_collection_modifyitems(items):
    """Everything in this folder is about a cluster."""
    for item in items:
        if "/cluster/" in str(item.path):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def slurm():
    """A SLURM with the nodes n1 and n2, both this machine."""
    reason = missing_reason()
    if reason is not None:
        pytest.skip(reason)
    with Slurm() as running:
        yield running


@pytest.fixture
def network():
    """Two machines m0 and m1 with addresses and processes of their own."""
    reason = network_module.missing_reason()
    if reason is not None:
        pytest.skip(reason)
    with network_module.Network(2) as running:
        yield running
