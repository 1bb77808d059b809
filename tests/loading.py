"""transformers as the judge of any architecture's folder: every weight that its model has is in the files, and nothing else but MTP layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def loaded(path: Path, **options: Any) -> Any:
    """The model, with nothing missing, of another shape, or unexpected but for layers behind the last."""
    config = json.loads((path / "config.json").read_bytes())
    text = config.get("text_config", config)
    kind = AutoModelForImageTextToText if "text_config" in config else AutoModelForCausalLM
    model, info = kind.from_pretrained(path, output_loading_info=True, attn_implementation="eager", **options)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    behind = f"layers.{text['num_hidden_layers']}."
    assert all(behind in key for key in info["unexpected_keys"])
    return model


def logits(path: Path, **options: Any) -> torch.Tensor:
    """The model's answer to a fixed prompt, [2, 24, vocabulary], computed in float32: longer than a toy's indexer may choose from."""
    model = loaded(path, **{"dtype": torch.float32} | options).float().eval()
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.arange(48).reshape(2, 24) * 7 % vocabulary
    with torch.no_grad():
        found: torch.Tensor = model(prompt, use_cache=False).logits
    return found
