"""Builds a toy: a config made small, its tensors through the spec, its files through the same plan and commit protocol as any conversion."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from glmconv.archs import bind, preset_named, text_of
from glmconv.checkpoint import Checkpoint
from glmconv.dtypes import BY_NAME
from glmconv.engine.preflight import Target
from glmconv.engine.run import Outcome, run
from glmconv.errors import UsageError
from glmconv.formats.format import LayoutOptions, Opened
from glmconv.formats.huggingface_layout import plan
from glmconv.toy.small import Shrinking, small_config
from glmconv.toy.tokenizer import side_files
from glmconv.toy.weights import Literal, Tables, toy_rows


@dataclass(frozen=True)
class ToyOptions:
    """How small: `scale` multiplies every width, 1 keeps them all true; `layers`, `experts`, `vocabulary` None keep the preset's, scaled."""

    layers: int | None = 5
    experts: int | None = 16
    scale: Fraction = Fraction(1, 16)
    seed: int = 0
    mtp: bool = True
    file_size: int | None = None
    vocabulary: int | None = None


def toy_checkpoint(preset_name: str, options: ToyOptions) -> Checkpoint:
    """A source of any size that lies nowhere: its rows are made as they are read."""
    spec, preset = preset_named(preset_name)
    config = small_config(spec, preset.config, Shrinking(options.layers, options.experts, options.scale, options.mtp, options.vocabulary))
    aliases = preset.aliases and options.mtp
    model = bind(spec, config, aliases=aliases, file=f"toy {preset.name}")
    tables = Tables(options.seed)
    dtype = BY_NAME["bfloat16"]
    tensors = {name: toy_rows(tensor, dtype, tables, number) for number, (name, tensor) in enumerate(model.tensors.items())}
    opened = Opened(
        format="toy", path=Path(f"toy-{preset.name}"), config=config, config_bytes=(json.dumps(config, indent=2) + "\n").encode(), model=model,
        tensors=tensors, folders=(), fingerprint={"format": "toy", "preset": preset.name, "seed": options.seed, "files": {}},
        side_files={name: Literal(content) for name, content in side_files(text_of(spec, config), config.get("vision_config")).items()},
    )  # fmt: skip
    return Checkpoint(opened)


def build(
    preset: str, path: str | Path, options: ToyOptions | None = None, *, workers: int = 2, overwrite: bool = False,
    started: Callable[[int], None] | None = None, progress: Callable[[int], None] | None = None, stop: threading.Event | None = None,
) -> Outcome:  # fmt: skip
    """Write a toy of `preset` as a Hugging Face folder. UsageError for sizes that make no model."""
    options = options or ToyOptions()
    if not 0 < options.scale <= 1 or (options.layers or 1) < 1 or (options.experts or 2) < 2:
        raise UsageError("a toy has at least 1 layer, 2 experts, and a scale above 0 and at most 1.")
    source = toy_checkpoint(preset, options)
    made = plan(source.opened, LayoutOptions(file_size=options.file_size, apart=preset_named(preset)[1].mtp_file))
    target = Target(made, Path(path).absolute())
    if started:
        started(made.size)
    return run([target], source, workers=workers, overwrite=overwrite, stop=stop, progress=progress)[0]
