"""A pipeline's options are spelled, checked and refused as those of `glmconv convert` are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmconv.cli.options import RUN_OPTIONS
from glmconv.errors import UsageError

if TYPE_CHECKING:
    from glmconv.fleet.pipeline import Pipeline

OF_A_RUN = ("to", "workers", "max_memory", "resume", "resume_check", "overwrite", "not_strict")  # change no byte, or are about one source only
SETTING = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,99})=(.*)", re.DOTALL)


def load_pipeline(path: str | Path, settings: Mapping[str, str] | None = None) -> Pipeline:
    """Read a pipeline's file; `${NAME}` is filled in from `settings`, else from the environment, else from the file. UsageError if it is wrong."""
    from glmconv.fleet.pipeline import load_pipeline as load

    return load(Path(path), {**os.environ, **(settings or {})}, parse_options)


def parse_options(spelled: Mapping[str, object]) -> dict[str, object]:
    """`{"shard-size": "5GB", "mtp": "drop"}` as fields of `glmconv.Options`. UsageError for a name or value that the command line would refuse."""
    from glmconv.cli.convert import command
    from glmconv.convert import options_of

    known = {name.removeprefix("--"): param for param in command.params if isinstance(param, click.Option) for name in param.opts}
    known = {name: param for name, param in known.items() if param.name in RUN_OPTIONS and param.name not in OF_A_RUN}
    chosen: dict[str, object] = {}
    for name, value in spelled.items():
        if name not in known:
            raise UsageError(f"{name!r} is no option of a target.", hint=f"Options: {', '.join(sorted(known))}.")
        chosen[str(known[name].name)] = value_of(known[name], name, value)
    options = options_of(chosen)
    fields = {name for name in (*chosen, *(["mtp_only"] if "mtp" in chosen else [])) if hasattr(options, name)}
    return {name: getattr(options, name) for name in fields}


def value_of(param: click.Option, name: str, value: object) -> object:
    """A value as click would make it of the command line's word."""
    try:
        if param.is_flag:
            if not isinstance(value, bool):
                raise click.BadParameter("true or false is needed.")
            return value
        words = value if isinstance(value, list) else [value]
        if not all(isinstance(word, str) or type(word) is int for word in words) or (isinstance(value, list) and not param.multiple):
            raise click.BadParameter(f"{value!r} is no {'list of texts' if param.multiple else 'text or number'}.")
        made = [param.type.convert(word if isinstance(word, int) else str(word), param, None) for word in words]
        return tuple(made) if param.multiple else made[0]
    except click.BadParameter as problem:
        raise UsageError(f"the option {name}: {problem.message}") from problem


def settings_of(texts: tuple[str, ...]) -> dict[str, str]:
    """`--set NAME=VALUE`, the last of a name counting."""
    found: dict[str, str] = {}
    for text in texts:
        match = SETTING.fullmatch(text)
        if match is None:
            raise UsageError(f"--set {text!r} is not NAME=VALUE.")
        found[match[1]] = match[2]
    return found
