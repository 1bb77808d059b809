"""ggml's block types: ggml's own bytes and values, and a slow reference for all else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.codecs.ggml import IMPORTANCE_NEEDED, TYPES
from glmconv.kernels import ggml_grids
from glmconv.kernels.ggml import WAYS, encode
from glmconv.kernels.ggml_codebook import codebook
from glmconv.kernels.ggml_decode import DECODE
from tests.kernels import ggml_reference as reference
from tests.kernels.ggml_rows import families, importances

VECTORS = Path(__file__).parent.parent / "vectors" / "ggml"
INPUTS = np.load(VECTORS / "inputs.npz")
IMPORTANCE = {"n": None, "a": INPUTS["imatrix"], "b": INPUTS["imatrix_zeros"]}
HASHES = json.loads((VECTORS / "hashes.json").read_text())
ROWS = dict(families())
# of the types with codes, at most this part of a block's largest magnitude is lost, where float16 holds its scales to all bits
ERROR = {"Q8_0": 0.005, "Q6_K": 0.05, "Q5_K": 0.1, "Q5_0": 0.1, "Q5_1": 0.1, "Q4_0": 0.2, "Q4_1": 0.2, "Q4_K": 0.2, "IQ4_NL": 0.25, "IQ4_XS": 0.25,
         "Q3_K": 0.35, "Q2_K": 0.5, "MXFP4": 0.34, "NVFP4": 0.34, "TQ1_0": 0.51, "TQ2_0": 0.51, "Q2_0": 0.51}  # fmt: skip
# of the types with codebooks, this part of normal values' energy
ENERGY = {"IQ3_S": 0.04, "IQ3_XXS": 0.07, "IQ2_S": 0.09, "IQ2_XS": 0.11, "IQ2_XXS": 0.14, "IQ1_S": 0.29, "IQ1_M": 0.42}
WAYS_OF_VECTORS = [(name, way) for name in TYPES if name != "F32" for way in IMPORTANCE if way != "n" or name not in IMPORTANCE_NEEDED]


def encoded(name: str, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """[blocks, bytes] of rows as long as the importance; the array is filled before, so that what is not written is seen."""
    kind = TYPES[name]
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1] if importance is None else len(importance))
    out = np.full((len(rows), rows.shape[1] // kind.block * kind.size), 0xA5, np.uint8)
    encode(name, rows, importance, out)
    return out.reshape(-1, kind.size)


def decoded(name: str, blocks: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(DECODE[name](blocks)).reshape(-1)


def blocks(seed: int, kind: str, count: int) -> np.ndarray:
    """Float32 super-blocks of one kind."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(256 * count)
    if kind == "heavy":
        x = rng.standard_t(2, 256 * count)
    elif kind == "constant":
        x = np.repeat(x[:count], 256)
    elif kind == "zeros":
        x *= np.repeat(rng.random(16 * count) < 0.5, 16)
    elif kind == "one sign":
        x = np.abs(x) + 1
    elif kind == "whole":
        x = np.round(x * 4)
    elif kind == "mixed":
        x *= 10.0 ** np.repeat(rng.integers(-9, 2, 16 * count), 16)
    return (x * 0.02).astype(np.float32)


KINDS = st.sampled_from(["normal", "heavy", "constant", "zeros", "one sign", "whole", "mixed"])
SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize(("name", "way"), WAYS_OF_VECTORS)
def test_bytes_are_those_of_ggml(name, way):
    vectors = np.load(VECTORS / f"{name}.npz")
    got = encoded(name, INPUTS["x"], IMPORTANCE[way]).reshape(42, -1)
    differ = (got != vectors[f"q_{way}"]).any(axis=1)
    assert list(INPUTS["labels"][differ]) == []


@pytest.mark.parametrize("name", [name for name in HASHES if name != "inputs"])
def test_bytes_of_many_kinds_of_rows_are_those_of_ggml(name):
    for kind, importance in importances():
        for family, wanted in HASHES[name].get(kind, {}).items():
            got = hashlib.sha256(encoded(name, ROWS[family], importance).tobytes()).hexdigest()
            assert got.startswith(wanted), (family, kind)


def test_the_rows_are_those_that_ggml_was_given():
    parts = [*ROWS.values(), *(importance for _, importance in importances() if importance is not None)]
    assert hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest() == HASHES["inputs"]


@pytest.mark.parametrize("name", [name for name in DECODE if name != "F32"])
def test_values_are_those_of_ggml(name):
    vectors = np.load(VECTORS / f"{name}.npz")
    ways = [way for way in IMPORTANCE if f"q_{way}" in vectors]
    assert ways[-2:] == ["a", "b"]
    for way in ways:
        values = decoded(name, vectors[f"q_{way}"].reshape(-1, TYPES[name].size))
        assert hashlib.sha256(values.tobytes()).hexdigest() == str(vectors[f"deq_sha256_{way}"])


def test_every_type_is_written_and_read():
    assert set(WAYS) == set(DECODE) == set(TYPES)
    assert all((TYPES[name].block, TYPES[name].size) == way[:2] for name, way in WAYS.items())
    for name in ("F32", "BF16", "F16"):
        x = np.array([0.0, -0.0, 1.5, -65280.0, 2.0**-20], np.float32)
        np.testing.assert_array_equal(decoded(name, encoded(name, x)), x)


def test_grids_hold_every_point_once():
    for grid, count in (("IQ2_XXS", 256), ("IQ2_XS", 512), ("IQ2_S", 1024), ("IQ3_XXS", 256), ("IQ3_S", 512), ("IQ1", 2048)):
        points = ggml_grids.points(getattr(ggml_grids, grid))
        assert len(np.unique(points, axis=0)) == len(points) == count


@settings(max_examples=12, deadline=None)
@given(SEEDS, KINDS)
def test_q6_k_is_the_reference(seed, kind):
    x, q = blocks(seed, kind, 1), np.abs(blocks(seed + 1, "heavy", 1))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(decoded("Q6_K", encoded("Q6_K", x)), reference.q6_k(x))
        np.testing.assert_array_equal(decoded("Q6_K", encoded("Q6_K", x, q)), reference.q6_k(x, q))


@settings(max_examples=8, deadline=None)
@given(SEEDS, KINDS)
def test_q4_k_is_the_reference(seed, kind):
    x = blocks(seed, kind, 1)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(decoded("Q4_K", encoded("Q4_K", x)), reference.q4_k(x))


@settings(max_examples=12, deadline=None)
@given(SEEDS, KINDS)
def test_iq4_nl_is_the_reference(seed, kind):
    x, q = blocks(seed, kind, 1)[:96], np.abs(blocks(seed + 1, "heavy", 1)[:96])
    parts = [slice(i, i + 32) for i in range(0, 96, 32)]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(decoded("IQ4_NL", encoded("IQ4_NL", x)), np.concatenate([reference.iq4_nl(x[p]) for p in parts]))
        np.testing.assert_array_equal(decoded("IQ4_NL", encoded("IQ4_NL", x, q)), np.concatenate([reference.iq4_nl(x[p], q[p]) for p in parts]))


@pytest.mark.parametrize("name", list(ERROR))
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, kind=st.sampled_from(["normal", "constant", "zeros", "whole"]), weighted=st.booleans())
def test_little_is_lost(name, seed, kind, weighted):
    x = blocks(seed, kind, 3) * np.float32(50)
    importance = (np.random.default_rng(seed).random(256) * 0.1 + 1).astype(np.float32) if weighted else None
    got = decoded(name, encoded(name, x, importance))
    assert np.isfinite(got).all()
    reach = np.repeat(np.abs(x).reshape(-1, TYPES[name].block).max(axis=1), TYPES[name].block).clip(0.05)
    assert (np.abs(got - x) <= ERROR[name] * reach).all()


@pytest.mark.parametrize("name", list(ENERGY))
@settings(max_examples=8, deadline=None)
@given(seed=SEEDS, weighted=st.booleans())
def test_codebooks_lose_little(name, seed, weighted):
    x = blocks(seed, "normal", 6)
    importance = (np.random.default_rng(seed).random(256) * 0.1 + 1).astype(np.float32) if weighted or name in IMPORTANCE_NEEDED else None
    lost = decoded(name, encoded(name, x, importance)) - x
    assert (lost * lost).sum() <= ENERGY[name] * (x * x).sum()


def test_iq3_s_moves_what_is_behind_a_sub_block_of_zeros_as_ggml_does():
    """ggml's bytes, and ggml's loss: points and signs are read as another sub-block's."""
    x = np.ones(256, np.float32)
    x[:32], x[32:64] = 0, -1
    kept, moved = (decoded(name, encoded(name, x)) for name in ("IQ3_XXS", "IQ3_S"))
    np.testing.assert_allclose(kept, x, atol=0.3)
    assert (moved[32:64] > 0.7).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q5_1", "Q3_K", "IQ4_XS", "Q6_K", "IQ3_XXS", "IQ2_S", "IQ1_M", "Q2_0"])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, kind=KINDS, cut=st.integers(1, 4), weighted=st.booleans())
def test_a_block_is_encoded_alike_in_any_company(name, seed, kind, cut, weighted):
    x = blocks(seed, kind, 5)
    importance = np.abs(blocks(seed + 1, "normal", 1)) if weighted else None
    apart = [encoded(name, x[: cut * 256], importance), encoded(name, x[cut * 256 :], importance)]
    np.testing.assert_array_equal(encoded(name, x, importance), np.concatenate(apart))


def test_arrays_that_do_not_fit_are_refused():
    rows, out = np.zeros((2, 512), np.float32), np.zeros((2, 288), np.uint8)
    for wrong in (
        (rows[:, :300], None, out), (rows[:, ::2], None, out),
        (rows.astype(np.float64), None, out), (rows, None, out[:, :287]), (rows, None, out[:1]),
        (rows, np.ones(511, np.float32), out), (rows, np.ones(512), out),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            encode("Q4_K", *wrong)


def test_points_near_are_in_the_order_of_their_distance():
    own, first, near, points = codebook("IQ2_S")
    assert [own[0], own[6560], first[-1]] == [0, 1023, len(near)]
    codes = (points[:, None] >> 4 * np.arange(8, dtype=np.uint32) & 15).astype(np.int64) // 2
    for key in np.flatnonzero(own < 0)[::97]:
        distances = ((codes - key // 3 ** np.arange(8) % 3) ** 2).sum(axis=1)
        nearest = np.flatnonzero(distances == distances.min())
        rows = near[first[key] : first[key + 1]].reshape(-1)
        np.testing.assert_array_equal(rows[: len(nearest)], points[nearest])
        assert len(rows) - len(nearest) < 16
        assert set(rows[len(nearest) :]) <= {points[nearest[-1]]}


def test_nan_stays_nan_in_floats():
    x = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)[None]
    for name in ("F32", "F16", "BF16"):
        assert np.isnan(decoded(name, encoded(name, x))).all()
