"""A LoRA adapter in PEFT's layout, merged as rows are read: W + scale * B @ A in float32, rounded once to the weights' dtype.

Source: peft's `LoraConfig` and `LoraLayer`: scale = alpha / r, or alpha / sqrt(r) for rsLoRA; `rank_pattern` and `alpha_pattern` give other numbers
to modules by the end of their names; `modules_to_save` and trained biases lie beside the factors, whole. `ParamWrapper` has all experts' factors in
one: A [experts * rank, in], an expert's rows together; B [out, rank * experts], an expert's columns `experts` apart. The products are added in the
order of the rank, so that no bit depends on how many rows are read at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmconv import strict_json
from glmconv.dtypes import DType
from glmconv.engine.inputs import InputFile, InputFolder
from glmconv.engine.plan import sha256
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.coded import CodedRows
from glmconv.formats.format import FileRows, Opened, RowReader, row_size
from glmconv.formats.gguf_stored import GgufRows
from glmconv.formats.safetensors_header import read_header
from glmconv.formats.widen import floats

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LARGEST = 4 << 20
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight\Z")
PATTERN = re.compile(r"\^?[\w.]{1,300}\Z")  # of a module's name; a regular expression of a stranger's is not run
# What changes more than W + scale * B @ A
REFUSED = ("use_dora", "fan_in_fan_out", "lora_bias", "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens",
           "trainable_token_indices", "arrow_config")  # fmt: skip
EXPERTS, BASE_LAYER = ".mlp.experts", ".base_layer"  # a module that has a second factor is wrapped twice
INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")  # the others replace the base's weights when training begins
BLOCK = 1 << 18  # elements that are worked on at once: two float32 buffers of them stay in a cache
RANK_LARGEST = 4096
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: the factors by module, the tensors that it replaces whole, and what decides its scales."""

    path: Path
    folder: InputFolder
    factors: Mapping[str, tuple[FileRows, FileRows]]
    replaced: Mapping[str, FileRows]
    config: Mapping[str, object]
    digest: list[object]

    def scale(self, module: str, rank: int) -> float:
        """Of a module's product. SourceError if its factors have not the rank that the config says."""
        wanted = self._number("rank_pattern", "r", module)
        if wanted != rank:
            raise SourceError(f"has rank {rank}, {CONFIG} says {wanted:g}.", file=self.path / WEIGHTS, tensor=module)
        return self._number("alpha_pattern", "lora_alpha", module) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _number(self, pattern: str, field: str, module: str) -> float:
        """The number of the first pattern that a module's name ends in, else the config's own."""
        value = self.config.get(field)
        patterns = self.config.get(pattern) or {}
        if not isinstance(patterns, Mapping):
            raise SourceError(f"{pattern} is no object.", file=self.path / CONFIG)
        for text, number in patterns.items():
            name = text.replace("\\.", ".").removeprefix(".*.")  # which says no more than that a name ends so
            if not PATTERN.match(name):
                raise UnsupportedError(f"{pattern} has the regular expression {text!r}; names of modules are read.", file=self.path / CONFIG)
            if module == name.removeprefix("^") or (not name.startswith("^") and module.endswith(f".{name}")):
                value = number
                break
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or (field == "r" and value < 1):
            raise SourceError(f"{field} is {value!r}, a number is needed.", file=self.path / CONFIG)
        return float(value)


@dataclass(frozen=True)
class Merged:
    """A canonical tensor with its product added. `base` [rows, columns], `a` [rank, columns], `b` [rows, rank].

    Of a layer's experts in one: `b`'s rows count from `first`, and its columns are those of `expert`, one in so many `experts`.
    """

    base: RowReader
    a: FileRows
    b: FileRows
    scale: float
    first: int = 0
    expert: int = 0
    experts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> DType:
        return self.base.dtype

    @property
    def place(self) -> tuple[int, int]:
        return self.base.place

    def read_into(self, start: int, out: memoryview) -> None:
        width = row_size(self.shape, self.dtype)
        a = floats(self.a, 0, self.a.shape[0])
        step = max(1, BLOCK // self.shape[1])
        wide = self.base.widened() if isinstance(self.base, CodedRows | GgufRows) else self.base
        for at in range(0, len(out) // width, step):
            rows = min(step, len(out) // width - at)
            b = floats(self.b, self.first + start + at, rows)[:, self.expert :: self.experts]
            total = np.zeros((rows, self.shape[1]), np.float32)
            product = np.empty_like(total)
            for k in range(a.shape[0]):
                np.multiply(b[:, k : k + 1], a[k], out=product)
                total += product
            total *= np.float32(self.scale)
            total += floats(wide, start + at, rows)
            out[at * width : (at + rows) * width] = narrowed(total, self.dtype)


@dataclass(frozen=True)
class Recast:
    """A tensor that the adapter holds whole, in the dtype of the one that it replaces: widened exactly, or rounded once."""

    stored: FileRows
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def place(self) -> tuple[int, int]:
        return self.stored.place

    def read_into(self, start: int, out: memoryview) -> None:
        rows = len(out) // row_size(self.shape, self.dtype)
        out[:] = narrowed(floats(self.stored, start, rows), self.dtype)


def narrowed(values: Floats, dtype: DType) -> memoryview:
    """float32 rounded to nearest even, as the bytes of `dtype`."""
    stored: NDArray[Any]
    if dtype.name == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        stored = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
        stored[np.isnan(values)] = 0x7FC0
    else:
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(values).astype("<f2" if dtype.name == "float16" else "<f4")
    out: memoryview = stored.reshape(-1).view(np.uint8).data
    return out


def open_adapter(path: Path) -> Adapter:
    """Read an adapter's config and header. UnsupportedError names what of it is not read, SourceError what is wrong with it."""
    folder = InputFolder(path)
    config, data = _config(folder)
    if not folder.exists(WEIGHTS):
        if any(name.endswith((".bin", ".pt")) for name in folder.names()):
            raise UnsupportedError("holds a pickled adapter, which runs code when it is loaded; it is not read.", file=path,
                                   hint="Save it as safetensors (peft: save_pretrained).")  # fmt: skip
        raise SourceError("is missing.", file=path / WEIGHTS)
    file = folder.open(WEIGHTS)
    header = read_header(file)
    sides: dict[str, dict[str, FileRows]] = {}
    replaced: dict[str, FileRows] = {}
    for stored_name, stored in header.tensors.items():
        name = stored_name.removeprefix(PREFIX)
        if name == stored_name or (".lora_" in name and not FACTOR.match(name)):
            raise UnsupportedError("is not merged: a LoRA has lora_A and lora_B of linear modules.", file=path / WEIGHTS, tensor=stored_name)
        if stored.dtype.name not in ("bfloat16", "float16", "float32"):
            raise UnsupportedError(f"is {stored.dtype}; adapters are of floats.", file=path / WEIGHTS, tensor=stored_name)
        rows = _rows(file, stored.offset, stored.shape, stored.dtype)
        factor = FACTOR.match(name)
        if factor:
            sides.setdefault(factor["module"], {})[factor["side"]] = rows
        else:
            replaced[name] = rows
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise SourceError("has only one of lora_A and lora_B.", file=path / WEIGHTS, tensor=module)
    factors = {module: (pair["A"], pair["B"]) for module, pair in sides.items()}
    return Adapter(path, folder, factors, replaced, config, [file.size, header.digest, sha256(data)])


def _rows(file: InputFile, offset: int, shape: tuple[int, ...], dtype: DType) -> FileRows:
    return FileRows(file, 0, offset, shape, dtype, row_size(shape, dtype))


def _config(folder: InputFolder) -> tuple[Mapping[str, object], bytes]:
    """adapter_config.json. UnsupportedError names a field by which the adapter is more than a LoRA."""
    where = folder.root / CONFIG
    if not folder.exists(CONFIG):
        raise SourceError("is missing.", file=where, hint="--lora names the folder of an adapter as PEFT saves it.")
    file = folder.open(CONFIG)
    data = file.read(0, min(file.size, CONFIG_LARGEST + 1))
    config = strict_json.parse(data, file=where, limit=CONFIG_LARGEST)
    if not isinstance(config, dict):
        raise SourceError("is not a JSON object.", file=where)
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"says peft_type {config.get('peft_type')!r}; LORA is merged.", file=where)
    for field in REFUSED:
        if config.get(field):
            raise UnsupportedError(f"says {field}: such adapters are not merged.", file=where)
    if not any(config.get("init_lora_weights") is value or config.get("init_lora_weights") == value for value in INITIAL):
        raise UnsupportedError(f"says init_lora_weights {config['init_lora_weights']!r}: its base is not the release.", file=where)
    return config, data


def merged(opened: Opened, path: Path) -> Opened:
    """`opened` with an adapter merged into it. SourceError for a factor or tensor that is of nothing in it, or of another shape."""
    adapter = open_adapter(path)
    tensors: dict[str, RowReader] = dict(opened.tensors)
    for module, (a, b) in adapter.factors.items():
        if module.removesuffix(BASE_LAYER).endswith(EXPERTS) and f"{module}.weight" not in tensors:
            tensors |= of_experts(opened, adapter, module.removesuffix(BASE_LAYER), a, b)
            continue
        base = _base(opened, f"{module}.weight", adapter)
        shape = base.shape
        if len(shape) != 2 or len(a.shape) != 2 or b.shape != (shape[0], a.shape[0]) or a.shape[1] != shape[1] or a.shape[0] > RANK_LARGEST:
            what = f"has factors {list(b.shape)} and {list(a.shape)}, the weight is {list(shape)}."
            raise SourceError(what, file=path / WEIGHTS, tensor=module, hint="Is the adapter of this model?")
        tensors[f"{module}.weight"] = Merged(base, a, b, adapter.scale(module, a.shape[0]))
    for name, rows in adapter.replaced.items():
        base = _base(opened, name, adapter)
        if rows.shape != base.shape:
            raise SourceError(f"is {list(rows.shape)}, the model has {list(base.shape)}.", file=path / WEIGHTS, tensor=name)
        tensors[name] = rows if rows.dtype == base.dtype else Recast(rows, base.dtype)
    for name, tensor in opened.model.tensors.items():
        if tensor.alias in adapter.replaced and name in tensors:
            tensors[name] = tensors[tensor.alias]  # a copy of what is replaced
    note = f"{len(adapter.factors):,} weights are merged with the adapter {path}, {len(adapter.replaced):,} tensors are replaced by its own"
    return replace(
        opened, tensors=tensors, folders=(*opened.folders, adapter.folder), notes=(*opened.notes, note),
        fingerprint={**opened.fingerprint, "lora": adapter.digest},
    )  # fmt: skip


def of_experts(opened: Opened, adapter: Adapter, module: str, a: FileRows, b: FileRows) -> dict[str, Merged]:
    """All experts of a layer with their products: gate and up from one factor, down from another, told apart by their shapes.

    SourceError if the factors are neither's.
    """
    experts = opened.model.sizes.get("experts", 0)
    down, gate, up = ([f"{module}.{n}.{part}_proj.weight" for n in range(experts)] for part in ("down", "gate", "up"))
    wide, narrow = _base(opened, gate[0], adapter).shape[::-1] if experts else (0, 0)
    outer = (b.shape[0], a.shape[1]) if len(a.shape) == len(b.shape) == 2 else (0, 0)
    parts = {(narrow * 2, wide): ("gate_up_proj", (gate, up)), (wide, narrow): ("down_proj", (down,))}.get(outer)
    if parts is None or not experts or a.shape[0] != b.shape[1] or a.shape[0] % experts or a.shape[0] > RANK_LARGEST * experts:
        what = f"has factors {list(b.shape)} and {list(a.shape)}, which are not of {experts} experts of {wide} and {narrow}."
        raise SourceError(what, file=adapter.path / WEIGHTS, tensor=module, hint="Is the adapter of this model?")
    rank = a.shape[0] // experts
    scale = adapter.scale(f"{module}.{parts[0]}", rank)
    return {
        names[n]: Merged(_base(opened, names[n], adapter), replace(a, offset=a.offset + n * rank * a.row_size, shape=(rank, a.shape[1])), b, scale,
                         half * narrow, n, experts)
        for half, names in enumerate(parts[1])
        for n in range(experts)
    }  # fmt: skip


def _base(opened: Opened, name: str, adapter: Adapter) -> RowReader:
    if name not in opened.tensors:
        what = f"is of no tensor of this {opened.model.spec.model_type}: there is no {name}."
        raise SourceError(what, file=adapter.path / WEIGHTS, tensor=name, hint="Is the adapter of this model?")
    return opened.tensors[name]
