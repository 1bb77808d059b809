"""Megatron-Bridge's run_config.yaml: only its `model` mapping's plain values are read; nothing that it names is looked up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from glmconv.engine.inputs import InputFile
from glmconv.errors import SourceError

LARGEST = 4 << 20
DEEPEST = 32
MOST_EVENTS = 200_000


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds plain values only."""


def _plain_scalar(loader: PlainLoader, tag: str, node: yaml.Node) -> object:
    """A tag of somebody's own: its content is not built."""
    return None


PlainLoader.add_multi_constructor("", _plain_scalar)


def read_run_config(file: InputFile, path: Path) -> Mapping[str, object]:
    """The `model` mapping. SourceError if it is too large, too deep, uses aliases (which can expand without bound) or is no mapping."""
    if file.size > LARGEST:
        raise SourceError(f"is {file.size:,} bytes; at most {LARGEST:,} are read.", file=path)
    try:
        text = file.read(0, file.size).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise _no_yaml(problem, path) from None
    value = plain_yaml(text, path)
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict):
        raise SourceError("has no `model` mapping.", file=path, hint="Pass --origin.")
    return {str(name): item for name, item in model.items()}


class UniqueLoader(PlainLoader):
    """The same, and a key that a mapping has twice is an error: YAML's own answer is the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[object] = set()
        for key in keys:
            if isinstance(key, list | dict) or key in seen:
                raise yaml.YAMLError(f"the key {key!r} is there twice, or is no name")
            seen.add(key)
        return super().construct_mapping(node, deep)


def plain_yaml(text: str, path: object, *, unique: bool = False) -> object:
    """One document's plain values. SourceError if it is too deep, uses aliases (which can expand without bound) or is no YAML.

    `unique` refuses keys that are there twice.
    """
    try:
        _bounded(text, path)
        return (UniqueLoader if unique else PlainLoader)(text).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as problem:
        raise _no_yaml(problem, path) from None


def _no_yaml(problem: Exception, path: object) -> SourceError:
    return SourceError(f"is not plain YAML: {str(problem).splitlines()[0] if str(problem) else type(problem).__name__}.", file=path)


def _bounded(text: str, path: object) -> None:
    """Walk the events, which costs no memory, before anything is built."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise SourceError("uses aliases, which are not read.", file=path)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST or count > MOST_EVENTS:
            raise SourceError("is nested too deeply or too large.", file=path)
