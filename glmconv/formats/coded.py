"""Quantized tensors of a source: found by the parts that are stored, decoded on read, their parts also readable as they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from glmconv.archs import Model
from glmconv.codecs import SUFFIXES, recognise
from glmconv.codecs.codec import Decoder, check_part, values
from glmconv.dtypes import BY_NAME, DType
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.binding import canonical_dtype
from glmconv.formats.format import FileRows, RowReader
from glmconv.formats.gguf_stored import GgufRows

WIDE = "wide:"  # the engine reads a quantized tensor as float32 under this name, so that quantizing it anew rounds once
RAW = "raw:"  # and a stored part as it lies under raw:SUFFIX:NAME
QUANTIZATION = "quantization_config"  # the field of config.json
METHODS = ("fp8", "compressed-tensors", "awq")
FLOAT32 = BY_NAME["float32"]


@dataclass(frozen=True)
class CodedRows:
    """A canonical tensor whose stored `parts` are decoded as its rows are read."""

    name: str
    file: Path
    parts: Mapping[str, FileRows]
    decoder: Decoder
    shape: tuple[int, ...]
    dtype: DType
    scale_fmt: str = ""  # what the config says of the scales; believed only where two checkpoints are told apart

    @property
    def label(self) -> str:
        """How the tensor is encoded."""
        return f"{self.decoder.label} ({self.scale_fmt})" if self.scale_fmt else self.decoder.label

    @property
    def place(self) -> tuple[int, int]:
        return next(iter(self.parts.values())).place

    def read_into(self, start: int, out: memoryview) -> None:
        try:
            self.decoder.decode(self.parts, start, values(out, self.dtype, self.shape[1]), self.dtype)
        except SourceError as error:
            if error.located:
                raise
            raise SourceError(error.line, file=self.file, tensor=self.name) from error

    def widened(self) -> CodedRows:
        return replace(self, dtype=FLOAT32)


@dataclass(frozen=True)
class CheckedPart:
    """A stored part as it lies, for targets that take it unchanged; codes and scales that mean nothing are errors all the same."""

    rows: FileRows
    suffix: str
    name: str
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    @property
    def dtype(self) -> DType:
        return self.rows.dtype

    @property
    def place(self) -> tuple[int, int]:
        return self.rows.place

    def read_into(self, start: int, out: memoryview) -> None:
        self.rows.read_into(start, out)
        try:
            check_part(self.suffix, self.dtype, out, start, self.shape[-1])
        except SourceError as error:
            raise SourceError(error.line, file=self.file, tensor=self.name) from error


def label_of(reader: RowReader) -> str:
    """How a tensor is encoded; empty if it is not."""
    return reader.label if isinstance(reader, CodedRows | GgufRows) else ""


def derived(tensors: Mapping[str, RowReader], name: str) -> RowReader | None:
    """The reader that a name with one of the two prefixes stands for; None if it has none."""
    if name.startswith(WIDE):
        reader = tensors[name.removeprefix(WIDE)]
        return reader.widened() if isinstance(reader, CodedRows | GgufRows) else reader
    if name.startswith(RAW):
        suffix, _, name = name.removeprefix(RAW).partition(":")
        reader = tensors[name]
        return CheckedPart(reader.parts[suffix], suffix, name, reader.file) if isinstance(reader, CodedRows) else None
    return None


@dataclass(frozen=True)
class CodedTensors:
    """What was recognised: readers by canonical name, the stored names that they take, and what is wrong with others."""

    readers: Mapping[str, CodedRows]
    taken: frozenset[str]
    wrong: tuple[tuple[str, str], ...]
    left_out: frozenset[str] = frozenset()  # canonical names among those that are not wanted


def coded_tensors(
    model: Model, known: frozenset[str], stored: Mapping[str, FileRows], model_dtype: DType, config: Mapping[str, object], root: Path
) -> CodedTensors:
    """The quantized tensors among `stored`. `known`: canonical names that are left out on request; their parts are taken too."""
    quantization = config.get(QUANTIZATION)
    stated = quantization if isinstance(quantization, Mapping) else {}
    scale_fmt = "ue8m0" if stated.get("scale_fmt") == "ue8m0" else ""
    readers: dict[str, CodedRows] = {}
    taken: set[str] = set()
    wrong = []
    left_out = set()
    for base, parts in _bases(stored).items():
        name = f"{base}.weight"
        if name in known:
            left_out.add(name)
            taken |= {f"{base}.{suffix}" for suffix in parts}
        if name not in model.tensors:
            continue
        tensor = model.tensors[name]
        try:
            found = recognise({suffix: (rows.dtype, rows.shape) for suffix, rows in parts.items()}, tensor.shape, stated)
            if found is None:
                raise SourceError(f"has parts of a quantized tensor ({', '.join(sorted(parts))}), but not all.", hint="Is the download complete?")
        except SourceError as error:
            wrong.append((name, error.line.rstrip(".")))
            taken |= {f"{base}.{suffix}" for suffix in parts}
            continue
        chosen = {suffix: parts[suffix] for suffix in found.suffixes}
        taken |= {f"{base}.{suffix}" for suffix in chosen}
        readers[name] = CodedRows(name, root, chosen, found.decoder, tensor.shape, canonical_dtype(tensor, model_dtype), scale_fmt)
    return CodedTensors(readers, frozenset(taken), tuple(wrong), frozenset(left_out))


def _bases(stored: Mapping[str, FileRows]) -> dict[str, dict[str, FileRows]]:
    """Module path -> parts by suffix, for every module that has a part which only quantized ones have, or an FP8 weight."""
    bases: dict[str, dict[str, FileRows]] = {}
    for name, rows in stored.items():
        base, _, suffix = name.rpartition(".")
        if base and (suffix in SUFFIXES or (suffix == "weight" and rows.dtype.name.startswith("float8"))):
            bases.setdefault(base, {})[suffix] = rows
    for base, parts in bases.items():
        if "weight" not in parts and f"{base}.weight" in stored:
            parts["weight"] = stored[f"{base}.weight"]
    return bases


def check_method(config: Mapping[str, object], file: object) -> None:
    """UnsupportedError for a `quantization_config` of a method that no codec reads."""
    quantization = config.get(QUANTIZATION)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if not isinstance(quantization, Mapping) or method not in METHODS:
        raise UnsupportedError(
            f"says that the weights are quantized ({method}); such sources are not read.", file=file,
            hint=f"{', '.join(METHODS)} are; or use the bf16 release.",
        )  # fmt: skip


def config_notes(config: Mapping[str, object], readers: Mapping[str, CodedRows], file: object) -> tuple[str, ...]:
    """Where config.json and the tensors disagree on what is quantized: the tensors are believed. SourceError if none is quantized at all."""
    quantization = config.get(QUANTIZATION)
    if not isinstance(quantization, Mapping):
        return (f"config.json says nothing of the {len(readers):,} quantized tensors; they are decoded all the same",) if readers else ()
    if not readers:
        raise SourceError("says that the weights are quantized, and none is.", file=file, hint="Remove quantization_config if they are not.")
    listed = quantization.get("modules_to_not_convert") or quantization.get("ignored_layers") or quantization.get("ignore") or ()
    names = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    both = sorted(name for name in readers if name.removesuffix(".weight") in names)
    if both:
        return (f"config.json lists {len(both):,} modules as not quantized that are ({both[0].removesuffix('.weight')}); the tensors are believed",)
    return ()
