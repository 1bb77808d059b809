"""The folders that these tests share, and one run of both ranks over all their cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from glmconv.convert import Options, convert
from tests.megatron.glm_moe_dsa import GlmMoeDsa
from tests.megatron.mistakes import mistakes, rolled
from tests.megatron.release import Shape, Tensors, write_release
from tests.megatron.shapes import COMPARED, IN_FLOAT32, LAYOUTS_OF, LIKE_9B, LIKE_355B, LIKE_AIR, LIKE_FLASH, LIKE_GLM5, SHAPES, UNEVEN, packed

ROOT = Path(__file__).parent.parent.parent
SECONDS = 400  # for both ranks and all cases; 60 on two idle cores

SMALL_CHUNKS = Options(chunk_size=2500, file_size=100_000)  # rows cut where no parallel layout cuts them, many files


@dataclass(frozen=True)
class Made:
    """The folders, and what the ranks found: case -> problems, of both ranks."""

    folder: Path
    found: dict[str, list[str]] = field(default_factory=dict)

    def problems(self, case: str) -> list[str]:
        """What was wrong in a case; in one that was not reached, whatever stopped the ranks."""
        return self.found.get(case) or ([] if case in self.found else [f"{case} was not reached", *self.stopped])

    @property
    def stopped(self) -> list[str]:
        return [problem for problems in self.found.values() for problem in problems if "Traceback" in problem]

    def release(self, shape: Shape) -> Path:
        return self.folder / shape.name / "release"

    def written(self, shape: Shape) -> Path:
        return self.folder / shape.name / "written"

    def saved(self, shape: Shape, layout: str) -> Path:
        return self.folder / shape.name / f"saved-{layout}"

    def logits(self, case: str) -> dict[str, Tensor]:
        assert self.problems(case) == []
        logits: dict[str, Tensor] = torch.load(self.folder / f"logits.{case}.pt", weights_only=True)
        return logits


def options(shape: Shape) -> Options:
    if isinstance(shape, GlmMoeDsa) and shape is not LIKE_GLM5["slime"]:  # slime's is written unasked
        return Options(megatron_dialect=shape.dialect)
    return SMALL_CHUNKS if shape in (LIKE_355B, LIKE_FLASH) else Options()


def make(made: Made) -> None:
    """Releases of all shapes, glmconv's torch_dist of them, and all that the ranks do with them."""
    tensors: dict[str, Tensors] = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        tensors[name] = shape.megatron_tensors(write_release(made.release(shape), shape, seed))
        convert(made.release(shape), {"torch_dist": made.written(shape)}, options=options(shape))
    quantized(made, tensors)
    cases = [case(f"save {shape.name} {layout}", "save", shape, layout, made.saved(shape, layout)) for shape, layout in COMPARED]
    cases += [case(f"save {LIKE_9B.name} per-layer", "save per layer", LIKE_9B, "tp1", made.saved(LIKE_9B, "per-layer"))]
    cases += [case(f"load {shape.name} {layout}", "load", shape, layout, made.written(shape) / "release") for shape, layout in COMPARED]
    cases += [case("fp8", "load", LIKE_AIR, "tp2", made.folder / "fp8-written" / "release", "fp8")]
    cases += [case(f"run {shape.name}", "run", shape, "tp1", made.written(shape) / "release") for shape in IN_FLOAT32]
    cases += [case(f"fill {shape.name}", "fill", shape, "tp1", made.folder) for shape in (*IN_FLOAT32, UNEVEN)]
    for shape in IN_FLOAT32:
        for mistake, make_it in mistakes(shape).items():
            name = f"{shape.name}, {mistake}"
            tensors[name] = make_it(tensors[shape.name])
            cases += [case(name, "fill", shape, "tp1", made.folder, name)]
    tensors["swapped"] = rolled("decoder.layers.0.self_attention.linear_qkv.weight", heads=1, by=32)(tensors[LIKE_AIR.name])
    cases += [case("swapped", "load", LIKE_AIR, "tp1", made.written(LIKE_AIR) / "release", "swapped")]
    cases.sort(key=lambda case: case["layout"])  # the ranks change their process groups as seldom as can be
    for shape, layouts in LAYOUTS_OF.items():
        cases += [case(f"load back {shape.name}", "load back", shape, "tp1", made.saved(shape, layouts[-1]) / "iter_0000037")]
    (made.folder / "work.json").write_text(json.dumps({"shapes": {name: packed(shape) for name, shape in SHAPES.items()}, "cases": cases}))
    torch.save(tensors, made.folder / "work.pt")
    run_ranks(made.folder)


def quantized(made: Made, tensors: dict[str, Tensors]) -> None:
    """A quantized release and the torch_dist of it."""
    fp8, plain = made.folder / "fp8", made.folder / "fp8-plain"
    convert(made.release(LIKE_AIR), {"fp8:channel": fp8})
    convert(fp8, {"hf": plain, "torch_dist": made.folder / "fp8-written"})
    tensors["fp8"] = LIKE_AIR.megatron_tensors({k: t for file in plain.glob("*.safetensors") for k, t in load_file(file).items()})


def case(name: str, do: str, shape: Shape, layout: str, path: Path, expect: str = "") -> dict[str, str]:
    return {"name": name, "do": do, "shape": shape.name, "layout": layout, "path": str(path), "expect": expect or shape.name}


def run_ranks(folder: Path) -> None:
    """Run both ranks to their end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    logs = [folder / f"rank.{rank}.log" for rank in (0, 1)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("wb") as out:
            command = [sys.executable, "-m", "tests.megatron.ranks", str(folder), str(rank)]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)


def found(folder: Path) -> dict[str, list[str]]:
    """What the ranks left: case -> problems, of both."""
    out: dict[str, list[str]] = {}
    for rank in (0, 1):
        for name, problems in json.loads((folder / f"found.{rank}.json").read_text()).items():
            out.setdefault(name, []).extend(problems)
    return out
