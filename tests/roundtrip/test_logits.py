"""transformers as the judge: a release and what came back of it give the same logits in float32, to the last bit."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Glm4MoeForCausalLM

from glmconv import convert
from tests.roundtrip.shards import Surgery, copied

PRESETS = ("glm4.5-355B-A32B", "glm4.5-106B-A12B", "glm4.6-355B-A32B", "glm4.7-355B-A32B")
TEXT = "The weights of this are from there: 3.14, ünïcödé, 漢字, 🙂\n\tand\r\n  a tab."


@cache
def logits(path: Path) -> torch.Tensor:
    """The model's answer to a fixed prompt, [2, 24, vocabulary] float32; every weight that it needs is in the files."""
    model, info = Glm4MoeForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    config = json.loads((path / "config.json").read_bytes())
    mtp = f"model.layers.{config['num_hidden_layers']}."
    assert all(key.startswith(mtp) for key in info["unexpected_keys"])
    prompt = torch.arange(48).reshape(2, 24) * 7 % config["vocab_size"]
    with torch.no_grad():
        return model.eval()(prompt, use_cache=False).logits


@pytest.mark.parametrize("preset", PRESETS)
def test_logits_are_bit_identical_after_the_round_trip(preset, toy, back):
    before, after = logits(toy(preset)), logits(back(preset))
    assert before.isfinite().all()
    assert before.std() > 1e-3
    assert not torch.equal(before[0], before[1])
    assert torch.equal(before, after)


@pytest.mark.parametrize("preset", ["glm4.5-355B-A32B", "glm4.5-106B-A12B"])
def test_logits_are_bit_identical_with_a_config_rebuilt_from_what_megatron_keeps(preset, toy, torch_dist, tmp_path):
    shutil.copytree(torch_dist(preset), tmp_path / "there", ignore=shutil.ignore_patterns("glmconv_origin"))
    convert(tmp_path / "there", {"hf": tmp_path / "back"})
    assert (tmp_path / "back" / "config.json").read_bytes() != (toy(preset) / "config.json").read_bytes()
    assert torch.equal(logits(toy(preset)), logits(tmp_path / "back"))


def test_one_bit_of_one_weight_shows_in_the_logits(toy, tmp_path):
    changed = copied(toy("glm4.5-106B-A12B"), tmp_path / "changed")
    work = Surgery.at(changed, "lm_head.weight")
    head = work.tensors["lm_head.weight"]
    head.data = bytes([head.data[0] ^ 1]) + head.data[1:]
    work.close()
    assert not torch.equal(logits(changed), logits(toy("glm4.5-106B-A12B")))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_tokenizer_comes_back_and_gives_text_back(preset, toy, back):
    before, after = (AutoTokenizer.from_pretrained(path) for path in (toy(preset), back(preset)))
    ids = before(TEXT)["input_ids"]
    assert len(ids) > 10
    assert after(TEXT)["input_ids"] == ids
    assert after.decode(ids) == TEXT
    chat = [{"role": "user", "content": TEXT}]
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    assert TEXT in after.apply_chat_template(chat, tokenize=False)
