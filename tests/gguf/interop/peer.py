"""llama.cpp's two steps, as `make interop` builds them: convert_hf_to_gguf.py to a bf16 file, then llama-quantize."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONVERTER = Path(__file__).with_name("converter.py")
PINNED = Path(__file__).with_name("llama_cpp.txt")


@dataclass(frozen=True)
class Job:
    """A folder to be converted to a bf16 file."""

    source: Path
    out: Path
    mtp: bool = True

    @property
    def arguments(self) -> list[str]:
        return [str(self.source), "--outfile", str(self.out), "--outtype", "bf16", *([] if self.mtp else ["--no-mtp"])]


@dataclass(frozen=True)
class Peer:
    """`source` is llama.cpp's repository, `programs` the folder of llama-quantize."""

    source: Path
    programs: Path

    def to_bf16(self, jobs: Sequence[Job], work: Path) -> None:
        """All in one process: loading transformers takes longer than the work."""
        listed = work / "jobs.json"
        listed.write_text(json.dumps([job.arguments for job in jobs]), encoding="utf-8")
        run([sys.executable, CONVERTER, self.source, listed], work)

    def quantize(self, bf16: Path, out: Path, file_type: str, importance: str = "", threads: int = 2) -> None:
        """`importance` is a file's name in the folder of `out`: what is passed is what is recorded."""
        aided = ["--imatrix", importance] if importance else []
        run([self.programs / "llama-quantize", *aided, bf16, out, file_type, threads], out.parent)


def peer_at(folder: Path) -> Peer | None:
    """The llama.cpp that `make interop` has built in `folder`; None if it has not."""
    found = Peer(folder.absolute() / "vendor/llama.cpp", folder.absolute() / "build/bin")
    return found if (found.programs / "llama-quantize").is_file() else None


def version() -> str:
    """The pinned package, as name==version."""
    return PINNED.read_text(encoding="utf-8").splitlines()[1].split()[0]


def run(command: Sequence[object], folder: Path) -> None:
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(part) for part in command)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
