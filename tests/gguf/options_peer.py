"""What llama-quantize and llama-gguf-split make of a toy with options: `python -m tests.gguf.options_peer FOLDER_OF_BINARIES` stores it anew."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

from glmconv import convert
from glmconv.engine.inputs import InputFolder
from glmconv.formats.gguf_header import GgufHeader, read_header
from glmconv.toy.build import ToyOptions, build
from tests.gguf.importance import written

VECTORS = Path(__file__).parents[1] / "vectors/gguf_options/peer.json"
PRESET = "glm4.7-flash-30B-A3B"
TOY = ToyOptions(layers=2, experts=4, scale=Fraction(1, 8))
NEW, OLD = ("--imatrix", "new.imatrix"), ("--imatrix", "old.imatrix")
TYPED = ("--tensor-type", "ATTN_OUT.*=q5_k", "--tensor-type", "ffn_(up|gate)_exps=Q3_K", "--token-embedding-type", "q8_0")
QUANTIZED = {  # llama-quantize's options, which are ours: case -> (file type, options)
    "importance": ("Q4_K_M", NEW),
    "importance, whole rows": ("Q4_0", NEW),
    "importance, old form": ("IQ4_XS", OLD),
    "types": ("Q4_K_M", TYPED),
    "types and importance": ("Q2_K", (*TYPED, *NEW)),
    "pure": ("Q4_K_M", ("--pure", "--output-tensor-type", "q5_1")),
}
SPLIT = {"size": ("--split-max-size", "6M"), "tensors": ("--split-max-tensors", "7"), "one": ("--split-max-size", "1G")}


def header(path: Path) -> GgufHeader:
    return read_header(InputFolder(path.parent).open(path.name))


def seen(path: Path) -> dict[str, object]:
    """What is compared of a file: its tensors and their bytes, and its last keys. Other keys are the interest of other tests."""
    found = header(path)
    tail = [[key, value.kind.name, value.value] for key, value in found.kv.items() if key.startswith(("quantize.", "split."))]
    types = " ".join(f"{name}={tensor.type.name}" for name, tensor in found.tensors.items())
    data = hashlib.sha256(path.read_bytes()[found.data_start :]).hexdigest()
    return {"more keys": len(found.kv) > len(tail), "tail": tail, "tensors": types, "data": data}


def made(path: Path) -> dict[str, Path]:
    """The toy, and the files that every case begins with."""
    build(PRESET, path / "toy", TOY)
    convert(path / "toy", {"gguf:BF16": path / "bf16.gguf"})
    tensors = header(path / "bf16.gguf").tensors
    return {"new.imatrix": written(tensors, path / "new.imatrix"), "old.imatrix": written(tensors, path / "old.imatrix", old=True)}


def main(binaries: str) -> None:
    stored: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        made(path)

        def call(*command: str) -> None:
            subprocess.run([str(Path(binaries) / command[0]), *command[1:]], cwd=path, check=True, capture_output=True)

        for case, (file_type, options) in QUANTIZED.items():
            call("llama-quantize", *options, "bf16.gguf", "out.gguf", file_type, "2")
            stored[case] = seen(path / "out.gguf")
        call("llama-quantize", "bf16.gguf", "out.gguf", "Q8_0", "2")
        for case, options in SPLIT.items():
            (path / case).mkdir()
            call("llama-gguf-split", "--split", *options, "out.gguf", f"{case}/A")
            stored[case] = {file.name: seen(file) for file in sorted((path / case).iterdir())}
    VECTORS.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
