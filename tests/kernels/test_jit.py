"""Kernels work where nothing can be kept on the disk, and numba is imported for kernels alone."""

from __future__ import annotations

import subprocess
import sys

from glmconv.kernels.jit import kernel


def test_a_kernel_whose_file_has_no_cache_folder_is_compiled_all_the_same():
    names: dict[str, object] = {}
    exec(compile("def double(x):\n    return 2 * x", "<no file>", "exec"), names)  # numba finds no folder for it, as in a read-only install
    double = kernel(names["double"])
    assert double(21) == 42
    assert double.stats.cache_path is None


def test_numba_is_not_imported_by_the_package_or_its_command_line():
    code = "import sys, glmconv, glmconv.cli, glmconv.convert, glmconv.kernels.nonfinite; print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
