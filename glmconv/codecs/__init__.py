"""The codecs that glmconv knows. A new one is one module here and its lines in the two registries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from glmconv.codecs import fp8, int4
from glmconv.codecs.codec import Codec, Found, Recognise
from glmconv.dtypes import DType

CODECS: dict[str, Callable[[Sequence[str]], Codec]] = {
    "fp8": fp8.target,
    "mxfp8": fp8.mx_target,
    "awq": int4.awq_target,
    "int4": int4.target,
}
DECODERS: tuple[Recognise, ...] = (fp8.recognise, int4.recognise)
# The last components of names that only quantized tensors have
SUFFIXES = (
    "weight_scale_inv", "weight_scale", "weight_packed", "weight_zero_point", "weight_shape", "weight_g_idx", "qweight", "qzeros", "scales", "g_idx",
)  # fmt: skip

# The relative RMSE of a tensor above which `verify` takes it for wrong: about twice what normal values give (docs/quantization.md, docs/gguf.md).
# Q8_0's and the ternary types' follow from their arithmetic: half a step of the largest of 32 values, and no more than the value itself.
BOUNDS = {
    "fp8": 0.06, "int4": 0.25, "awq": 0.25,
    "F16": 0.001, "BF16": 0.004, "Q8_0": 0.0225, "Q6_K": 0.05, "Q5_K": 0.1, "Q5_1": 0.1, "Q5_0": 0.12, "Q4_K": 0.2, "Q4_1": 0.2, "Q4_0": 0.25,
    "IQ4_NL": 0.2, "IQ4_XS": 0.2, "MXFP4": 0.3, "Q3_K": 0.4, "IQ3_S": 0.4, "IQ3_XXS": 0.5, "Q2_K": 0.7, "IQ2_S": 0.8, "IQ2_XS": 0.8, "IQ2_XXS": 0.9,
    "IQ1_M": 1.0, "IQ1_S": 1.0, "TQ1_0": 1.0, "TQ2_0": 1.0, "NVFP4": 0.3, "Q2_0": 1.0, "Q1_0": 1.0,
}  # fmt: skip


def bound_of(label: str) -> float:
    """The bound for a tensor whose decoder has this label: the widest, if its parts are stored in several ways (`Q5_0+Q4_K`)."""
    return max(BOUNDS[part] for part in label.partition(" ")[0].split("+"))


def codec_of(text: str) -> Codec:
    """The codec that `fp8:ue8m0` names. KeyError if there is no such family, UsageError if it has no such option."""
    family, *options = text.split(":")
    return CODECS[family](options)


def recognise(stored: Mapping[str, tuple[DType, tuple[int, ...]]], shape: tuple[int, ...], quantization: Mapping[str, object]) -> Found | None:
    """How a weight with these stored parts is decoded; None if it is not encoded. SourceError if the parts do not add up."""
    return next((found for decoder in DECODERS if (found := decoder(stored, shape, quantization))), None)
