"""Kernels work where nothing can be kept on the disk, and numba is imported for kernels alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import glmconv.kernels
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


def test_an_edit_of_what_a_kernel_calls_in_another_file_compiles_it_anew(tmp_path):
    copy = tmp_path / "glmconv"
    shutil.copytree(Path(glmconv.kernels.__file__).parent, copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "__init__.py").touch()
    code = "import numpy as np\nfrom glmconv.kernels import fp8\nprint(fp8.largest(np.ones((1, 1), np.float32), 'division')[0])"

    def found() -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout.strip()

    assert found() == "1.0"
    assert list(tmp_path.rglob("fp8._largest*.nbi"))
    floats = copy / "kernels" / "floats.py"
    floats.write_text(floats.read_text().replace("return real(u32(x))", "return f32(2) * real(u32(x))"))
    assert found() == "2.0"
