"""What a run leaves beside its output, and where: the claim, one record per finished file. They are input too, so they are read strictly.

    OUT/.glmconv/plan.json                 the claim: this folder belongs to one plan
    OUT/.glmconv/<plan id>.tmp/            staged files
    OUT/.glmconv/<plan id>.journal/        a record per finished file, and per section of those that are written in sections

An output that is a file, not a folder, has such a folder of its own beside it, and its files' names in the plan begin with `../`:

    A.gguf                                 the output
    A.gguf.glmconv/                        OUT: state and manifest

Every document is canonical JSON whose first member is the sha256 of all its other bytes: a flipped bit anywhere shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glmconv.engine.files import Disk
from glmconv.engine.plan import Plan, Stretch, canonical_json, sha256
from glmconv.errors import SourceError, printable
from glmconv.strict_json import parse

CLAIM_FORMAT = "glmconv claim 1"
RECORD_FORMAT = "glmconv record 1"
STATE = ".glmconv"
VALUES = 1 << 24  # a manifest has some 14 for each stored piece, and a large model cut into small chunks has a million pieces
MANIFEST = "glmconv_manifest.json"
BESIDE = "../"
FOLDER_OF_FILE = ".glmconv"  # what follows the name of an output file in the name of its folder
CLAIM_LIMIT = 1 << 28
RECORD_LIMIT = 1 << 28
SEAL = re.compile(rb'\{"digest":"([0-9a-f]{64})",')
HEX = re.compile(r"[0-9a-f]{64}")
SHARED = "shared"  # in the place of a run's id, which is hexadecimal


@dataclass(frozen=True)
class Layout:
    """Where one plan's files lie below `root`."""

    root: Path
    plan_id: str

    @property
    def state(self) -> Path:
        return self.root / STATE

    @property
    def claim(self) -> Path:
        return self.state / "plan.json"

    @property
    def staging(self) -> Path:
        return self.state / f"{self.plan_id}.tmp"

    @property
    def journal(self) -> Path:
        return self.state / f"{self.plan_id}.journal"

    @property
    def manifest(self) -> Path:
        return self.root / MANIFEST

    def final(self, name: str) -> Path:
        return final_path(self.root, name)

    def record(self, name: str) -> Path:
        return self.journal / f"{flat(name)}.json"

    def staged(self, name: str, run_id: str) -> Path:
        return self.staging / f"{flat(name)}.{run_id}.part"

    def shared(self, name: str) -> Path:
        """Where a file is staged that is written in sections, by whichever runs."""
        return self.staged(name, SHARED)

    def staged_record(self, name: str, run_id: str) -> Path:
        """`%r` cannot come out of `flat`, so no file's staged name is another's record's."""
        return self.staging / f"{flat(name)}%r.{run_id}.part"


def flat(name: str) -> str:
    """A file's name as one path component; two names never give the same."""
    return name.replace("%", "%25").replace("/", "%2F")


def final_path(root: Path, name: str) -> Path:
    """Where a file of the output in `root` lies: in it, or beside it."""
    return root.parent / name.removeprefix(BESIDE) if name.startswith(BESIDE) else root / name


def folder_of_file(path: Path) -> Path:
    """The folder of an output that is the file `path`."""
    return path.with_name(path.name + FOLDER_OF_FILE)


def checked_name(name: object, root: Path, file: object = None) -> str:
    """`name` if it is one component, or a folder and one, or a file of the same beginning beside `root`.

    SourceError if it could lead anywhere else or upset a terminal.
    """
    if not isinstance(name, str):
        raise SourceError("a file name is not a string.", file=file)
    if name.startswith(BESIDE) and lies_beside(name.removeprefix(BESIDE), root):
        return name
    parts = name.split("/")
    if name.startswith(BESIDE) or len(parts) > 2 or not all(good_component(part) for part in parts) or parts[0] == STATE or name == MANIFEST:
        raise SourceError(f"{printable(name)!r} is not a name for a file of an output.", file=file)
    return name


def lies_beside(name: str, root: Path) -> bool:
    """Whether a file may be one of the output in `root` that lies beside it: `A-00001-of-00002.gguf` beside `A.gguf.glmconv`."""
    stem = Path(root.name.removesuffix(FOLDER_OF_FILE)).stem
    own = root.name.endswith(FOLDER_OF_FILE) and bool(stem) and name != root.name
    return own and name.startswith(stem) and good_component(name) and "/" not in name


def good_component(part: str) -> bool:
    """One path component: 1-255 bytes, printable, no slash or backslash, not `.` or `..`."""
    if part in ("", ".", "..") or "\\" in part or not part.isprintable():
        return False
    return len(part.encode("utf-8", "surrogatepass")) <= 255


def sealed(document: Mapping[str, object]) -> bytes:
    """Canonical JSON of `document` with its own digest as the first member. Every key must sort after "digest"."""
    body = canonical_json(document)
    return b'{"digest":"' + sha256(body).encode("ascii") + b'",' + body[1:]


def unsealed(data: bytes, *, file: object, limit: int) -> dict[str, object]:
    """The document that `sealed` made `data` of. SourceError if one bit differs, or if it is not strict JSON."""
    seal = SEAL.match(data)
    if seal is None or sha256(b"{" + data[seal.end() :]).encode("ascii") != seal[1]:
        raise SourceError("is damaged: its digest does not fit its content.", file=file)
    document = parse(data, file=file, limit=limit, values=VALUES, containers=VALUES // 4)
    if not isinstance(document, dict) or document.get("digest") != seal[1].decode("ascii"):
        raise SourceError("is damaged: not one object with one digest.", file=file)
    return document


def read_whole(disk: Disk, path: Path, limit: int) -> bytes:
    """The content of a small file of the output. OSError as the disk says it, SourceError if it is larger than `limit` bytes."""
    fd = disk.open(path)
    try:
        size = disk.status_of(fd).size
        if size > limit:
            raise SourceError(f"is {size:,} bytes large, more than {limit:,} make no sense.", file=path)
        content = memoryview(bytearray(size))
        at = 0
        while at < size:
            got = disk.read_into(fd, content[at:], at)
            if not got:
                raise SourceError(f"ends after {at:,} of {size:,} bytes.", file=path)
            at += got
        return bytes(content)
    finally:
        disk.close(fd)


def claim_of(plan: Plan) -> bytes:
    """The content of `plan.json`: the same for every run of a plan."""
    return sealed({"format": CLAIM_FORMAT, "plan_id": plan.id, "plan": plan.document})


def claimed_by(disk: Disk, root: Path) -> str | None:
    """The id of the plan that `root` is claimed for; None without a claim. SourceError if the claim is damaged."""
    path = root / STATE / "plan.json"
    try:
        content = read_whole(disk, path, CLAIM_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        return None
    document = unsealed(content, file=path, limit=CLAIM_LIMIT)
    if document.get("format") != CLAIM_FORMAT:
        raise SourceError("is not a claim of this version of glmconv.", file=path)
    return digest_field(document, "plan_id", path)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a file holds it: `offset` is its first byte in the file, `sha256` that of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    offset: int


@dataclass(frozen=True)
class Record:
    """One finished file, durable under its final name when the record is; or one section, durable in the staged file."""

    plan_id: str
    name: str
    size: int
    sha256: str
    tensors: Mapping[str, StoredTensor]

    def content(self) -> bytes:
        tensors = {name: [t.dtype, list(t.shape), t.sha256, t.offset] for name, t in self.tensors.items()}
        fixed = {"format": RECORD_FORMAT, "plan_id": self.plan_id, "name": self.name, "size": self.size, "sha256": self.sha256}
        return sealed({**fixed, "tensors": tensors})


def load_record(disk: Disk, layout: Layout, file: Stretch) -> Record | None:
    """The record of a file or a section of one, None if there is none. SourceError if it is damaged or speaks of something else than the plan."""
    path = layout.record(file.name)
    try:
        content = read_whole(disk, path, RECORD_LIMIT)
    except FileNotFoundError:
        return None
    document = unsealed(content, file=path, limit=RECORD_LIMIT)
    if set(document) != {"digest", "format", "plan_id", "name", "size", "sha256", "tensors"} or document["format"] != RECORD_FORMAT:
        raise SourceError("is not a record of this version of glmconv.", file=path)
    if (document["plan_id"], document["name"], document["size"]) != (layout.plan_id, file.name, file.size):
        raise SourceError("is the record of another file.", file=path)
    stored = document["tensors"]
    if not isinstance(stored, dict) or stored.keys() != {p.name for p in file.pieces if p.digested}:
        raise SourceError("does not list the tensors of its file.", file=path)
    tensors = {name: stored_tensor(entry, path, name) for name, entry in stored.items()}
    return Record(layout.plan_id, file.name, file.size, digest_field(document, "sha256", path), tensors)


def stored_tensor(entry: object, file: object, name: str) -> StoredTensor:
    """`[dtype, shape, sha256, offset]`, every member checked."""
    if not isinstance(entry, list) or len(entry) != 4:
        raise SourceError("is not [dtype, shape, sha256, offset].", file=file, tensor=name)
    dtype, shape, digest, offset = entry
    if not isinstance(dtype, str) or not 1 <= len(dtype) <= 64 or not dtype.isprintable():
        raise SourceError("has no dtype.", file=file, tensor=name)
    if not isinstance(shape, list) or len(shape) > 8 or not all(is_count(n) for n in shape):
        raise SourceError("has no shape of at most 8 dimensions.", file=file, tensor=name)
    if not isinstance(digest, str) or not HEX.fullmatch(digest) or not is_count(offset):
        raise SourceError("has no sha256 or no offset.", file=file, tensor=name)
    return StoredTensor(dtype, tuple(shape), digest, offset)


def digest_field(document: Mapping[str, object], key: str, file: object) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not HEX.fullmatch(value):
        raise SourceError(f"{key} is not a sha256.", file=file)
    return value


def is_count(value: object) -> bool:
    """An integer from 0 to what a file offset can be; True and 1.0 are none."""
    return type(value) is int and 0 <= value < 1 << 63
