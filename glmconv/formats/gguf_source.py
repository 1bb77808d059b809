"""GGUF as a source: config and tokenizer from what rides along or from the keys, tensors by the table that writes them, read backwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glmconv import strict_json
from glmconv.archs import Model, bind, field_of, spec_for
from glmconv.archs.model import TensorSpec
from glmconv.codecs.ggml import TYPES
from glmconv.dtypes import BY_NAME, DType
from glmconv.engine.inputs import plain_name
from glmconv.engine.journal import folder_of_file
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.binding import canonical_dtype, config_dtype, expected
from glmconv.formats.format import FileLayout, Opened, OpenOptions, RowReader
from glmconv.formats.gguf_config import FoundConfig, Told, config_of
from glmconv.formats.gguf_files import GgufFiles, StoredTensor, model_at, models_in, open_files
from glmconv.formats.gguf_metadata import CONFIG, SOURCE, embedded_files
from glmconv.formats.gguf_originals import original
from glmconv.formats.gguf_split import whole_name
from glmconv.formats.gguf_stored import GgufRows, Stretch, decoded, narrow, trimmed
from glmconv.formats.gguf_tensors import GGUFTensor, Transform, gguf_tensors, in_tower, layer_of
from glmconv.formats.gguf_tower import Tower, open_tower
from glmconv.formats.gguf_types import Entry, Kind
from glmconv.formats.gguf_vocabulary import tokenizer_files
from glmconv.formats.graft import with_field
from glmconv.formats.origin import parse_layout
from glmconv.formats.side_files import travels
from glmconv.formats.torch_dist_layout import LAYOUT

FLOAT32, BFLOAT16 = BY_NAME["float32"], BY_NAME["bfloat16"]
LAYOUT_LARGEST = 64 << 20
PARTS, MOST_PARTS = 3, 262_144  # matrices of an expert; of all experts, or of all heads that are stored apart: GLM-5 has 60,000
STACKS = (("_exps.weight", "experts", "experts"), (".attn_k_b.weight", "heads", "heads"))
SAMPLE = 4096  # bytes of a tensor that are looked at to tell whether float32 is more than it needs
LOST = (
    "not in GGUF, so that it cannot be recovered: the list of end-of-answer ids (taken to be end of text, user, observation), the flags of added "
    "tokens, the tokenizer's post-processor, the release's other files, and how its tensors were spread over files"
)


def detect(path: Path) -> bool:
    """A file called .gguf, or a folder with such files and none of Hugging Face's weights."""
    if path.is_file():
        return path.name.lower().endswith(".gguf")
    return path.is_dir() and bool(models_in(path)) and not any(name.suffix == ".safetensors" for name in path.iterdir())


def manifest_at(path: Path) -> Path:
    """The folder beside a file, or beside what it is a part of; a folder of files has none of its own."""
    return folder_of_file(path.with_name(whole_name(path.name))) if path.is_file() else path


def open_source(path: Path, options: OpenOptions) -> Opened:
    """Open a GGUF model. SourceError or UnsupportedError if it is broken or not GLM's; tensors are matched, not judged."""
    files = open_files(model_at(path))
    kind = files.kv.get("general.type")
    if kind is not None and kind.value not in ("model", "finetune"):
        raise UnsupportedError(f"holds a {str(kind.value)[:60]}, not a language model.", file=files.path)
    embedded = checked_names(files)
    tower = open_tower(options.mmproj)
    found = config_of(files, embedded)
    found = tower.told(found) if tower else found
    matched = match(found.config, files, options, tower)
    side, notes = side_bytes(files, embedded, found, Told(files))
    layout = embedded_layout(embedded, files)
    every = [files, *([tower.files] if tower else [])]
    paths = tuple(file.path for each in every for file in each.files.values())
    also = {"mmproj": tower.files.fingerprint} if tower else {}
    return Opened(
        format="gguf", path=path, config=found.config, config_bytes=found.data, model=matched.model, tensors=matched.readers,
        folders=tuple(each.folder for each in every), fingerprint={"format": "gguf", "files": files.fingerprint, **also}, missing=matched.missing,
        unexpected=matched.unexpected, wrong=matched.wrong, dropped=matched.dropped,
        side_files={name: Bytes(content, len(paths) + n) for n, (name, content) in enumerate(side.items())}, layout=layout,
        notes=(*found.notes, *notes, *matched.notes), stored_bytes=sum(each.stored_bytes for each in every), apart=matched.apart,
        entries=entries_of(files),
        read=(*paths, *map(folder_of_file, paths), manifest_at(files.path)),
    )  # fmt: skip


def entries_of(files: GgufFiles) -> tuple[Entry, ...]:
    return tuple(Entry(key, value.kind, value.value) for key, value in files.kv.items())


@dataclass(frozen=True)
class Bytes:
    """A side file whose bytes are in memory."""

    content: bytes
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.content),)

    @property
    def dtype(self) -> DType:
        return BY_NAME["uint8"]

    @property
    def place(self) -> tuple[int, int]:
        return self.number, 0

    def read_into(self, start: int, out: memoryview) -> None:
        out[:] = self.content[start : start + len(out)]


def checked_names(files: GgufFiles) -> dict[str, bytes]:
    """The files that ride along, by name. SourceError for a name that no file of a release has: it would be written to disk."""
    found = embedded_files({key: (value.kind, value.value) for key, value in files.kv.items()})
    seen: dict[str, str] = {}
    for key, value in files.kv.items():
        if not key.startswith(SOURCE):
            continue
        name = key.removeprefix(SOURCE)
        if value.kind is not Kind.STRING:
            raise SourceError(f"{key} is no text.", file=files.path)
        if not plain_name(name) or not (travels(name) or name in (CONFIG, LAYOUT)):
            raise SourceError(f"{key}: {name!r} cannot be the name of a release's file.", file=files.path)
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise SourceError(f"{key}: the name is spelled {other} too.", file=files.path)
    return found


def side_bytes(files: GgufFiles, embedded: Mapping[str, bytes], found: FoundConfig, told: Told) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files beside the weights and what there is to say of them."""
    if any(name not in (CONFIG, LAYOUT) for name in embedded):
        return {name: content for name, content in sorted(embedded.items()) if name not in (CONFIG, LAYOUT)}, ()
    made = tokenizer_files(files.kv, told.ends, told.vocabulary, files.path)
    rebuilt = f"rebuilt from the file's keys: {', '.join(made)}" if made else "the file holds no tokenizer"
    return made, (rebuilt, LOST) if found.preset else (rebuilt,)


def embedded_layout(embedded: Mapping[str, bytes], files: GgufFiles) -> FileLayout | None:
    if LAYOUT not in embedded:
        return None
    file = files.path.with_name(f"{files.path.name}: {SOURCE}{LAYOUT}")
    return parse_layout(strict_json.parse(embedded[LAYOUT], file=file, limit=LAYOUT_LARGEST), file)


@dataclass(frozen=True)
class Matched:
    """A model and a file's tensors brought together."""

    model: Model
    readers: Mapping[str, RowReader]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...]
    apart: tuple[str, ...]
    notes: tuple[str, ...]


def table(model: Model) -> list[GGUFTensor]:
    """Every tensor that the model's files may hold. A tower's are in a file of their own, and would be added here."""
    return gguf_tensors(model)


def match(config: Mapping[str, object], files: GgufFiles, options: OpenOptions, tower: Tower | None) -> Matched:
    """Find every canonical tensor. `apart` are those of a vision tower, if that was not given."""
    spec, mtp = spec_for(config, files.path), Told(files).mtp
    stated = field_of(config, spec.mtp_field) or 0
    counted = config if stated == mtp else with_field(config, spec.mtp_field, mtp)
    whole = bind(spec, counted, aliases=True, file=files.path)
    refuse_absurd(whole, files)
    every = table(whole)
    there = {run.tensor for tensor in every if tensor.name in files.tensors for run in tensor.runs}
    aliases = any(tensor.alias and name in there for name, tensor in whole.tensors.items())
    bound = whole if aliases else bind(spec, counted, file=files.path)
    wanted = expected(counted, there.__contains__, aliases=aliases, mtp=options.mtp, file=files.path, whole=bound)
    stored = every if wanted.model is whole else table(wanted.model)
    binding = Binding(wanted.model, files, config_dtype(config) or BFLOAT16)
    for tensor in stored:
        binding.add(tensor)
    binding.finish(tower)
    kept = {tensor.name for tensor in stored}
    left = {tensor.name for tensor in table(bound)} if wanted.dropped else set()
    notes = [f"config.json asks for {spec.mtp_field} {stated}, {mtp} are there: that is written"] if stated != mtp else []
    return Matched(
        wanted.model, binding.readers, tuple(binding.missing), tuple(name for name in files.tensors if name not in kept | left),
        tuple(binding.wrong), tuple(n for n in wanted.dropped if n in there), tuple(binding.apart), (*notes, *wanted.notes, *binding.notes()),
    )  # fmt: skip


def refuse_absurd(model: Model, files: GgufFiles) -> None:
    """SourceError for sizes that ask for more than the file can hold, before anything is made of them."""
    s, layers = model.sizes, {layer_of(name) for name in files.tensors} - {-1}
    if s["layers"] > len(layers):
        raise SourceError(f"has tensors of {len(layers):,} layers; its keys or its config say {s['layers']:,}.", file=files.path)
    for stored in files.tensors.values():
        for suffix, size, what in STACKS:
            if stored.name.endswith(suffix) and size in s and trimmed(stored.tensor.ne)[2:] != trimmed((1, 1, s[size]))[2:]:
                raise SourceError(f"is {list(stored.tensor.ne)}; there are {s[size]:,} {what}.", file=stored.file.path, tensor=stored.name)
    each = max(PARTS * s.get("experts", 0), 2 * s["heads"] if "kv_rank" in s else 0)
    if each * len(layers) > MOST_PARTS:
        raise SourceError(f"says it has {s.get('experts', 0):,} experts and {s['heads']:,} heads in {len(layers):,} layers.", file=files.path)


class Binding:
    """A model's canonical tensors, each gathered from the stored ones that hold its rows."""

    def __init__(self, model: Model, files: GgufFiles, dtype: DType) -> None:
        self.model = model
        self.files = files
        self.dtype = dtype
        self.readers: dict[str, RowReader] = {}
        self.missing: list[str] = []
        self.wrong: list[tuple[str, str]] = []
        self.apart: list[str] = []
        self._stretches: dict[str, list[Stretch]] = {}
        self._lacking: dict[str, str] = {}  # canonical tensor -> the stored one that is not there
        self._judged: set[str] = set()  # canonical tensors of stored ones that are wrong

    def add(self, tensor: GGUFTensor) -> None:
        """Deal a stored tensor's rows out to the canonical ones."""
        stored = self.files.tensors.get(tensor.name)
        if stored is None:
            self._lacking |= {run.tensor: tensor.name for run in tensor.runs}
            return
        if problem := mismatch(tensor, stored):
            self.wrong.append((tensor.name, problem))
            self._judged |= {run.tensor for run in tensor.runs}
            return
        at = 0
        for run in tensor.runs:
            self._stretches.setdefault(run.tensor, []).append(Stretch(run.first, run.rows, stored, at, tensor.transform))
            at += self.model.tensors[run.tensor].shape[1] if tensor.transform is Transform.TRANSPOSED else run.rows

    def finish(self, tower: Tower | None) -> None:
        """Readers for what is whole; what is not goes where it belongs."""
        seen = tower.readers(self.model, self.dtype, len(self.files.files)) if tower else {}
        for name, tensor in self.model.tensors.items():
            stretches = self._stretches.get(name)
            if name in self._judged:
                continue
            if name in seen:
                self.readers[name] = seen[name]
            elif in_tower(tensor):
                self.apart.append(name)
            elif stretches and name in self._lacking:
                self.wrong.append((name, f"lacks a part of it, {self._lacking[name]}"))
            elif not stretches:
                self.missing.append(name)
            else:
                found = tuple(sorted(stretches, key=lambda stretch: stretch.first))
                kept = original(self.files.kv, name, tensor.shape, found) if inexact(found) else None
                self.readers[name] = kept or GgufRows(name, tensor.shape, self._dtype_of(tensor, found[0].stored), found)

    def _dtype_of(self, tensor: TensorSpec, stored: StoredTensor) -> DType:
        """What the table says; where it leaves that to the source, float32 if the numbers need it."""
        if tensor.row.loose and not tensor.dtype and needs_float32(stored, self.dtype):
            return FLOAT32
        return canonical_dtype(tensor, self.dtype)

    def notes(self) -> Sequence[str]:
        found = []
        if self.apart:
            found.append(f"the {len(self.apart):,} tensors of the vision tower are not here: an mmproj file holds them")
        if any(isinstance(reader, GgufRows) and inexact(reader.stretches) for reader in self.readers.values()):
            found.append("A_log is stored as -exp(A_log): a number that gives the same is taken, the original one wherever that was a bfloat16")
        embedding = self.files.tensors.get("token_embd.weight")
        if embedding is not None and needs_float32(embedding, self.dtype):
            found.append(f"holds float32 numbers, which are rounded to {self.dtype}: no embedded config.json says that the model is float32")
        return found


def inexact(stretches: Sequence[Stretch]) -> bool:
    """Whether what is stored does not tell the original numbers."""
    return any(stretch.transform is Transform.NEGATIVE_EXPONENTIAL for stretch in stretches)


def mismatch(tensor: GGUFTensor, stored: StoredTensor) -> str:
    """What is wrong with a stored tensor, in words; empty if nothing is. UnsupportedError for a type that is not read."""
    kind, ne = stored.tensor.type, stored.tensor.ne
    if kind.name not in TYPES:
        raise UnsupportedError(f"is of ggml's type {kind.name}, which is not read.", file=stored.file.path, tensor=tensor.name)
    if trimmed(ne) != trimmed(tensor.ne):
        return f"is {list(ne)}, the model's sizes need {list(tensor.ne)} (columns first)"
    if len(tensor.ne) == 1 and kind.block > 1:
        return f"has one axis and the type {kind.name}, which has none of its own"
    return ""


def needs_float32(stored: StoredTensor, dtype: DType) -> bool:
    """Whether float32 numbers, the first few looked at, are more than the dtype holds."""
    if stored.tensor.type.name != "F32" or dtype == FLOAT32:
        return False
    some = decoded(stored, 0, min(SAMPLE, stored.tensor.size) // 4, 1)
    narrowed = np.empty(some.shape, np.uint16 if dtype == BFLOAT16 else np.float16)
    narrow(some, narrowed)
    wide = (narrowed.astype(np.uint32) << 16).view(np.float32) if dtype == BFLOAT16 else narrowed.astype(np.float32)
    return bool((wide.view(np.uint32) != some.view(np.uint32)).any())
