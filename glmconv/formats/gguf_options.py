"""What a GGUF target may be told: importance, types of single tensors, several files, which layers, what rides along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmconv.errors import SourceError, UsageError, printable
from glmconv.formats.gguf_mix import type_named

if TYPE_CHECKING:
    from glmconv.formats.gguf_imatrix import Importance

PRECISIONS = ("bf16", "float32")


@dataclass(frozen=True)
class GgufOptions:
    """The types are llama-quantize's, in any case.

    importance:            an importance file, opened
    tensor_types:          REGEX=TYPE; the first whose expression is found in a tensor's name decides
    token_embedding_type, output_tensor_type: types of these two; empty for the mix's own
    pure:                  every tensor has the file type's base type
    split_max_size:        bytes of tensors in each of several files, split_max_tensors: how many; None for one file
    mtp_only:              the MTP layers, embedding, last norm and head, and nothing else
    embed_source:          config and tokenizer files ride along
    quantize_from:         of what a quantized source's weights are encoded: "bf16", as llama.cpp does, or "float32"
    """

    importance: Importance | None = None
    tensor_types: tuple[str, ...] = ()
    token_embedding_type: str = ""
    output_tensor_type: str = ""
    pure: bool = False
    split_max_size: int | None = None
    split_max_tensors: int | None = None
    mtp_only: bool = False
    embed_source: bool = False
    quantize_from: str = PRECISIONS[0]

    def __post_init__(self) -> None:
        if self.split_max_size is not None and self.split_max_tensors is not None:
            raise UsageError("give --split-max-size or --split-max-tensors, not both.")
        if not all(isinstance(text, str) for text in (*self.tensor_types, self.token_embedding_type, self.output_tensor_type)):
            raise UsageError("a type is not given as text.")
        for name in ("split_max_size", "split_max_tensors"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"--{name.replace('_', '-')} {printable(str(value))} is not a whole number above 0.")
        if self.quantize_from not in PRECISIONS:
            raise UsageError(f"--quantize-from {printable(str(self.quantize_from))}: it is one of {', '.join(PRECISIONS)}.")

    @property
    def overrides(self) -> list[tuple[str, str]]:
        """(regex, type) of each of `tensor_types`. UsageError for one that is not spelled REGEX=TYPE, or a type that is not known."""
        found = []
        for text in self.tensor_types:
            pattern, _, name = text.rpartition("=")
            if not pattern:
                raise UsageError(f"--tensor-type {printable(text)} is not REGEX=TYPE.", hint=r"Write --tensor-type 'ffn_down_exps=q6_k'.")
            found.append((pattern, type_named(name)))
        return found

    @property
    def document(self) -> dict[str, object]:
        """What of it decides bytes, for the plan. An importance file is in it by its name and sha256."""
        return {
            "imatrix": [self.importance.name, self.importance.digest] if self.importance else None,
            "tensor_types": [f"{pattern}={name}" for pattern, name in self.overrides],
            "token_embedding_type": type_named(self.token_embedding_type) if self.token_embedding_type else "",
            "output_tensor_type": type_named(self.output_tensor_type) if self.output_tensor_type else "",
            "pure": self.pure,
            "split_max_size": self.split_max_size,
            "split_max_tensors": self.split_max_tensors,
            "mtp_only": self.mtp_only,
            "embed_source": self.embed_source,
            "quantize_from": self.quantize_from,
        }


def recorded_importance(chosen: Mapping[str, object]) -> tuple[str, str] | None:
    """(name, sha256) of the importance file that a plan's options tell of; None if there was none. SourceError if they are damaged."""
    value = chosen.get("imatrix")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise SourceError("has a manifest that names its importance file, but not by name and sha256.")
    return value[0], value[1]
