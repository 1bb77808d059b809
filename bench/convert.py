"""Times Hugging Face -> torch_dist and back against `cp -r` of the Hugging Face folder, in the same run, both until the bytes are on the disk.

    python bench/convert.py [--size small|wide] [--to fp8 ...] [--work build/bench] [--where disk|ram|both] [--repeat 3] [--cache cold|warm] [--json]

Ours is `glmconv convert --verify none`, which hashes every byte and fsyncs every file and folder; theirs is `cp -r SRC DST && sync -f DST`.
The three take turns (cp, there, back, cp, there, back, ...), each into a fresh folder that is deleted outside the clock. Before each run
its source is dropped from the page cache (cold, the default on a disk) or read once (warm); a RAM disk is its own cache, so always warm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from watch import Watched, machine, run

RAM_DISK = Path("/dev/shm")
COPY = ["sh", "-c", 'cp -r "$1" "$2" && sync -f "$2"', "copy"]
GLMCONV = [sys.executable, "-m", "glmconv"]
HEAD = f"{'':24}{'min s':>8}{'median':>8}{'GB/s':>7}{'CPU s':>7}{'x cp':>7}{'RSS MB':>8}{'anon':>6}"


@dataclass(frozen=True)
class Size:
    """A fixture: how the toy is made, the options of the conversions, the bytes that it needs free (source, two outputs and a copy)."""

    toy: tuple[str, ...]
    options: tuple[str, ...]
    needs: int


SIZES = {
    # a quarter of GLM-4.5's widths, in files of 128 MB, so that both directions have several jobs
    "small": Size(("--layers", "5", "--experts", "32", "--scale", "1/4", "--shard-size", "128MB"), ("--shard-size", "128MB"), 4_000_000_000),
    # GLM-4.5's true widths, one dense and one MoE layer; the files as large as by default
    "wide": Size(("--layers", "2", "--experts", "160", "--scale", "1", "--mtp", "drop"), (), 36_000_000_000),
}


@dataclass(frozen=True)
class Line:
    """One row of the table. `seconds` of every run; `cpu` (seconds) and `times_cp` of the fastest; memory the largest; `gb` of the release."""

    where: str
    what: str
    gb: float
    seconds: list[float]
    cpu: float
    times_cp: float
    peak_rss: int
    peak_anonymous: int

    def __str__(self) -> str:
        best, median = min(self.seconds), statistics.median(self.seconds)
        rates = f"{best:8.2f}{median:8.2f}{self.gb / best:7.2f}{self.cpu:7.2f}{self.times_cp:7.2f}"
        return f"{self.where:6}{self.what:18}{rates}{self.peak_rss / 1e6:8.0f}{self.peak_anonymous / 1e6:6.0f}"


def main() -> None:
    options = parse()
    load = os.getloadavg()[0]
    if not options.json:
        print(
            f"{machine()}; load {load:.1f} before; --size {options.size}, {options.repeat} runs of each, source {options.cache} on the disk\n{HEAD}"
        )
    lines = []
    for where, place in (("disk", options.work), ("ram", RAM_DISK)):
        if options.where not in (where, "both"):
            continue
        if problem := lacking(place, SIZES[options.size].needs):
            print(f"{where}: left out, {problem}", file=sys.stderr)
            continue
        made = measure(place, where, options)
        lines += made
        if not options.json:
            print(*made, sep="\n", flush=True)
    if options.json:
        kept = {"machine": machine(), "load": load, "size": options.size, "cache": options.cache}
        print(json.dumps(kept | {"lines": [asdict(line) for line in lines]}, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--to", action="append", default=[], help="a quantized target to time as well, from the Hugging Face folder; may be repeated")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="a folder on the disk to be measured; what is made in it is deleted")
    parser.add_argument("--where", choices=("disk", "ram", "both"), default="both", help=f"the RAM disk is {RAM_DISK}")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold", help="the source in the page cache before each run")
    parser.add_argument("--workers", type=int, help="as glmconv's")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def lacking(place: Path, needs: int) -> str:
    """Why the fixture does not fit at `place`; empty if it does. A RAM disk's bytes are memory that must be free too."""
    if place == RAM_DISK and not place.is_dir():
        return "there is none"
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    if place == RAM_DISK:
        available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        free = min(free, int(available.split()[1]) * 1024 * 3 // 4)
    return f"{needs / 1e9:.0f} GB are needed, {free / 1e9:.0f} are free" if free < needs else ""


def measure(place: Path, where: str, options: argparse.Namespace) -> list[Line]:
    """cp, there and back at one place, by turns; a line of the table each."""
    size = SIZES[options.size]
    cold = options.cache == "cold" and where == "disk"
    ours = [*GLMCONV, "convert", "--verify", "none", "-q", *(["-j", str(options.workers)] if options.workers else [])]
    with tempfile.TemporaryDirectory(prefix="glmconv-bench-", dir=place) as name:
        folder = Path(name).resolve()
        release, megatron, out = folder / "hf", folder / "torch_dist", folder / "out"
        run([*GLMCONV, "toy", "glm4.5-355B-A32B", "-o", str(release), "-q", *size.toy])
        shutil.rmtree(release / ".glmconv")  # journal and manifest are not what a release has
        (release / "glmconv_manifest.json").unlink()
        gb = sum(file.stat().st_size for file in files(release)) / 1e9
        there = [*ours, *size.options, "--to", "torch_dist"]
        run([*there, str(release), str(megatron)])
        commands = {"cp -r + sync": (COPY, release), "HF -> torch_dist": (there, release), "torch_dist -> HF": ([*ours, "--to", "hf"], megatron)}
        commands |= {f"HF -> {to}": ([*ours, *size.options, "--to", to], release) for to in options.to}
        runs: dict[str, list[Watched]] = {what: [] for what in commands}
        for _ in range(options.repeat):
            for what, (command, source) in commands.items():
                prepare(source, cold)
                os.sync()  # neither the last deletion nor anyone's dirty pages are to be paid for by this run
                runs[what].append(run([*command, str(source), str(out)]))
                shutil.rmtree(out)
    cp = min(taken.seconds for taken in runs["cp -r + sync"])
    return [line(where, what, gb, taken, cp) for what, taken in runs.items()]


def line(where: str, what: str, gb: float, runs: list[Watched], cp: float) -> Line:
    best = min(runs, key=lambda taken: taken.seconds)
    rss, anonymous = max(taken.peak_rss for taken in runs), max(taken.peak_anonymous for taken in runs)
    return Line(where, what, gb, [taken.seconds for taken in runs], best.cpu, best.seconds / cp, rss, anonymous)


def prepare(source: Path, cold: bool) -> None:
    """Drop the source's files from the page cache, or read them into it."""
    for file in files(source):
        with file.open("rb", buffering=0) as opened:
            if cold:
                os.fsync(opened.fileno())  # dirty pages cannot be dropped
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(4 << 20):
                    pass


def files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


if __name__ == "__main__":
    main()
