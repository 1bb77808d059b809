"""Times `glmconv plan` of a whole released GLM, 44,691 tensors in 93 shards, over files that have headers and no weights.

    python bench/plan.py [--preset glm4.5-355B-A32B] [--shards 93] [--nodes 2] [--ranks-per-node 8] [--repeat 3] [--json]

The shards are sparse: right sizes, real headers, no data, a few MB on the disk. What `plan` reads (headers, index, config) is all there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from watch import Watched, machine, run

SECONDS, RSS, IMBALANCE = 5.0, 500e6, 0.05  # wanted: at most


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="plan-", dir=options.work) as folder:
        # In a process of its own, so that this one stays small and the page cache is all that the runs share.
        made = [sys.executable, __file__, "--make", folder, "--preset", options.preset, "--shards", str(options.shards)]
        subprocess.run(made, check=True)
        command = [sys.executable, "-m", "glmconv", "plan", folder, "--to", "torch_dist", "--json"]
        command += ["--nodes", str(options.nodes), "--ranks-per-node", str(options.ranks_per_node)]
        runs = [run(command) for _ in range(options.repeat)]
    report(figures(runs), options.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="glm4.5-355B-A32B")
    parser.add_argument("--shards", type=int, default=93)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="where the sparse files lie meanwhile")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.preset, options.shards)
        raise SystemExit
    return options


def make(folder: Path, preset_name: str, shards: int) -> None:
    """The preset's folder: config.json, the index, and `shards` sparse safetensors files of nearly equal size, a layer's tensors together."""
    from glmconv.archs import bind, preset_named
    from glmconv.dtypes import BY_NAME
    from glmconv.formats.safetensors_header import write_header

    spec, preset = preset_named(preset_name)
    model = bind(spec, preset.config, aliases=preset.aliases)
    assert len(model.tensors) == preset.tensors, f"{len(model.tensors)} tensors, {preset.tensors} are published"
    sizes = {name: tensor.elements * BY_NAME[tensor.dtype or "bfloat16"].itemsize for name, tensor in model.tensors.items()}
    weight_map = {}
    for number, names in enumerate(spread(sizes, shards), 1):
        file = folder / f"model-{number:05d}-of-{shards:05d}.safetensors"
        entries = [(name, BY_NAME[model.tensors[name].dtype or "bfloat16"], model.tensors[name].shape) for name in names]
        header = write_header(entries, {"format": "pt"})
        with file.open("xb") as out:
            out.write(header)
            out.truncate(len(header) + sum(sizes[name] for name in names))
        weight_map |= dict.fromkeys(names, file.name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(dict(preset.config), indent=2))


def spread(sizes: Mapping[str, int], shards: int) -> Iterator[list[str]]:
    """The names in their order, cut into exactly `shards` lists of nearly equal bytes; none is empty."""
    names, total, at, before = list(sizes), sum(sizes.values()), 0, 0
    for number in range(1, shards + 1):
        begin = at
        while at < len(names) - (shards - number) and (at == begin or before + sizes[names[at]] <= total * number / shards or number == shards):
            before += sizes[names[at]]
            at += 1
        yield names[begin:at]


def figures(runs: list[Watched]) -> dict[str, object]:
    summary = json.loads(runs[0].stdout)
    loads = [rank["bytes"] for rank in summary["ranks"]]
    return {
        "machine": machine(),
        "tensors": summary["targets"][0]["tensors"],
        "bytes": summary["bytes_written"],
        "jobs": summary["jobs"],
        "seconds": [round(r.seconds, 3) for r in runs],
        "best_seconds": min(r.seconds for r in runs),
        "best_cpu_seconds": min(r.cpu for r in runs),
        "peak_rss": max(r.peak_rss for r in runs),
        "peak_anonymous": max(r.peak_anonymous for r in runs),
        "ranks": len(loads),
        "fewest_bytes": min(loads),
        "most_bytes": max(loads),
        "imbalance": max(loads) / (sum(loads) / len(loads)) - 1 if sum(loads) else math.inf,
    }


def report(found: dict[str, object], as_json: bool) -> None:
    """Print the figures; exit code 1 if one is not what is wanted."""
    kept = found["best_seconds"] <= SECONDS and found["peak_rss"] <= RSS and found["imbalance"] <= IMBALANCE
    if as_json:
        print(json.dumps(found | {"kept": kept}, indent=2))
    else:
        print(f"{found['machine']}")
        print(f"plan of {found['tensors']:,} output tensors, {found['bytes'] / 1e9:.0f} GB, {found['jobs']} jobs, {found['ranks']} ranks")
        times = f"best of {len(found['seconds'])}, {found['best_cpu_seconds']:.2f} s of CPU, wanted <= {SECONDS:.0f}"
        print(f"  time       {found['best_seconds']:8.2f} s     {times}")
        print(f"  peak RSS   {found['peak_rss'] / 1e6:8.0f} MB    of it anonymous {found['peak_anonymous'] / 1e6:.0f} MB, wanted <= {RSS / 1e6:.0f}")
        loads = f"{found['fewest_bytes'] / 1e9:.1f} to {found['most_bytes'] / 1e9:.1f} GB a rank, wanted <= {IMBALANCE:.0%}"
        print(f"  imbalance  {found['imbalance']:8.1%}      {loads}")
    raise SystemExit(os.EX_OK if kept else 1)


if __name__ == "__main__":
    main()
