"""ggml's block types in Triton beside the compiled loops and ggml's own bytes: by test_gpu.py on a device, by test_triton.py in the interpreter.

TRITON_INTERPRET=1 python -m tests.kernels.triton_cases_ggml CASE...
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from glmconv.codecs.ggml import TYPES, row_size
from glmconv.kernels import ggml
from glmconv.kernels.ggml_decode import DECODE

VECTORS = Path(__file__).parent.parent / "vectors" / "ggml"
COLUMNS = 1024
KINDS = [name for name in TYPES if not name.startswith(("IQ1", "IQ2", "IQ3")) and name not in ("Q1_0", "Q2_0", "NVFP4")]  # that have kernels here
# the two stored importances side by side: not where a weight depends on the whole row
WIDE = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


@cache
def inputs() -> dict[str, np.ndarray]:
    return dict(np.load(VECTORS / "inputs.npz"))


@cache
def more() -> np.ndarray:
    """Rows of heavy tails and mixed sizes, whole numbers, few signs, subnormals, peaks beside powers of two: float32 [20, COLUMNS]."""
    rng = np.random.default_rng(6)
    rows = rng.standard_t(2, (20, COLUMNS))
    rows[:4] *= 10.0 ** np.repeat(rng.integers(-12, 3, (4, COLUMNS // 16)), 16, axis=1)
    rows[4], rows[5], rows[6] = np.round(rows[4] * 4), np.abs(rows[5]) + 1, -np.abs(rows[6])
    rows[7] = np.where(rng.random(COLUMNS) < 0.97, -0.0, rows[7])
    rows[8], rows[9] = np.repeat(rows[8, ::256], 256), np.repeat(rows[9, ::32], 32)
    rows[10:13] *= np.array([[1e-18], [1e-37], [1e-42]])
    rows[13] = np.repeat(rng.random(32) < 0.5, 32) * rows[13]
    made = rows.astype(np.float32)
    made[14:] = np.clip(made[14:], -1, 1) * np.float32(0.9)
    powers = np.exp2(rng.integers(-140, 20, (6, COLUMNS // 32))).astype(np.float32)
    made[14:] *= np.repeat(powers, 32, axis=1)
    steps = powers.view(np.int32) + rng.integers(-100, 4, powers.shape, dtype=np.int32)
    made[14:, ::32] = np.where(rng.random(powers.shape) < 0.5, 1, -1) * np.maximum(steps, 0).view(np.float32)
    return made


def loops(name: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    out = np.empty((len(rows), row_size(TYPES[name], rows.shape[1])), np.uint8)
    ggml.encode(name, rows, importance, out)
    return out


def compare(device: str, name: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The bytes of both, which are the same."""
    from glmconv.kernels.gpu import ggml as triton_ggml

    weights = None if importance is None else torch.from_numpy(importance).to(device)
    found = triton_ggml.encode(name, torch.from_numpy(rows).to(device), weights).cpu().numpy()
    differ = (found != loops(name, rows, importance)).any(axis=1)
    assert not differ.any(), (name, np.flatnonzero(differ))
    return found


def plainly(device: str, name: str) -> None:
    """ggml's own bytes of the stored rows, the loops' of others."""
    found = compare(device, name, np.concatenate((inputs()["x"], more())))
    np.testing.assert_array_equal(found[:42], np.load(VECTORS / f"{name}.npz")["q_n"])


def weighed(device: str, name: str, way: str = "") -> None:
    """The same with importance: one of two, or both."""
    vectors, given = np.load(VECTORS / f"{name}.npz"), {"a": inputs()["imatrix"], "b": inputs()["imatrix_zeros"]}
    rows = np.concatenate((inputs()["x"], more()))
    if name in WIDE:
        found = compare(device, name, np.concatenate((rows, rows), axis=1), np.concatenate([given[way] for way in "ab"]))
        found = dict(zip("ab", np.split(found, 2, axis=1), strict=True))
    else:
        found = {way: compare(device, name, rows, given[way])}
    for way, data in found.items():
        np.testing.assert_array_equal(data[:42], vectors[f"q_{way}"])


def decoded(device: str) -> None:
    """The values of stored blocks and of any bytes."""
    from glmconv.kernels.gpu import ggml as triton_ggml

    rng = np.random.default_rng(1)
    for name in KINDS[1:]:
        blocks = np.load(VECTORS / f"{name}.npz")["q_n"]
        blocks = np.concatenate((blocks, rng.integers(0, 256, (9, blocks.shape[1]), dtype=np.uint8)))
        found = triton_ggml.decode(name, torch.from_numpy(blocks).to(device), COLUMNS).cpu().numpy()
        with np.errstate(all="ignore"):
            ours = np.ascontiguousarray(DECODE[name](blocks.reshape(-1, TYPES[name].size))).reshape(found.shape)
        number = ~np.isnan(ours)
        np.testing.assert_array_equal(found.view(np.uint32)[number], ours.view(np.uint32)[number])
        assert np.isnan(found[~number]).all()


def programs(device: str) -> None:
    """Several of them, of 16 lanes, the last one not full; rows of other dtypes; no rows."""
    from glmconv.kernels.gpu import ggml as triton_ggml
    from glmconv.kernels.gpu import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "LANES", 16)
        for name, rows, columns in (("Q6_K", 1, 768), ("Q4_0", 3, 224), ("Q4_0", 1, 32)):
            compare(device, name, np.ascontiguousarray(inputs()["x"][:rows, :columns]))
    for dtype in (torch.bfloat16, torch.float16):
        rows = torch.from_numpy(inputs()["x"][:2]).to(dtype)
        found = triton_ggml.encode("Q8_0", rows.to(device)).cpu().numpy()
        np.testing.assert_array_equal(found, loops("Q8_0", rows.float().numpy()))
    for name in KINDS:
        nothing = triton_ggml.encode(name, torch.empty((0, 512), device=device))
        assert nothing.shape == (0, row_size(TYPES[name], 512))
        assert triton_ggml.decode(name, nothing, 512).shape == (0, 512)


def refused(device: str) -> None:
    """What does not fit: nothing is looked up beyond a tensor."""
    from glmconv.kernels.gpu import ggml as triton_ggml

    rows = torch.zeros((2, 512), device=device)
    for wrong in ((rows[:, :300], None), (rows, torch.ones(511, device=device)), (rows, torch.ones(512, dtype=torch.float64, device=device))):
        with pytest.raises(ValueError, match="need"):
            triton_ggml.encode("Q4_K", *wrong)
    for columns in (256, 511):
        with pytest.raises(ValueError, match="144 bytes"):
            triton_ggml.decode("Q4_K", torch.zeros((2, 288), dtype=torch.uint8, device=device), columns)


CASES: dict[str, Callable[[str], None]] = {case.__name__: case for case in (decoded, programs, refused)}
CASES |= {name: partial(plainly, name=name) for name in KINDS if name != "F32"}
CASES |= {f"{name}-weighed": partial(weighed, name=name) for name in WIDE}
CASES |= {f"{name}-weighed": partial(weighed, name=name, way=way) for name, way in (("Q4_0", "b"), ("Q4_1", "a"), ("Q5_0", "b"), ("Q5_1", "b"))}

if __name__ == "__main__":
    from glmconv.kernels.gpu import launch

    launch.LANES = 8192  # the interpreter does each step of a whole program at once: fewer programs are quicker
    for case in sys.argv[1:]:
        CASES[case]("cpu")
