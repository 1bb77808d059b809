"""The formats that glmconv knows. A new one is one module here and one line in `FORMATS`, in the order in which a folder is tried."""

from __future__ import annotations

from glmconv.formats.dcp_safetensors import DCP_SAFETENSORS
from glmconv.formats.format import Format
from glmconv.formats.gguf import GGUF
from glmconv.formats.huggingface import HUGGINGFACE
from glmconv.formats.torch_dist import TORCH_DIST

FORMATS: dict[str, Format] = {form.name: form for form in (TORCH_DIST, DCP_SAFETENSORS, GGUF, HUGGINGFACE)}
