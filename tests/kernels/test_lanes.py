"""Lanes: what depends on the processor gives the same on each."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from glmconv.kernels import ggml_iq4, lanes
from glmconv.kernels.lanes import LANES, load, store

EDGES, VALUES = ggml_iq4.MIDDLES, ggml_iq4.VALUES


def looked_up(step, x: np.ndarray) -> np.ndarray:
    @numba.njit(error_model="numpy")
    def each(x, out):
        for i in range(len(x)):
            store(out, i, step(load(x, i)))

    out = np.empty_like(x)
    each(x, out)
    return out


@pytest.mark.parametrize("values", [VALUES, range(LANES)], ids=["values", "codes"])
def test_a_staircase_is_the_same_whether_its_steps_are_added_or_searched(values, monkeypatch):
    edges = np.float32(EDGES)
    beside = [np.nextafter(edges, np.float32(end)) for end in (-np.inf, np.inf)]
    odd = np.float32([np.nan, -np.nan, np.inf, -np.inf, 0, -0.0, 1e30, -1e30])
    x = np.concatenate((edges, *beside, odd, np.linspace(-140, 130, 4096 - 53, dtype=np.float32))).reshape(-1, LANES)
    wanted = np.float32(values)[np.where(np.isnan(x), LANES - 1, np.searchsorted(edges, x, "right"))]
    monkeypatch.setattr(lanes, "permutes", lambda: False)
    np.testing.assert_array_equal(looked_up(lanes.staircase(EDGES, values), x), wanted)
    monkeypatch.undo()
    if not lanes.permutes():
        pytest.skip("this processor has no AVX-512: the steps are added")
    np.testing.assert_array_equal(looked_up(lanes.staircase(EDGES, values), x), wanted)


@pytest.mark.parametrize(("features", "name", "wanted"), [("+avx512f,+fma", None, True), ("+avx2", None, False), (None, "generic", False)])
def test_what_numba_is_told_to_compile_for_counts(features, name, wanted, monkeypatch):
    monkeypatch.setattr(lanes.config, "CPU_FEATURES", features)
    monkeypatch.setattr(lanes.config, "CPU_NAME", name)
    assert lanes.permutes() is wanted
