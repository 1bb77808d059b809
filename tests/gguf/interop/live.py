"""`python -m tests.gguf.interop.live FOLDER [FIXTURE...]`: holds our files against llama.cpp's, built in FOLDER, and writes down llama.cpp's.

Prints a line for each fixture and each difference. Exit code 1 if there is any but the deliberate ones: then what is written down makes tests fail.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

from tests.gguf.interop.digests import Content, content, differences
from tests.gguf.interop.fixtures import FIXTURES, build, digest
from tests.gguf.interop.ours import AIDED, VECTORS, importance_file, written
from tests.gguf.interop.peer import Job, Peer, peer_at, version


def main(folder: str, *chosen: str) -> int:
    peer = peer_at(Path(folder))
    if peer is None:
        sys.stderr.write(f"{folder}: llama.cpp is not built here; `make interop` builds it\n")
        return 2
    work = Path(folder).absolute() / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    os.chdir(work)  # importance files are named without a path, by us as by them
    sources = {name: build(name, work / "sources") for name in chosen or FIXTURES}
    (work / "bf16").mkdir()
    peer.to_bf16([Job(source, bf16(work, name), FIXTURES[name].mtp) for name, source in sources.items()], work)
    same = [compared(name, source, peer, work) for name, source in sources.items()]
    (VECTORS / "made_by.json").write_text(json.dumps(made_by(), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    say("every file is llama.cpp's own" if all(same) else "there are differences")
    return 0 if all(same) else 1


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def bf16(work: Path, name: str) -> Path:
    return work / "bf16" / f"{name}.gguf"


def compared(name: str, source: Path, peer: Peer, work: Path) -> bool:
    """Every file of a fixture, theirs written down. Whether all are the same."""
    fixture, began = FIXTURES[name], time.perf_counter()
    importance = importance_file(name, content(bf16(work, name)), work) if fixture.importance else ""
    theirs = {kind: quantized(peer, name, kind, "", work) for kind in fixture.types}
    theirs |= {kind + AIDED: quantized(peer, name, kind, importance, work) for kind in fixture.importance}
    ours = written(name, source, work, fixture.types)
    if fixture.importance:
        aided = written(name, source, work, fixture.importance, importance)
        ours |= {kind + AIDED: held for kind, held in aided.items()}
    keep(name, source, theirs)
    said = [(key, line) for key, held in ours.items() for line in differences(held, theirs[key])]
    differing = len({key for key, _ in said})
    say(f"{name:28}{len(ours) - differing:4} of {len(ours)} files the same, {time.perf_counter() - began:.1f} s")
    for key, line in said:
        say(f"    {key}: {line}")
    return not said


def quantized(peer: Peer, name: str, file_type: str, importance: str, work: Path) -> Content:
    out = work / "theirs.gguf"
    peer.quantize(bf16(work, name), out, file_type, importance)
    return content(out)


def keep(name: str, source: Path, theirs: dict[str, Content]) -> None:
    VECTORS.mkdir(parents=True, exist_ok=True)
    metadata = next(iter(theirs.values())).listed()
    assert all(held.listed() == metadata for held in theirs.values())
    document = {"source": digest(source), "metadata": metadata, "files": {key: held.digest() for key, held in theirs.items()}}
    (VECTORS / f"{name}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def made_by() -> dict[str, object]:
    """What the files were made with."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in about.get("flags", "").split() if flag.startswith(("avx", "fma", "f16c", "sse4"))]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"llama.cpp": version(), **versions, "machine": platform.machine(), "processor": about.get("model name", ""), "flags": flags}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
