"""Rows to ggml's blocks as the engine drives it: any batching gives the same bytes, each slice its importance, bad numbers are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.codecs import ggml
from glmconv.codecs.codec import NUMPY
from glmconv.codecs.ggml import IMPORTANCE_NEEDED, TYPES, GgmlEncoder, decode, ggml_type, row_size
from glmconv.dtypes import BY_NAME
from glmconv.errors import SourceError, UnsupportedError

VECTORS = Path(__file__).parent.parent / "vectors" / "ggml"
INPUTS = np.load(VECTORS / "inputs.npz")
FLOAT32, BFLOAT16, FLOAT16 = BY_NAME["float32"], BY_NAME["bfloat16"], BY_NAME["float16"]


def lend(size: int) -> memoryview:
    return memoryview(bytearray(b"\xa5" * size))


def rows(count: int, columns: int, seed: int = 0) -> np.ndarray:
    """Float32 that bfloat16 holds too."""
    x = (np.random.default_rng(seed).standard_normal((count, columns)) * 0.05).astype(np.float32)
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def encoded(encoder: GgmlEncoder, weight: np.ndarray, batches: list[int] | None = None) -> tuple[np.ndarray, list[int]]:
    """(the bytes [rows, row_bytes], what each batch reported)."""
    encoding, start, parts, found = encoder.begin(lend), 0, [], []
    for count in batches or [len(weight)]:
        out = np.full((count, encoder.row_bytes), 0x5A, np.uint8)
        found.append(encoding.encode(start, weight[start : start + count].tobytes(), out.reshape(-1).data))
        parts.append(out)
        start += count
    assert start == len(weight)
    return np.concatenate(parts), found


def as_dtype(weight: np.ndarray, name: str) -> np.ndarray:
    return (weight.view(np.uint32) >> 16).astype(np.uint16) if name == "bfloat16" else weight.astype(NUMPY[name])


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0", "IQ4_NL", "Q6_K", "Q8_0", "F16", "IQ3_S", "IQ2_XS", "IQ1_M", "NVFP4"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_batching_gives_the_same_bytes(name, data):
    slices, tall, columns = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.integers(1, 5)), data.draw(st.sampled_from([256, 768]))
    weight = rows(slices * tall, columns, data.draw(st.integers(0, 9)))
    importance = np.abs(rows(slices, columns, 77)) if name in IMPORTANCE_NEEDED or data.draw(st.booleans()) else None
    encoder = GgmlEncoder(TYPES[name], weight.shape, FLOAT32, importance)
    batches, left = [], len(weight)
    while left:
        batches.append(data.draw(st.integers(1, left)))
        left -= batches[-1]
    whole, found = encoded(encoder, weight)
    assert found == [-1]
    np.testing.assert_array_equal(encoded(encoder, weight, batches)[0], whole)


def test_strips_of_a_large_weight_are_as_its_rows_alone(monkeypatch):
    monkeypatch.setattr(ggml, "STRIP", 2000)
    weight = rows(9, 768)
    for name in ("bfloat16", "float32", "float16"):
        encoder = GgmlEncoder(TYPES["Q4_K"], weight.shape, BY_NAME[name], np.abs(rows(3, 768, 1)))
        strips, apart = encoded(encoder, as_dtype(weight, name))[0], encoded(encoder, as_dtype(weight, name), [1] * 9)[0]
        np.testing.assert_array_equal(strips, apart)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", TYPES)
def test_rows_of_half_the_width_are_widened_first(name, dtype):
    weight = rows(3, 512).astype(np.float16).astype(np.float32) if dtype == "float16" else rows(3, 512)
    importance = np.ones(512, np.float32) if name in IMPORTANCE_NEEDED else None
    narrow, wide = (GgmlEncoder(TYPES[name], weight.shape, kind, importance) for kind in (BY_NAME[dtype], FLOAT32))
    np.testing.assert_array_equal(encoded(narrow, as_dtype(weight, dtype))[0], encoded(wide, weight)[0])


def test_each_slice_has_its_own_importance():
    weight, importance = rows(6, 256), np.abs(rows(3, 256, 5))
    whole = encoded(GgmlEncoder(TYPES["Q3_K"], (6, 256), FLOAT32, importance), weight)[0]
    for e in range(3):
        own = encoded(GgmlEncoder(TYPES["Q3_K"], (2, 256), FLOAT32, importance[e]), weight[2 * e : 2 * e + 2])[0]
        np.testing.assert_array_equal(whole[2 * e : 2 * e + 2], own)
    assert len({whole[e].tobytes() for e in range(6)}) == 6


@pytest.mark.parametrize("at", [(0, 0), (2, 511), (4, 300)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_and_inf_are_reported_where_they_stand(dtype, at):
    weight = rows(5, 512)
    weight[at], weight[4, 511] = (np.nan if at[0] else np.inf), -np.inf
    found = encoded(GgmlEncoder(TYPES["Q6_K"], weight.shape, BY_NAME[dtype]), as_dtype(weight, dtype), [2, 3])[1]
    assert found == [at[0] * 512 + at[1] if at[0] < 2 else -1, (at[0] - 2) * 512 + at[1] if at[0] >= 2 else 2 * 512 + 511]


@pytest.mark.parametrize("way", ["n", "a"])
@pytest.mark.parametrize("name", [name for name in TYPES if name != "F32"])
def test_what_ggml_finds_invalid_is_an_error(name, way):
    way = "a" if name in IMPORTANCE_NEEDED else way
    valid = np.load(VECTORS / f"{name}.npz")[f"valid_{way}"]
    encoder = GgmlEncoder(TYPES[name], (1, 1024), FLOAT32, INPUTS["imatrix"] if way == "a" else None)

    def refuses(row: np.ndarray) -> bool:
        try:
            encoded(encoder, row[None])
        except SourceError:
            return True
        return False

    refused = [refuses(row) for row in INPUTS["x"]]
    assert refused == list(~valid)


def test_too_large_values_are_named():
    weight = rows(3, 512)
    weight[1, 300] = 1e7
    encoding, out = GgmlEncoder(TYPES["Q4_0"], (13, 512), FLOAT32).begin(lend), lend(3 * 288)
    with pytest.raises(SourceError, match=r"values from column 288 on in row 11 that Q4_0 cannot hold"):
        encoding.encode(10, weight.tobytes(), out)
    with pytest.raises(SourceError, match=r"a value in row 1, column 300 that F16 cannot hold"):
        encoded(GgmlEncoder(TYPES["F16"], (3, 512), FLOAT32), weight)


def test_the_id_says_all_that_decides_bytes():
    ones, twos = np.ones(256, np.float32), np.full((2, 256), 2, np.float32)
    ids = [
        GgmlEncoder(TYPES[name], (4, 256), dtype, importance).id
        for name, dtype, importance in (
            ("Q4_K", FLOAT32, None), ("Q5_K", FLOAT32, None), ("Q4_K", BFLOAT16, None), ("Q4_K", FLOAT32, ones), ("Q4_K", FLOAT32, twos),
            ("Q4_K", FLOAT32, twos[0]),
        )
    ]  # fmt: skip
    assert len(set(ids)) == 6
    assert GgmlEncoder(TYPES["Q8_0"], (4, 256), FLOAT32, ones).id == GgmlEncoder(TYPES["Q8_0"], (4, 256), FLOAT32).id


@pytest.mark.parametrize("name", sorted(set(TYPES) - {"F32"}))
def test_rows_are_decoded_whole(name, monkeypatch):
    monkeypatch.setattr(ggml, "STRIP", 2560)
    stored = np.load(VECTORS / f"{name}.npz")["q_a"]
    with np.errstate(all="ignore"):
        whole, one = decode(TYPES[name], stored.tobytes(), 1024), decode(TYPES[name], stored[5], 512)
    assert (whole.shape, one.shape) == ((42, 1024), (2, 512))
    np.testing.assert_array_equal(whole[5], one.reshape(-1))


def test_sizes_names_and_what_does_not_fit():
    assert row_size(ggml_type("q4_K"), 512) == 288
    assert all(ggml.BY_ID[kind.id] is kind for kind in TYPES.values())
    with pytest.raises(UnsupportedError, match="Q9_K is no type"):
        ggml_type("Q9_K")
    with pytest.raises(ValueError, match="100 columns"):
        GgmlEncoder(TYPES["Q8_0"], (2, 100), FLOAT32)
    for name in ("IQ1_S", "IQ2_XXS", "IQ2_XS"):
        with pytest.raises(UnsupportedError, match=f"{name} needs an importance matrix"):
            GgmlEncoder(TYPES[name], (2, 256), FLOAT32)
    with pytest.raises(SourceError, match="no whole number of rows"):
        decode(TYPES["Q8_0"], bytes(34 * 3), 64)
    for wrong in (np.ones(255, np.float32), np.ones((3, 256), np.float32), np.ones((1, 1, 256), np.float32)):
        with pytest.raises(SourceError, match="has an importance of"):
            GgmlEncoder(TYPES["Q4_K"], (4, 256), FLOAT32, wrong)
    with pytest.raises(SourceError, match="NaN or infinite"):
        GgmlEncoder(TYPES["Q4_K"], (4, 256), FLOAT32, np.full(256, np.nan, np.float32))
    with pytest.raises(SourceError, match="an importance below 0, which IQ3_S cannot heed"):
        GgmlEncoder(TYPES["IQ3_S"], (4, 256), FLOAT32, np.full(256, -1, np.float32))


@pytest.mark.parametrize("name", ["IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_where_a_codebook_s_search_breaks_down_is_an_error(name):
    """ggml aborts there: distances to all points are beyond float32."""
    weight = rows(3, 512)
    weight[1, 256:] *= np.float32(1e30)
    with pytest.raises(SourceError, match=f"values from column 256 on in row 1 that {name} cannot hold"):
        encoded(GgmlEncoder(TYPES[name], (3, 512), FLOAT32, np.ones(512, np.float32)), weight)
