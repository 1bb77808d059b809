"""GLM-4-0414's two norms more, which Megatron-Core itself has not: slime and miles patch them into its TransformerLayer under these names."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class PostNormLayer(TransformerLayer):
    """Megatron-Core's own layer; what its attention and its feed-forward answer is normed before it is added to the residual."""

    def __init__(self, config: Any, submodules: Any, **options: Any) -> None:
        super().__init__(config, submodules, **options)
        for name, half in (("post_self_attn_layernorm", self.self_attention), ("post_mlp_layernorm", self.mlp)):
            norm = TENorm(config, config.hidden_size, config.layernorm_epsilon)
            self.add_module(name, norm)
            half.register_forward_hook(normed_by(norm))


def normed_by(norm: nn.Module) -> Any:
    def hook(module: nn.Module, given: Any, answer: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        return norm(answer[0]), answer[1]

    return hook


def layer_spec(spec: ModuleSpec) -> ModuleSpec:
    made = copy.copy(spec)
    made.module = PostNormLayer
    return made
