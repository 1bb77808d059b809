"""Times Hugging Face -> quantized GGUF in one pass against llama.cpp's two steps in the same run, and the kernels against ggml's own.

    python bench/gguf.py [--model glm4.5|air|both] [--type Q4_K_M] [--threads 2] [--scale 1] [--repeat 1] [--peer build/interop] [--work build/bench]

The models have true widths but few layers, experts and tokens: 2 GB of bfloat16 (`--scale 1/2` halves the widths). Ours is `glmconv convert
--verify none`, which hashes every byte and fsyncs; theirs is convert_hf_to_gguf.py to bf16, llama-quantize and `sync -f`. Both begin with the source
in the page cache, and their files are compared. Kernels: millions of weights a second on one thread, ours from bfloat16 as the engine drives it,
ggml's `ggml_quantize_chunk` from float32. `make interop` builds llama.cpp in build/interop; without it theirs is left out. Exit code 1 if a goal
is not reached.
"""

from __future__ import annotations

import argparse
import ctypes
import filecmp
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from rates import fastest, weights
from watch import Watched, machine, run

from glmconv.codecs.ggml import TYPES, GgmlEncoder
from glmconv.dtypes import BY_NAME
from glmconv.toy.build import ToyOptions, build

ROOT = Path(__file__).parents[1]
CONVERTER = ROOT / "tests/gguf/interop/converter.py"
MODELS = {"glm4.5": ("glm4.5-355B-A32B", 16), "air": ("glm4.5-106B-A12B", 32)}  # preset, experts
VOCABULARY = 8192
FASTER = 7  # the whole way
ANONYMOUS = 512 << 20
KERNELS = {"Q4_K": 5, "Q5_K": 4, "Q6_K": 4, "IQ4_XS": 10, "Q3_K": 0, "Q2_K": 0, "IQ4_NL": 0, "Q8_0": 0}  # type -> times ggml that is wanted
STEPS_HEAD = f"{'':34}{'s':>8}{'read GB':>9}{'written':>9}{'CPU s':>8}{'RSS MB':>8}{'anon':>7}"
KERNELS_HEAD = f"{'M weights/s':12}{'ours':>8}{'ggml':>8}{'times':>8}{'wanted':>8}   {'imatrix':>8}{'ggml':>8}{'times':>8}"


@dataclass(frozen=True)
class Step:
    """One process of one way. Bytes are of the files that it reads and writes."""

    what: str
    watched: Watched
    read: int
    written: int

    def __str__(self) -> str:
        took = self.watched
        rates = f"{took.seconds:8.2f}{self.read / 1e9:9.2f}{self.written / 1e9:9.2f}{took.cpu:8.1f}"
        return f"{self.what:34}{rates}{took.peak_rss / 1e6:8.0f}{took.peak_anonymous / 1e6:7.0f}"


@dataclass(frozen=True)
class Way:
    """From the release to the quantized file."""

    steps: Sequence[Step]

    @property
    def seconds(self) -> float:
        return sum(step.watched.seconds for step in self.steps)


def main() -> None:
    options = parse()
    peer = options.peer if (options.peer / "build/bin/llama-quantize").is_file() else None
    if peer is None:
        print(f"llama.cpp is not built in {options.peer} (`make interop` builds it): left out", file=sys.stderr)
    print(f"{machine()}; load {os.getloadavg()[0]:.1f} before; {options.threads} threads")
    kept = [kernels(options, peer)] if options.what != "way" else []
    if options.what != "kernels":
        kept += [whole_way(model, options, peer) for model in MODELS if options.model in (model, "both")]
    print("as wanted" if all(kept) else "a goal is not reached")
    raise SystemExit(0 if all(kept) else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("kernels", "way", "both"), default="both")
    parser.add_argument("--model", choices=(*MODELS, "both"), default="both")
    parser.add_argument("--type", default="Q4_K_M", help="the file type")
    parser.add_argument("--types", default=",".join(KERNELS), help="the kernels")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scale", type=Fraction, default=Fraction(1), help="of the models' widths")
    parser.add_argument("--rows", type=int, default=512, help="of 4096 weights, for the kernels")
    parser.add_argument("--repeat", type=int, default=1, help="turns, of which the fastest counts")
    parser.add_argument("--peer", type=Path, default=ROOT / "build/interop", help="where `make interop` built llama.cpp")
    parser.add_argument("--work", type=Path, default=ROOT / "build/bench", help="what is made in it is deleted")
    return parser.parse_args()


def whole_way(model: str, options: argparse.Namespace, peer: Path | None) -> bool:
    """Both ways by turns; whether the goals are reached."""
    preset, experts = MODELS[model]
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="glmconv-bench-", dir=options.work) as name:
        folder = Path(name).resolve()
        tiny, source = folder / "tiny", folder / model
        build(preset, tiny, ToyOptions(layers=2, experts=4, scale=Fraction(1, 16), mtp=False))
        ours(tiny, folder, options)  # compiles
        build(preset, source, ToyOptions(layers=2, experts=experts, scale=options.scale, mtp=False, vocabulary=VOCABULARY))
        os.sync()
        turns = []
        for _ in range(options.repeat):
            mine = ours(source, folder, options)
            theirs = two_steps(source, folder, options, peer) if peer else None
            same = theirs is None or filecmp.cmp(folder / "ours.gguf", folder / "theirs.gguf", shallow=False)
            turns.append((mine, theirs, same))
    mine = min((turn[0] for turn in turns), key=lambda way: way.seconds)
    print(f"\n{model}: 2 layers, {experts} experts, widths x {options.scale}, {options.type}\n{STEPS_HEAD}\n{mine.steps[0]}")
    anonymous = max(turn[0].steps[0].watched.peak_anonymous for turn in turns)
    if not peer:
        return anonymous <= ANONYMOUS
    theirs = min((turn[1] for turn in turns if turn[1]), key=lambda way: way.seconds)
    same = all(turn[2] for turn in turns)
    times = theirs.seconds / mine.seconds
    print(*theirs.steps, sep="\n")
    print(f"{'two steps':34}{theirs.seconds:8.2f}   x {times:.2f}, wanted {FASTER}; the files are {'the same' if same else 'NOT THE SAME'}")
    return same and times >= FASTER and anonymous <= ANONYMOUS


def ours(source: Path, folder: Path, options: argparse.Namespace) -> Way:
    out = folder / "ours.gguf"
    out.unlink(missing_ok=True)
    shutil.rmtree(folder / "ours.gguf.glmconv", ignore_errors=True)
    command = [sys.executable, "-m", "glmconv", "convert", str(source), "--to", f"gguf:{options.type}={out}"]
    watched = run([*command, "--verify", "none", "-q", "-j", str(options.threads)])
    return Way([Step(f"glmconv convert --to gguf:{options.type}", watched, size(source), size(out))])


def two_steps(source: Path, folder: Path, options: argparse.Namespace, peer: Path) -> Way:
    middle, out, jobs = folder / "bf16.gguf", folder / "theirs.gguf", folder / "jobs.json"
    middle.unlink(missing_ok=True)
    out.unlink(missing_ok=True)
    os.sync()
    jobs.write_text(json.dumps([[str(source), "--outfile", str(middle), "--outtype", "bf16"]]))
    threads = f"OMP_NUM_THREADS={options.threads}"
    first = run(["env", threads, "HF_HUB_OFFLINE=1", sys.executable, str(CONVERTER), str(peer / "vendor/llama.cpp"), str(jobs)])
    second = run([str(peer / "build/bin/llama-quantize"), str(middle), str(out), options.type, str(options.threads)])
    last = run(["sync", "-f", str(out)])
    read, between, written = size(source), size(middle), size(out)
    return Way(
        [Step("convert_hf_to_gguf.py to bf16", first, read, between), Step("llama-quantize", second, between, written), Step("sync -f", last, 0, 0)]
    )


def size(path: Path) -> int:
    """Bytes of a file, or of a folder's weights."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))


def kernels(options: argparse.Namespace, peer: Path | None) -> bool:
    """One line for each type; whether ours are as much faster as is wanted."""
    bits = weights(options.rows, 4096).view(torch.uint16).numpy()
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    importance = np.random.default_rng(0).random(bits.shape[1], np.float32) + np.float32(0.1)
    ggml = ctypes.CDLL(str(peer / "build/bin/libggml-base.so")) if peer else None
    print(KERNELS_HEAD)
    kept = True
    for name in options.types.split(","):
        cells, wanted = f"{name:12}", KERNELS.get(name, 0)
        for given in (None, importance):
            mine, made = encoded(name, bits, given)
            theirs, golden = quantized(ggml, name, wide, given) if ggml else (float("nan"), made)
            if made.tobytes() != golden.tobytes():
                raise RuntimeError(f"{name}: not ggml's bytes")
            times = mine / theirs if theirs else float("nan")
            kept = kept and (ggml is None or given is not None or times >= wanted)
            cells += f"{mine:8.0f}{theirs:8.1f}{times:8.1f}" + (f"{wanted or '':>8}   " if given is None else "")
        print(cells, flush=True)
    return kept


def encoded(name: str, bits: np.ndarray, importance: np.ndarray | None) -> tuple[float, np.ndarray]:
    encoder = GgmlEncoder(TYPES[name], bits.shape, BY_NAME["bfloat16"], importance)
    scratch: dict[int, memoryview] = {}
    work = encoder.begin(lambda size: scratch.setdefault(size, memoryview(bytearray(size))))
    out = np.empty(len(bits) * encoder.row_bytes, np.uint8)
    return rate(bits.size, lambda: work.encode(0, bits.reshape(-1).view(np.uint8).data, out.data)), out


def quantized(ggml: ctypes.CDLL, name: str, wide: np.ndarray, importance: np.ndarray | None) -> tuple[float, np.ndarray]:
    kind, (rows, columns) = TYPES[name], wide.shape
    out = np.empty(wide.size // kind.block * kind.size, np.uint8)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointers = [array.ctypes.data_as(ctypes.c_void_p) if array is not None else None for array in (wide, out, importance)]
    whole = [ctypes.c_int64(number) for number in (0, rows, columns)]
    return rate(wide.size, lambda: ggml.ggml_quantize_chunk(kind.id, *pointers[:2], *whole, pointers[2])), out


def rate(count: int, act: Callable[[], object]) -> float:
    """M/s of the fastest of three runs, by the thread's own clock: others' work does not count."""
    return count / 1e6 / fastest(act, 3, time.thread_time)


if __name__ == "__main__":
    main()
