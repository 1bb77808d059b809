"""Times each stage that a converted byte goes through, alone and on one core: what a conversion could take at best on this machine.

    python bench/stages.py [--work build/bench] [--megabytes 512] [--repeat 3]

Read cold and warm, sha256 (of the tensor, and once more of the file), CRC-32 (torch_dist only), write, fsync: in pieces of 4 MiB through one buffer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from watch import machine

BUFFER = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    pieces = max(1, options.megabytes * 1_000_000 // BUFFER)
    with tempfile.TemporaryFile(dir=options.work) as file:
        rounds = [stages(file.fileno(), pieces) for _ in range(options.repeat)]
    gb = pieces * BUFFER / 1e9
    best = {stage: min(taken[stage] for taken in rounds) / gb for stage in rounds[0]}
    print(f"{machine()}; best of {options.repeat}\n{'stage':14}{'GB/s':>8}{'s per GB':>10}")
    for stage, seconds in best.items():
        print(f"{stage:14}{1 / seconds:8.2f}{seconds:10.2f}")
    hf = best["read, cold"] + 2 * best["sha256"] + best["write"] + best["fsync"]
    print(f"\none worker, one stage after another: {1 / hf:.2f} GB/s to HF, {1 / (hf + best['crc32']):.2f} GB/s to torch_dist")


def stages(fd: int, pieces: int) -> dict[str, float]:
    """Seconds of each stage for `pieces` buffers; the file is written first, then read."""
    buffer = memoryview(bytearray(os.urandom(BUFFER)))
    os.ftruncate(fd, 0)

    def each(act: Callable[[int], object]) -> float:
        began = time.perf_counter()
        for number in range(pieces):
            act(number)
        return time.perf_counter() - began

    def synced() -> float:
        began = time.perf_counter()
        os.fsync(fd)
        return time.perf_counter() - began

    taken = {"write": each(lambda n: os.pwrite(fd, buffer, n * BUFFER)), "fsync": synced()}
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    taken["read, cold"] = each(lambda n: os.preadv(fd, [buffer], n * BUFFER))
    taken["read, warm"] = each(lambda n: os.preadv(fd, [buffer], n * BUFFER))
    state = hashlib.sha256()
    taken["sha256"] = each(lambda _: state.update(buffer))
    taken["crc32"] = each(lambda _: zlib.crc32(buffer))
    return taken


if __name__ == "__main__":
    main()
