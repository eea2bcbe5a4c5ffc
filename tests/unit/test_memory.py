"""Freed memory is kept for the next step, and does not pile up."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")

# Tensors of 24 MB come and go, as in the steps of a network; then of many sizes, as batches of texts have them.
STEPS = """
import random, resource, sys
import psutil, torch
from train.engine.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def step(size):
    return sum(torch.ones(size + 1000 * number).sum() for number in range(4))

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
step(6_000_000)
before = faults()
for _ in range(20):
    step(6_000_000)
print(faults() - before)
draw, held = random.Random(0), []
for number in range(400):
    step(draw.randrange(1_000, 6_000_000))
    if number in (99, 399):
        held.append(psutil.Process().memory_info().rss)
print(held[1] / held[0])
"""


def test_the_next_step_gets_the_memory_of_the_last():
    def run(how):
        command = [sys.executable, "-c", STEPS, how]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return [float(line) for line in found.stdout.split()]

    faults, growth = run("keep")
    assert faults < 1000 < run("leave")[0]  # a page of 4 kB each: 20 steps touch 480,000 of them
    assert growth < 1.1
