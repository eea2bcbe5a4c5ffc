"""Freed memory is kept for the next step, and does not pile up."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")

# Tensors of 40 MB come and go, as in the steps of a network; then of many sizes, as batches of texts have them. Up to
# 32 MB glibc itself learns to keep them.
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
for _ in range(5):  # the heap finds its size
    step(10_000_000)
before = faults()
for _ in range(20):
    step(10_000_000)
print(faults() - before)
draw, held = random.Random(0), []
for number in range(300):
    step(draw.randrange(1_000, 10_000_000))
    if number in (99, 299):
        held.append(psutil.Process().memory_info().rss)
print(held[1] / held[0])
"""


def test_the_next_step_gets_the_memory_of_the_last():
    def run(how):
        command = [sys.executable, "-c", STEPS, how]
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return [float(line) for line in found.stdout.split()]

    faults, growth = run("keep")
    # 781,000 pages of 4 kB, if they come anew; a heap that has to grow once more gets one tensor, 9,770.
    assert faults < run("leave")[0] / 20
    assert growth < 1.1
