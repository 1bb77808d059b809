"""What is to be written: `--to torch_dist`, `--to fp8:ue8m0=DIR`. Parsed here, looked up in the registries of formats and codecs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glmconv.codecs import CODECS, codec_of
from glmconv.codecs.codec import Codec
from glmconv.engine.journal import folder_of_file
from glmconv.errors import UsageError, printable
from glmconv.formats import FORMATS
from glmconv.formats.gguf_mix import mix_named
from glmconv.formats.gguf_mmproj import mmproj_named

SPELLINGS = {"huggingface": "hf", "safetensors": "hf", "megatron": "torch_dist", "torch-dist": "torch_dist"}
GGUF = "gguf"  # the format whose outputs are files
PLAIN = "hf"
QUANTIZED = "hf"  # the format that quantized targets are written in
FIELD = re.compile(r"\{([^{}]*)\}")  # of a GGUF file's name: filled in from the source, the type at once
FIELDS = ("preset", "arch", "type")
NOT_IN_A_NAME = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class TargetSpec:
    """What to write, and the folder for it; `path` None while only planning. `to` names a format, or a codec with its options."""

    to: str
    path: Path | None

    @property
    def codec(self) -> Codec | None:
        """The codec, if `to` names one. UsageError for an option that it has not."""
        return codec_of(self.to) if self.to.partition(":")[0] in CODECS else None

    @property
    def format(self) -> str:
        return QUANTIZED if self.codec else self.to.partition(":")[0]

    @property
    def readable(self) -> bool:
        """Whether an output can be opened as a source: a tower alone is none."""
        return FORMATS[self.format].readable and not mmproj_named(self.file_type)

    @property
    def file_type(self) -> str:
        """The mix of a GGUF target, or mmproj."""
        return self.to.partition(":")[2] if self.format == GGUF else ""

    def named(self, values: Mapping[str, str]) -> TargetSpec:
        """With a GGUF file's name filled in; what is filled in can lead to no other folder."""
        if self.path is None or self.format != GGUF:
            return self
        return replace(self, path=self.path.with_name(FIELD.sub(lambda field: _plain(values, field), self.path.name)))

    @property
    def root(self) -> Path | None:
        """The folder of the output: that it is, or the one beside a file."""
        return folder_of_file(self.path) if self.path and self.format == GGUF else self.path


def _plain(values: Mapping[str, str], field: re.Match[str]) -> str:
    return NOT_IN_A_NAME.sub("-", values[field[1]]) if field[1] in values else field[0]


def known() -> str:
    """The targets, for people."""
    return ", ".join((*(name for name, form in FORMATS.items() if form.writable), *CODECS))


def parse_target(to: str, path: Path | None) -> TargetSpec:
    """UsageError if no target is spelled so."""
    target = TargetSpec(SPELLINGS.get(to.lower(), to.lower()), path)
    if target.format not in FORMATS or not FORMATS[target.format].writable or (":" in target.to and not target.codec and target.format != GGUF):
        raise UsageError(f"--to {to}: no target is called so.", hint=f"Targets: {known()}.")
    if target.format == GGUF:
        file_type = mmproj_named(target.file_type) or mix_named(target.file_type).name
        if path is not None and (path.suffix.lower() != ".gguf" or path.stem in ("", ".gguf")):
            raise UsageError(f"--to {to}: {path} is no name of a GGUF file.", hint=f"Write --to {to}=NAME.gguf.")
        unknown = [name for name in FIELD.findall(path.name) if name not in FIELDS] if path else []
        if unknown:
            fields = ", ".join(f"{{{name}}}" for name in FIELDS)
            raise UsageError(f"--to {to}: {{{printable(unknown[0])}}} means nothing in a file's name.", hint=f"What is filled in: {fields}.")
        return TargetSpec(f"{GGUF}:{file_type}", path).named({"type": file_type})
    return target


def parse_targets(texts: Sequence[str], destination: Path | None, *, need_path: bool = True) -> list[TargetSpec]:
    """`TARGET` or `TARGET=DIR`, one or several; a single one may take the destination from its own argument. UsageError if they do not add up."""
    if not texts:
        raise UsageError("no target is given.", hint=f"Add --to TARGET; targets: {known()}.")
    found = []
    for text in texts:
        to, _, folder = text.partition("=")
        target = parse_target(to, Path(folder) if folder else destination)
        if folder and destination is not None:
            raise UsageError("give DST or --to TARGET=DIR, not both.")
        if target.path is None and need_path:
            raise UsageError(f"--to {to}: no folder to write to.", hint=f"Add DST after SRC, or write --to {to}=DIR.")
        found.append(target)
    if need_path and len({target.path for target in found}) < len(found):
        raise UsageError("two targets have the same folder.", hint="Write --to TARGET=DIR for each.")
    return found
