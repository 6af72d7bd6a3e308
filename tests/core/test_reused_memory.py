"""What a process keeps of the memory that it frees, in a process of its own: the choice is for a whole process."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource
from dllm.core.memory import reuse_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for device in ("cuda", "cpu"):
    reuse_memory(device)
    faults()
    print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library makes its own choice")
def test_memory_that_is_freed_is_used_again_where_a_cpu_computes():
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    by_default, kept = map(int, done.stdout.split())
    assert by_default > 100 and kept < by_default / 10
