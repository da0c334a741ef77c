"""Freed memory is kept: what a step frees need not be cleared page by page for the next one."""

import subprocess
import sys

import pytest

# In a process of its own, since the setting is for a whole process. Prints the page faults of ten rounds of allocating,
# filling and freeing 64 MiB in four blocks, as a training step does with its activations.
ROUNDS = """
import resource, sys
import numpy as np
from unrote.training.heap import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("not glibc")

def round():
    blocks = [np.full(4 << 20, 1.0, dtype=np.float32) for _ in range(4)]

for _ in range(3):
    round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode):
    run = subprocess.run([sys.executable, "-c", ROUNDS, mode], capture_output=True, text=True, check=False)
    if "not glibc" in run.stderr:
        pytest.skip("the C library has no such setting")
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_freed_memory_is_not_faulted_in_again():
    assert page_faults("keep") < 200 < page_faults("as it is")
