"""The Triton kernels without a GPU: run by Triton's interpreter, which does their arithmetic in numpy, and compiled for a GPU that is not there.

Whether a kernel is interpreted is fixed when Triton is imported. So each test is a process of its own: TRITON_INTERPRET here would also bind
test_gpu.py, and any library that compiles kernels. What they check is in triton_cases.py and triton_cases_ggml.py; test_gpu.py runs it on a device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.kernels.triton_cases_ggml import CASES

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@needs_triton
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "weighed"])
def test_interpreted_kernels_give_the_blocks_of_ggml(weighed):
    cases = [name for name in CASES if name.endswith("-weighed") == weighed]
    assert len(cases) > 10
    done = python("-m", "tests.kernels.triton_cases_ggml", *cases, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.parametrize("cases", [("each_value", "each_code"), ("blocks", "mx", "nothing"), ("packed", "awq")], ids=" ".join)
def test_interpreted_kernels_give_the_bytes_of_the_compiled_loops(cases):
    done = python("-m", "tests.kernels.triton_cases", *cases, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@needs_triton
def test_the_code_for_a_gpu_rounds_each_operation_and_flushes_nothing(tmp_path):
    done = python("-m", "tests.kernels.triton_ptx", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_without_triton_one_error_says_so():
    done = python("-c", "import sys; sys.modules['triton'] = None; import glmconv.kernels.gpu.fp8")
    assert done.stderr.endswith("ImportError: glmconv.kernels.gpu needs Triton, which is not installed here: pip install triton\n")
