"""What `glmconv plan` says of GPUs and of time: held against published figures and arithmetic done by hand."""

from __future__ import annotations

import json

import pytest

from glmconv import Options
from glmconv.archs import bind, preset_named
from glmconv.convert import Summary
from glmconv.fleet.serving import kv_bytes, preset_serving_plan
from glmconv.fleet.times import expected_time, in_words
from tests.fleet.headers import headers_only

GB, GIB = 10**9, 2**30


def fits(model: str, memory: int, *to: str, tp: int = 1, ep: int = 1) -> dict[tuple[str, int], object]:
    found = preset_serving_plan(model, memory, to, options=Options(serve_tp=tp, serve_ep=ep))
    return {(fit.target, fit.tp): fit for fit in found.fits}


def test_355b_in_bf16_does_not_fit_on_eight_gpus_of_80_gb():
    found = fits("glm4.6-355B-A32B", 80 * GIB, "hf")
    assert found["hf", 1].weights == pytest.approx(714 * GB, rel=0.001)
    assert "too much" in found["hf", 8].problem
    assert found["hf", 8].tokens == 0
    assert found["hf", 16].problem == ""


def test_355b_as_awq_leaves_4_gb_on_each_of_four_cards_of_48():
    found = fits("glm4.6-355B-A32B", 48 * GIB, "awq", tp=4)["awq:g128", 4]
    assert found.problem == ""
    assert 4 * GB < found.left < 5 * GB
    assert found.tokens == found.left // found.kv_per_token < 50_000  # far from the context of 202,752


def test_block_fp8_of_355b_needs_expert_parallelism_on_eight_gpus():
    assert "1,536 rows / 8 are no multiple of 128" in fits("glm4.5-355B-A32B", 141 * GB, "fp8")["fp8", 8].problem
    assert fits("glm4.5-355B-A32B", 141 * GB, "fp8", tp=8, ep=8)["fp8", 8].problem == ""


def test_what_of_a_gpu_is_taken_does_not_grow_with_more_of_them():
    for to in ("hf", "fp8:channel"):
        sizes = [fit.weights for fit in fits("glm4.5-106B-A12B", 80 * GB, to).values()]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] / 16 < sizes[-1] < sizes[0] / 12  # norms and routers lie whole on each


@pytest.mark.parametrize(
    ("preset", "tp", "wanted"),
    [
        ("glm4.6-355B-A32B", 1, 2 * 92 * 8 * 128 * 2), ("glm4.6-355B-A32B", 8, 2 * 92 * 128 * 2), ("glm4.6-355B-A32B", 16, 2 * 92 * 128 * 2),
        ("glm4-32B-0414", 4, 2 * 61 * 128 * 2), ("glm4.7-flash-30B-A3B", 1, 47 * (512 + 64) * 2), ("glm4.7-flash-30B-A3B", 4, 47 * (512 + 64) * 2),
        ("glm5-744B-A40B", 8, 78 * (512 + 64) * 2 + 78 * 132), ("glm5.2-744B-A40B", 8, 78 * (512 + 64) * 2 + 21 * 132),
        ("glm5.3-flash-321B", 1, 11 * 512 * 2 + 11 * 132),
    ],
)  # fmt: skip
def test_a_token_takes_what_the_architecture_caches_of_it(preset, tp, wanted):
    spec, found = preset_named(preset)
    assert kv_bytes(bind(spec, found.config), tp) == wanted


def test_a_checkpoint_and_its_preset_give_one_answer(tmp_path, glmconv):
    headers_only("glm4.7-flash-30B-A3B", tmp_path)
    words = ("--to", "hf", "--to", "fp8", "--serve-tp", 4, "--gpu-memory", "141GB", "--json")
    both = [json.loads(glmconv("plan", *source, *words).out)["serving"] for source in ((tmp_path,), ("--model", "glm4.7-flash-30B-A3B"))]
    assert both[0]["fits"] == both[1]["fits"]
    assert [fit["target"] for fit in both[0]["fits"]] == ["hf", "fp8"]


def test_without_a_target_the_usual_ones_are_compared(tiny, glmconv):
    answer = glmconv("plan", tiny, "--gpu-memory", "1GB", "--json")
    assert answer.code == 0, answer.err
    assert {fit["target"] for fit in json.loads(answer.out)["serving"]["fits"]} >= {"hf", "fp8:channel"}
    said = glmconv("plan", tiny, "--gpu-memory", "1GB").out
    assert said.splitlines()[1].split() == ["target", "TP", "EP", "GPUs", "weights/GPU", "left/GPU", "tokens", "fits"]


@pytest.mark.parametrize(
    "words", [(), ("--model", "glm4.5-355B-A32B"), ("--model", "none", "--gpu-memory", "80GB"), ("x", "--model", "glm4.5-355B-A32B")]
)
def test_a_plan_of_nothing_or_of_two_things_is_exit_2(words, glmconv):
    assert glmconv("plan", *words).code == 2


def summary(read: int, written: int, loads: list[int]) -> Summary:
    return Summary([], read, written, 0, 0, len(loads), [{"rank": n, "jobs": 1, "bytes": load} for n, load in enumerate(loads)], [])


def test_the_slowest_part_of_the_way_is_the_time():
    work = summary(1000, 800, [300, 100, 200, 200])
    assert expected_time(work, 2) is None
    one = expected_time(work, 2, disk_rate=100)
    assert (one.seconds, one.storage, one.link) == (18.0, 18.0, None)
    both = expected_time(work, 2, disk_rate=1000, network_rate=10)
    assert (both.node_bytes_read, both.node_bytes_written) == (500, 400)
    assert (both.seconds, both.storage, both.link) == (50.0, 1.8, 50.0)
    assert expected_time(summary(0, 0, [0]), 1, network_rate=1).seconds == 0


def test_more_nodes_take_less_time_until_the_storage_is_the_limit(tiny, glmconv):
    words = ("plan", tiny, "--to", "torch_dist", "--shard-size", "50kB", "--disk-rate", "1MB", "--network-rate", "500kB")

    def seconds(nodes: int) -> float:
        return float(json.loads(glmconv(*words, "--nodes", nodes, "--json").out)["time"]["seconds"])

    found = [seconds(nodes) for nodes in (1, 2, 8)]
    assert found[0] > found[1] >= found[2] == seconds(64)
    assert f"expected time: {in_words(found[0])} at the least (storage" in glmconv(*words).out


@pytest.mark.parametrize(("seconds", "words"), [(2.34, "2.3 s"), (40, "40 s"), (700, "12 min"), (5760, "1 h 36 min"), (7199, "2 h 0 min")])
def test_times_read_as_people_say_them(seconds, words):
    assert in_words(seconds) == words
