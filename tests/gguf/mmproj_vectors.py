"""Makes tests/vectors/mmproj anew with llama.cpp's own converter: `python -m tests.gguf.mmproj_vectors LLAMA_CPP`, a checkout of its source."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

from glmconv.engine.inputs import InputFolder
from glmconv.formats.gguf_header import read_header
from glmconv.toy.build import ToyOptions, build

VECTORS = Path(__file__).parents[1] / "vectors/mmproj"
TOY = ToyOptions(layers=1, experts=2, scale=Fraction(1, 64), mtp=False, file_size=200_000)  # the tower lies in several files
MADE = {
    "glm4.5v-108B-A12B": ("auto", "f32", "f16", "q8_0"), "glm4.6v-108B-A12B": ("bf16",), "glm5.3-flash-321B": ("auto", "f16", "q8_0"),
}  # fmt: skip


def described(path: Path) -> dict[str, object]:
    """A file's header, and the hashes of its tensors' bytes."""
    header, content = read_header(InputFolder(path.parent).open(path.name)), path.read_bytes()
    hashes = {name: hashlib.sha256(content[t.offset : t.offset + t.size]).hexdigest() for name, t in header.tensors.items()}
    return {"header": base64.b64encode(content[: header.data_start]).decode(), "tensors": hashes}


def main(llama_cpp: str) -> None:
    command = [sys.executable, f"{llama_cpp}/convert_hf_to_gguf.py", "--mmproj"]
    for preset, types in MADE.items():
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder) / preset, Path(folder) / "mmproj.gguf"
            build(preset, source, TOY)
            for name in types:
                environment = os.environ | {"PYTHONPATH": f"{llama_cpp}/gguf-py"}
                subprocess.run([*command, "--outtype", name, "--outfile", str(out), str(source)], check=True, env=environment)
                found[name] = described(out)
        (VECTORS / f"{preset}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
