"""The tests' own key maps, without glmconv: what they say of a release gives transformers' logits when Megatron-Core runs it.

So a checkpoint that holds the key map's tensors bit by bit is right. What runs is Megatron-Core 0.16.1's own code, but for Transformer Engine's
layers (`stand_in.py`), GLM-4-0414's post norms (`post_norms.py`), and of GLM-5 what `sparse.py` lists.
"""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("psutil")  # without it Megatron-Core's save waits for ever
pytest.importorskip("transformers")

from tests.megatron.mistakes import mistakes
from tests.megatron.release import Shape, reference_logits
from tests.megatron.session import Made
from tests.megatron.shapes import COMPARED, IN_FLOAT32, LAYOUTS_OF, UNEVEN

TOLERANCE = 1e-5  # 1e-6 to 3e-6 seen, at logits up to 4


def difference(made: Made, case: str, shape: Shape) -> float:
    """The largest of any logit, of the model and of its MTP layer."""
    ours, theirs = made.logits(case), reference_logits(made.release(shape), shape)
    assert ours.keys() == theirs.keys()
    assert min(logits.abs().max().item() for logits in theirs.values()) > 1
    return max((ours[head] - theirs[head]).abs().max().item() for head in theirs)


@pytest.mark.parametrize("shape", IN_FLOAT32, ids=str)
def test_the_key_map_gives_transformers_logits(made: Made, shape: Shape) -> None:
    assert difference(made, f"fill {shape.name}", shape) < TOLERANCE


@pytest.mark.parametrize(("shape", "mistake"), [(shape, mistake) for shape in IN_FLOAT32 for mistake in mistakes(shape)], ids=str)
def test_a_mistake_in_the_key_map_is_seen_in_the_logits(made: Made, shape: Shape, mistake: str) -> None:
    assert difference(made, f"{shape.name}, {mistake}", shape) > 0.01


def test_fused_norms_select_keys_by_the_query_before_its_norm(made: Made) -> None:
    """Megatron-Core up to 0.18 and slime's plugin do so, transformers does not: no order of rows can make their logits equal in general."""
    assert difference(made, f"fill {UNEVEN.name}", UNEVEN) > 0.01


@pytest.mark.parametrize(("shape", "layout"), COMPARED, ids=str)
def test_megatron_core_saves_the_key_maps_tensors(made: Made, shape: Shape, layout: str) -> None:
    assert made.problems(f"save {shape.name} {layout}") == []


@pytest.mark.parametrize("shape", LAYOUTS_OF, ids=str)
def test_megatron_core_loads_back_what_it_saved_at_another_layout(made: Made, shape: Shape) -> None:
    assert made.problems(f"load back {shape.name}") == []
