"""Megatron-Core without a GPU: stand-ins for the parts of Transformer Engine and of CUDA that building, loading, saving and running a model touch.

Transformer Engine cannot be installed without CUDA, but only its layers are replaced here. Megatron-Core's own wrappers around them
(`TELayerNormColumnParallelLinear`, `TEGroupedMLP`, `TEDotProductAttention` and so on) run unchanged, and it is they that name, cut and gather
what a checkpoint holds. The stand-ins have Transformer Engine's parameter names and `_extra_state`, and plain torch arithmetic; forward only,
no sequence parallelism. Names and arguments are those of Transformer Engine 2.6, `transformer_engine/pytorch/module`.

Call `install()` in a process of its own, before anything imports megatron.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VERSION = "2.6.0"  # from 2.7 on Megatron-Core imports fused routers


class WithExtraState(nn.Module):
    """What Transformer Engine keeps beside the weights: without FP8 an empty tensor."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and not (isinstance(state, Tensor) and state.dtype == torch.uint8 and state.numel() == 0):
            raise TypeError(f"an _extra_state without FP8 is an empty byte tensor or None, not {state!r}")


class RMSNorm(WithExtraState):
    def __init__(self, hidden_size: int, eps: float, params_dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(WithExtraState):
    def __init__(self, hidden_size: int, eps: float, params_dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=params_dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class Linear(WithExtraState):
    """y = x W^T: of W each rank has its rows ("column"), its columns ("row"), or everything."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, return_bias: bool, params_dtype: torch.dtype, parallel_mode: str | None,
        tp_size: int, tp_group: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.parallel_mode, self.tp_size, self.tp_group = parallel_mode, tp_size, tp_group
        self.use_bias, self.return_bias = bias, return_bias
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=params_dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=params_dtype))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        y = nn.functional.linear(x, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            torch.distributed.all_reduce(y, group=self.tp_group)
        if self.return_bias:
            return y, self.bias
        return y + self.bias if self.use_bias else y


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, eps: float, *, params_dtype: torch.dtype, normalization: str, **options: Any) -> None:
        assert normalization == "RMSNorm", normalization
        super().__init__(in_features, out_features, params_dtype=params_dtype, **options)
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features, dtype=params_dtype))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return super().forward(rms_norm(x, self.layer_norm_weight, self.eps))


class GroupedLinear(WithExtraState):
    """One weight per local expert, `weight0` ...; rows of x are sorted by expert, `m_splits` of them each."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, *, bias: bool, params_dtype: torch.dtype, tp_size: int, **_: Any) -> None:
        super().__init__()
        assert not bias
        assert tp_size == 1, "Megatron-Core cuts experts itself where there is tensor or expert parallelism"
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8, self.fp8_calibration = False, False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}
        for expert in range(num_gemms):
            self.register_parameter(f"weight{expert}", nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype)))

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        weights = (self.get_parameter(f"weight{expert}") for expert in range(self.num_gemms))
        return torch.cat([nn.functional.linear(rows, weight) for rows, weight in zip(x.split(m_splits), weights, strict=True)])


class DotProductAttention(WithExtraState):
    """Causal attention of [sequence, batch, heads, head size]; query heads share key and value heads group by group."""

    def __init__(self, num_attention_heads: int, kv_channels: int | tuple[int, int], softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.register_load_state_dict_post_hook(self.forgive_missing_state)

    @staticmethod
    def forgive_missing_state(module: nn.Module, incompatible: Any) -> None:
        """As Transformer Engine does for checkpoints from before its attention had a state."""
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if "core_attention._extra_state" not in key]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, attn_mask_type: str, **_: Any) -> Tensor:
        assert attn_mask_type == "causal", attn_mask_type
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class Never:
    """A name that must exist, of a thing that is never used."""


def modules() -> dict[str, types.ModuleType]:
    """The stand-in package: module name -> module."""

    def module(name: str, **content: Any) -> types.ModuleType:
        made = types.ModuleType(f"transformer_engine.{name}".rstrip("."))
        made.__path__ = []  # so that submodules are looked for, and not found
        made.__dict__.update(content)
        return made

    def autocast(enabled: bool = False, **_: Any) -> contextlib.AbstractContextManager[None]:
        assert not enabled
        return contextlib.nullcontext()

    class FP8GlobalStateManager:
        is_fp8_enabled = staticmethod(lambda: False)

    ops = module("pytorch.ops", Sequential=Never, FusibleOperation=Never)
    fp8 = module("pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=autocast)
    distributed = module("pytorch.distributed", CudaRNGStatesTracker=Never, activation_recompute_forward=Never)
    tensor = module("pytorch.tensor", QuantizedTensor=Never)
    pytorch = module(
        "pytorch", Linear=Linear, LayerNormLinear=LayerNormLinear, GroupedLinear=GroupedLinear, DotProductAttention=DotProductAttention,
        RMSNorm=RMSNorm, LayerNorm=LayerNorm, ops=ops, fp8=fp8, distributed=distributed, tensor=tensor,
    )  # fmt: skip
    recipe = module("common.recipe", DelayedScaling=Never)
    common = module("common", recipe=recipe)
    top = module("", pytorch=pytorch, common=common, __version__=VERSION)
    return {made.__name__: made for made in (top, common, recipe, pytorch, ops, fp8, distributed, tensor)}


def install() -> None:
    """Put the stand-ins in place of Transformer Engine, and let `cuda` mean the CPU. For this process, for good."""
    if "megatron" in sys.modules:
        raise RuntimeError("megatron is already imported: it looks for Transformer Engine only once")
    sys.modules.update(modules())
    stay: Callable[..., Tensor] = lambda self, *_, **__: self  # noqa: E731
    torch.Tensor.cuda = stay  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
