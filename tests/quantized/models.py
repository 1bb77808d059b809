"""Small models whose widths the quantized grids divide, made and saved by transformers itself; and their outputs read by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from tests.roundtrip.shards import Stored, load

CONFIG = dict(
    vocab_size=512, hidden_size=256, intermediate_size=384, moe_intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, first_k_dense_replace=1,
    partial_rotary_factor=0.5, attention_bias=True, use_qk_norm=True, max_position_embeddings=128, n_group=1, topk_group=1,
    routed_scaling_factor=1.5, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, dtype="bfloat16", num_nextn_predict_layers=0,
)  # fmt: skip
TOKENS = torch.tensor([[3, 5, 77, 300, 12, 9, 411, 8, 101, 33, 500, 2]])


def saved_model(path: Path, seed: int = 0, **changes: object) -> Path:
    """A bf16 model with weights of realistic size, saved as `save_pretrained` does."""
    torch.manual_seed(seed)
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**(CONFIG | changes))).bfloat16()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn(value.shape) * 0.05 + (1.0 if "norm" in name else 0.0))
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.copy_(torch.randn(value.shape) * 0.01)
    model.save_pretrained(path, max_shard_size="2MB")
    return path


def tensors_of(folder: Path) -> dict[str, Stored]:
    """Every stored tensor of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load(file).items()}


DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip


def parts_of(stored: dict[str, Stored], name: str) -> dict[str, torch.Tensor]:
    """The stored parts of a weight, by what follows its module's path."""
    base = name.removesuffix("weight")
    return {key.removeprefix(base): as_torch(value) for key, value in stored.items() if key.startswith(base) and not key.endswith("bias")}


def as_torch(stored: Stored) -> torch.Tensor:
    return torch.frombuffer(bytearray(stored.data), dtype=DTYPES[stored.dtype]).view(stored.shape)


def logits(folder: Path, **options: object) -> torch.Tensor:
    """What transformers computes with a folder; every tensor of it must have found its place."""
    model, info = Glm4MoeForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


def relative_rmse(made: torch.Tensor, source: torch.Tensor) -> float:
    off = (made.double() - source.double()).numpy()
    return float(np.sqrt((off**2).mean() / (source.double().numpy() ** 2).mean()))
