"""The package is held against docs/architecture.md on its syntax tree: who imports whom, what is never called, how big a file grows."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "glmconv"
# From the roof down. A room imports from the floors below its own: not from above, and not from another room of its floor.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"fleet"},
    {"convert", "check", "calibration", "toy"},
    {"checkpoint", "targets"},
    {"formats"},
    {"engine", "codecs", "archs"},
    {"kernels"},
    {"strict_json"},
    {"errors", "dtypes", "encoding"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
BANNED = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle", "marshal", "shelve", "torch.load", "joblib",  # run what they read
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader",
    "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__",
    "subprocess", "os.system", "os.popen", "runpy", "jinja2", "transformers", "megatron",
    "mmap", "numpy.memmap", "safetensors.safe_open", "safetensors.torch", "safetensors.numpy", "gguf.GGUFReader",  # faults there are signals
    "shutil.rmtree", "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.move",  # delete or follow links
}  # fmt: skip
# One module may do what no other may, each for a reason: copies to other machines are rsync's and ssh's work.
ALLOWED = {("fleet/programs.py", "subprocess")}
FORBIDDEN_KEYWORDS = {("allow_pickle", True), ("trust_remote_code", True), ("shell", True), ("weights_only", False)}
TORCH_AT_TOP = {"codecs", "kernels"}  # elsewhere torch is imported where it is needed: the command line answers at once
NO_TORCH = {"archs"}
NO_NOUN = {"utils", "util", "helpers", "helper", "common", "base", "misc", "manager", "handler"}
BIG_FILE, BIG_FUNCTION = 500, 70


@dataclass(frozen=True)
class Module:
    """One source file of the package. `where` is relative to the package."""

    where: Path
    text: str

    @property
    def room(self) -> str:
        """The first component; empty for the package's own `__init__.py`."""
        first = self.where.parts[0].removesuffix(".py")
        return "" if first == "__init__" else first

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def imports(self) -> Iterator[tuple[ast.stmt, str, str]]:
        """Every import as (statement, local name, full dotted name)."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node, alias.asname or alias.name.split(".")[0], alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                folder = ("glmconv", *self.where.parts[: len(self.where.parts) - node.level]) if node.level else ()
                module = ".".join((*folder, *([node.module] if node.module else [])))
                yield from ((node, alias.asname or alias.name, f"{module}.{alias.name}") for alias in node.names)

    def references(self) -> Iterator[tuple[int, str]]:
        """Every name that is used, as (line, dotted name), imports' aliases resolved; what is not imported counts as a builtin."""
        meaning = {local: full if local != full.split(".")[0] else local for _, local, full in self.imports()}
        for node, _, full in self.imports():
            yield node.lineno, full
        for reference in ast.walk(self.tree):
            if isinstance(reference, ast.Attribute | ast.Name):
                first, *rest = dotted(reference).split(".")
                yield reference.lineno, ".".join((meaning.get(first, f"builtins.{first}"), *rest))


def dotted(node: ast.expr) -> str:
    """`a.b.c` as it is written; `?` for a part that is not a name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def arrows(module: Module) -> Iterator[str]:
    """Imports of a room that is not below."""
    if module.room and module.room not in FLOOR:
        yield f"{module.where}: the room {module.room} has no floor in docs/architecture.md"
    for node, _, full in module.imports():
        package, _, rest = full.partition(".")
        target = rest.split(".")[0]
        if package == "glmconv" and module.room in FLOOR and target != module.room and FLOOR.get(target, -1) <= FLOOR[module.room]:
            yield f"{module.where}:{node.lineno}: {module.room} imports {target or 'the package'}"


def torch_imports(module: Module) -> Iterator[str]:
    """torch where there must be none, or where it would be imported by `glmconv --help`."""
    deferred = {id(inner) for node in ast.walk(module.tree) if defers(node) for inner in ast.walk(node)}
    for node, _, full in module.imports():
        if full.split(".")[0] == "torch" and (module.room in NO_TORCH or (id(node) not in deferred and module.room not in TORCH_AT_TOP)):
            yield f"{module.where}:{node.lineno}: imports torch"


def defers(node: ast.AST) -> bool:
    """Whether imports inside do not run when the module is imported."""
    checking = isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")
    return checking or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def banned(module: Module) -> Iterator[str]:
    for line, name in module.references():
        broken = {word for word in BANNED if name == word or name.startswith(word + ".")}
        if broken and not all((str(module.where), word) in ALLOWED for word in broken):
            yield f"{module.where}:{line}: {name}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{module.where}:{node.lineno}: bare except"
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and (node.arg, node.value.value) in FORBIDDEN_KEYWORDS:
            yield f"{module.where}:{node.lineno}: {node.arg}={node.value.value}"


def big(module: Module) -> Iterator[str]:
    lines = len(module.text.splitlines())
    if lines > BIG_FILE:
        yield f"{module.where}: {lines} lines"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > BIG_FUNCTION:
                yield f"{module.where}:{node.lineno}: {node.name} has {length} lines"


def nameless(module: Module) -> Iterator[str]:
    for part in module.where.parts:
        if part.removesuffix(".py") in NO_NOUN:
            yield f"{module.where}: {part} is no noun of ours"


RULES = (arrows, torch_imports, banned, big, nameless)
MODULES = [Module(path.relative_to(PACKAGE), path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert len(MODULES) > 20
    assert [line for module in MODULES for line in rule(module)] == []


@pytest.mark.parametrize(
    ("rule", "where", "text"),
    [
        (arrows, "engine/plan.py", "from glmconv.formats import FORMATS"),
        (arrows, "engine/plan.py", "from glmconv import formats"),
        (arrows, "engine/plan.py", "from ..formats.format import Format"),
        (arrows, "engine/plan.py", "import glmconv.archs"),
        (arrows, "engine/plan.py", "from glmconv import open_checkpoint"),
        (arrows, "checkpoint.py", "def f():\n    from .cli import main"),
        (arrows, "errors.py", "from glmconv.dtypes import DType"),
        (arrows, "cellar.py", "x = 1"),
        (torch_imports, "archs/spec.py", "def f():\n    import torch"),
        (torch_imports, "formats/huggingface.py", "import torch.nn as nn"),
        (torch_imports, "formats/huggingface.py", "try:\n    from torch import Tensor\nexcept ImportError:\n    Tensor = None"),
        (banned, "checkpoint.py", "import torch as t\nt.load(path)"),
        (banned, "checkpoint.py", "from pickle import loads as read\nread(data)"),
        (banned, "checkpoint.py", "import pickle\nclass Own(pickle.Unpickler): ..."),
        (banned, "checkpoint.py", "read = eval"),
        (banned, "checkpoint.py", "import numpy as np\nnp.memmap(path)"),
        (banned, "checkpoint.py", "import numpy as np\nnp.load(path, allow_pickle=True)"),
        (banned, "checkpoint.py", "import subprocess"),
        (banned, "fleet/sync.py", "import subprocess"),
        (banned, "fleet/programs.py", "import os\nos.system(line)"),
        (banned, "fleet/programs.py", "import subprocess\nsubprocess.run(line, shell=True)"),
        (banned, "checkpoint.py", "from yaml import FullLoader"),
        (banned, "checkpoint.py", "import shutil\nshutil.copy2(a, b)"),
        (banned, "checkpoint.py", "def f():\n    from safetensors import safe_open"),
        (banned, "checkpoint.py", "try:\n    f()\nexcept:\n    pass"),
        (big, "checkpoint.py", "x = 1\n" * 501),
        (big, "checkpoint.py", "def f():\n" + "    x = 1\n" * 70),
        (nameless, "formats/utils.py", ""),
        (nameless, "helpers/read.py", ""),
    ],
)  # fmt: skip
def test_a_broken_rule_is_found(rule, where, text):
    assert list(rule(Module(Path(where), text))) != []


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("formats/torch_dist.py", "from glmconv.engine.plan import Plan\nfrom glmconv.formats.dcp import read\nfrom glmconv import strict_json"),
        ("engine/queue.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch.distributed"),
        ("formats/run_config.py", "import yaml\nclass Plain(yaml.SafeLoader): ...\nyaml.safe_load(text)"),
        ("engine/files.py", "import re, shutil\nre.compile(x)\nshutil.disk_usage(path)\ndef f(disk, megatron):\n    disk.load(megatron); disk.exec"),
        ("__init__.py", "from glmconv.convert import convert"),
        ("fleet/programs.py", "import subprocess\nsubprocess.Popen(['rsync', '--', a, b])"),
    ],
)
def test_what_is_allowed_is_not_found(where, text):
    module = Module(Path(where), text)
    assert [line for rule in RULES for line in rule(module)] == []


def test_the_command_line_starts_without_torch_numpy_or_the_hub():
    code = "import sys, glmconv.cli; print(*sorted({'torch', 'numpy', 'huggingface_hub', 'yaml', 'safetensors'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert found.stdout.strip() == ""
