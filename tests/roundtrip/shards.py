"""Folders' bytes, and safetensors files taken apart and put together by hand: the tests' own reading of the format, a dozen lines."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

ITEMSIZE = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
INDEX = "model.safetensors.index.json"
MANIFEST = "glmconv_manifest.json"


def contents(root: Path) -> dict[str, bytes]:
    """Every file's bytes by its name, without the run's own state in .glmconv/."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {name: path.read_bytes() for path in files if not (name := str(path.relative_to(root))).startswith(".glmconv/")}


def release(root: Path) -> dict[str, bytes]:
    """A release's files: its contents without our manifest, which tells what it was made of."""
    return {name: data for name, data in contents(root).items() if name != MANIFEST}


def marks(root: Path) -> dict[Path, tuple[int, int, int]]:
    """What any change of a file or folder below `root`, or of its name, would change."""
    return {path: (found.st_ino, found.st_mtime_ns, found.st_ctime_ns) for path in [root, *root.rglob("*")] for found in [path.lstat()]}


def copied(source: Path, target: Path) -> Path:
    """A copy that may be broken: as a download would be, without our state and manifest."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".glmconv", MANIFEST))
    return target


@dataclass
class Stored:
    """One tensor of a file."""

    dtype: str
    shape: list[int]
    data: bytes


def load(path: Path) -> dict[str, Stored]:
    """A file's tensors, in the order of their bytes."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = {name: entry for name, entry in json.loads(raw[8:begin]).items() if name != "__metadata__"}
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    return {name: Stored(e["dtype"], e["shape"], raw[slice(*(begin + at for at in e["data_offsets"]))]) for name in order if (e := header[name])}


def save(path: Path, tensors: dict[str, Stored]) -> None:
    """A well-formed file of these tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        assert len(tensor.data) == math.prod(tensor.shape) * ITEMSIZE[tensor.dtype], name
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + len(tensor.data)]}
        at += len(tensor.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensor.data for tensor in tensors.values()))


def home(root: Path, tensor: str) -> Path:
    """The file that holds a tensor."""
    return root / json.loads((root / INDEX).read_bytes())["weight_map"][tensor]


@dataclass
class Surgery:
    """One file of a folder taken apart: change `tensors`, then `close`."""

    file: Path
    tensors: dict[str, Stored]

    @classmethod
    def at(cls, root: Path, tensor: str) -> Surgery:
        """On the file that holds `tensor`."""
        file = home(root, tensor)
        return cls(file, load(file))

    def close(self) -> None:
        save(self.file, self.tensors)


def reindexed(root: Path) -> None:
    """Write the index anew, of what the shards hold now."""
    weight_map = {tensor: path.name for path in sorted(root.glob("*.safetensors")) for tensor in load(path)}
    (root / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
