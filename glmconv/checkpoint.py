"""A checkpoint of any format as a lazy mapping from canonical name to tensor. It never holds weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from glmconv.archs import Model
from glmconv.dtypes import DType
from glmconv.errors import SourceError, UnsupportedError, UsageError
from glmconv.formats import FORMATS
from glmconv.formats.binding import refuse
from glmconv.formats.coded import derived
from glmconv.formats.format import FILE_PREFIX, Format, Opened, OpenOptions, RowReader, row_size
from glmconv.formats.gguf_rows import gguf_derived
from glmconv.formats.graft import grafted
from glmconv.formats.lora import merged
from glmconv.formats.torch_dist import same_number

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$")


@dataclass(frozen=True)
class LazyTensor:
    """One canonical tensor: its shape and dtype are known, its values are read when asked for."""

    name: str
    reader: RowReader

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.shape

    @property
    def dtype(self) -> DType:
        return self.reader.dtype

    @property
    def row_size(self) -> int:
        """Bytes of one row (of one element, if there is one axis)."""
        return row_size(self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        return self.row_size * self.shape[0]

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill `out`, a whole number of rows, with little-endian bytes from row `start` on. Raises SourceError."""
        self.reader.read_into(start, out)

    def read(self, rows: slice = slice(None)) -> torch.Tensor:
        """The rows (all of them by default) as a CPU tensor [rows, ...] of the canonical dtype. Raises SourceError."""
        import torch

        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError("rows are read one after another: the step of the slice must be 1")
        count = max(0, stop - start)
        out = torch.empty(max(1, count * self.row_size), dtype=torch.uint8)
        if count:
            self.read_into(start, out.numpy().data[: count * self.row_size])
        return out[: count * self.row_size].view(getattr(torch, self.dtype.name)).view(count, *self.shape[1:])


class Checkpoint:
    """An opened source. Iterating gives (name, LazyTensor) in the architecture's order; it is also the engine's source of rows.

    Attributes: `path`, `format`, `config` (config.json as a mapping), `arch` (the bound `Model`), `tensors`, `opened` (all that the format found).
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.path = opened.path
        self.format = opened.format
        self.config: Mapping[str, object] = opened.config
        self.arch: Model = opened.model
        self.tensors: Mapping[str, LazyTensor] = {name: LazyTensor(name, reader) for name, reader in opened.tensors.items()}

    def __iter__(self) -> Iterator[tuple[str, LazyTensor]]:
        return iter(self.tensors.items())

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def _reader(self, name: str) -> RowReader:
        if name.startswith(FILE_PREFIX):
            return self.opened.side_files[name.removeprefix(FILE_PREFIX)]
        return derived(self.opened.tensors, name) or gguf_derived(self.opened.tensors, name) or self.opened.tensors[name]

    def row_size(self, tensor: str) -> int:
        reader = self._reader(tensor)
        return row_size(reader.shape, reader.dtype)

    def read_into(self, tensor: str, start: int, out: memoryview) -> None:
        self._reader(tensor).read_into(start, out)

    def place(self, tensor: str) -> tuple[int, int]:
        return self._reader(tensor).place

    def check_unchanged(self) -> None:
        for folder in self.opened.folders:
            folder.check_unchanged()

    def close(self) -> None:
        for folder in self.opened.folders:
            folder.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_checkpoint(
    path: str | Path, *, mtp: bool = True, origin: str | Path | None = None, strict: bool = True, dialect: str = "auto",
    mtp_from: str | Path | None = None, mmproj: str | Path | None = None, lora: str | Path | None = None,
) -> Checkpoint:  # fmt: skip
    """Open a folder, a Hub repository, or a GGUF file, of any known format.

    mtp False leaves the MTP layers out, `mtp_from` takes them from another checkpoint; `lora` is an adapter to merge; `origin` is the Hugging
    Face release of a torch_dist checkpoint that a trainer saved, `dialect` the trainer's, where its tensors do not tell; `mmproj` is the file of
    a GGUF model's vision tower, whose tensors are otherwise named in `opened.apart` and not there. `strict` False keeps missing, unexpected and
    wrong tensors in `opened` instead of raising for them.
    Raises SourceError (broken, incomplete, hostile) or UnsupportedError (a format or architecture that is not known).
    """
    place = resolve(path)
    with looked_at(place):
        form = detected(place)
    if mmproj is not None and form.name != "gguf":
        raise UsageError(f"--mmproj is a GGUF source's, {place} is {form.title}.")
    release, tower = None if origin is None else resolve(origin, weights=False), None if mmproj is None else Path(mmproj)
    options = OpenOptions(mtp and mtp_from is None, release, dialect, tower)
    opened = form.open(place, options)
    if mtp_from is not None:
        if not mtp:
            raise UsageError("--mtp drop and --mtp-from do not go together.")
        opened = grafted(opened, open_checkpoint(mtp_from).opened)
    if lora is not None:
        opened = merged(opened, resolve(lora))
    if strict:
        refuse(place, opened.missing, opened.unexpected, opened.wrong, opened.model)
        if opened.missing or opened.unexpected or opened.wrong:
            raise SourceError("is not complete.", file=place)
    return Checkpoint(opened)


@contextmanager
def looked_at(path: Path) -> Iterator[None]:
    """SourceError for a path that the system does not let us look at: no permission, a name too long."""
    try:
        yield
    except OSError as problem:
        raise SourceError(f"cannot be looked at: {problem.strerror}.", file=path) from None


def detected(place: Path) -> Format:
    """The format of a folder. UnsupportedError if it is none that is known, SourceError if it is an unfinished output."""
    unfinished(place)
    form = next((form for form in FORMATS.values() if form.detect(place)), None)
    if form is None and place.is_dir() and any(child.name.startswith("mp_rank_") for child in place.iterdir()):
        raise UnsupportedError("is a legacy Megatron checkpoint of one parallel layout.", file=place, hint="Save it with --ckpt-format torch_dist.")
    if form is None:
        raise UnsupportedError(
            "is no checkpoint that glmconv reads: neither config.json and .safetensors files, nor a Megatron torch_dist folder, nor GGUF.",
            file=place, hint=f"Formats: {', '.join(FORMATS)}.",
        )  # fmt: skip
    unfinished(form.manifest_at(place))
    return form


def unfinished(path: Path) -> None:
    """SourceError if the folder is an output of ours that was never finished: the manifest is the only meaning of done."""
    if (path / ".glmconv" / "plan.json").exists() and not (path / "glmconv_manifest.json").exists():
        raise SourceError("is an unfinished output of glmconv.", file=path, hint="Run the command that writes it again; it goes on where it stopped.")


def resolve(name: str | Path, *, weights: bool = True) -> Path:
    """A local folder, or a Hub id (`zai-org/GLM-4.5`) downloaded to the Hub's cache. SourceError if neither is there."""
    if not str(name):
        raise UsageError("the source is empty.", hint="Is a variable of your script not set?")
    path = Path(name)
    with looked_at(path):
        path = same_number(path)
        if path.exists():
            if not path.is_dir() and path.suffix.lower() != ".gguf":
                raise UnsupportedError("is a file; a checkpoint is a folder, or a file called .gguf.", file=path)
            return path
    if not isinstance(name, str) or not HUB_ID.match(name):
        raise SourceError("does not exist.", file=path, hint="Pass a checkpoint's folder, or a Hub id such as zai-org/GLM-4.5.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise SourceError(f"is no folder here, and could not be downloaded from the Hub: {reason}", file=name) from None


__all__ = ["Checkpoint", "LazyTensor", "Model", "open_checkpoint", "resolve"]
