"""The vision tower of a GGUF model, from the mmproj file that is given with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from glmconv.archs import Model, field_of
from glmconv.dtypes import DType
from glmconv.errors import SourceError
from glmconv.formats.format import RowReader
from glmconv.formats.gguf_config import FoundConfig, agrees
from glmconv.formats.gguf_files import GgufFiles, open_files
from glmconv.formats.gguf_header import ALIGNMENT, GgufHeader
from glmconv.formats.gguf_mmproj_source import model_type_of, vision_config, vision_readers
from glmconv.formats.gguf_stored import GgufRows, Stretch, trimmed
from glmconv.formats.side_files import as_json

VISION = "vision_config"


@dataclass(frozen=True)
class Tower:
    """An mmproj file, opened."""

    files: GgufFiles

    @cached_property
    def header(self) -> GgufHeader:
        tensors = {name: replace(stored.tensor, ne=trimmed(stored.tensor.ne)) for name, stored in self.files.tensors.items()}
        return GgufHeader(self.files.kv, tensors, ALIGNMENT, 0)

    def told(self, found: FoundConfig) -> FoundConfig:
        """The config with what the tower's file says of it. SourceError if they contradict each other, or are of two models."""
        path = self.files.path
        model_type = model_type_of(self.header, path)
        if found.config.get("model_type") != model_type:
            raise SourceError(f"is a tower of {model_type}, the language model is of {found.config.get('model_type')}.", file=path)
        said = vision_config(self.header, path)
        known = found.config.get(VISION)
        inner: Mapping[str, object] = known if isinstance(known, Mapping) else {}
        if found.preset is not None:
            config = {**found.config, VISION: {**inner, **said}}
            return replace(found, config=config, data=as_json(config))
        for field, value in said.items():
            there = field_of(inner, field)
            if there is not None and not agrees(there, value):
                raise SourceError(f"says that {VISION}.{field} is {value}, the embedded config.json {str(there)[:60]}.", file=path)
        return found

    def readers(self, model: Model, dtype: DType, after: int) -> Mapping[str, RowReader]:
        """Every tensor of the tower. `after`: the number of files before this one. SourceError for what is missing, wrong or unknown."""

        def rows(name: str, shape: tuple[int, ...]) -> RowReader:
            stored = replace(self.files.tensors[name], number=after)
            return GgufRows(name, shape, dtype, (Stretch(0, shape[0], stored, 0),))

        return vision_readers(model, self.header, rows, self.files.path)


def open_tower(path: Path | None) -> Tower | None:
    return Tower(open_files(path)) if path is not None else None
