"""A pipeline: one source, perhaps downloaded first, and all that is to be made of it. Written as YAML, read strictly.

source: ${BASE_DIR}/GLM-4.5
download: zai-org/GLM-4.5
targets:
  torch_dist: ${BASE_DIR}/GLM-4.5_torch_dist
  fp8:
    path: ${BASE_DIR}/GLM-4.5-FP8
    options: {serve-tp: 8}
verify: [sample, manifest]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glmconv.archs import preset_named
from glmconv.checkpoint import HUB_ID
from glmconv.convert import GGUF_ALONE
from glmconv.errors import SourceError, UsageError, printable
from glmconv.formats.run_config import plain_yaml
from glmconv.targets import GGUF, TargetSpec, parse_target

LARGEST = 1 << 20
NAME = re.compile(r"[A-Za-z0-9][\w.:-]{0,99}")
VARIABLE = re.compile(r"\$\{([^}]*)\}")
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
REVISION = re.compile(r"[\w./-]{1,200}")
VERIFY = ("none", "sample", "full", "manifest")
STEPS = ("download", "verify")  # what a step is called that is no target
TORCH_DIST, PLAIN, QUANTIZED = "torch_dist", "hf", "quantized"
# Options that mean something to one kind of target only: two targets that differ in nothing else are made in one reading.
ONLY: dict[str, str] = {
    **dict.fromkeys(("iteration", "megatron_dialect", "chunk_size"), TORCH_DIST),
    **dict.fromkeys(("keep", "first_layers_bf16", "last_layers_bf16", "ragged", "serve_tp", "serve_ep", "nonfinite"), QUANTIZED),
    **{name: GGUF for name in GGUF_ALONE if name != "mtp_only"},  # which takes from other targets what they should have
}
OptionParser = Callable[[Mapping[str, object]], Mapping[str, object]]


@dataclass(frozen=True)
class Download:
    """What to fetch from the Hub into the pipeline's source folder; `revision` a branch, tag or commit, empty for the default."""

    hub: str
    revision: str = ""


@dataclass(frozen=True)
class PipelineTarget:
    """One output. `options` are fields of `glmconv.Options`; `source` is empty for the pipeline's own, or may be another target's path."""

    name: str
    spec: TargetSpec
    options: Mapping[str, object] = field(default_factory=dict)
    source: str = ""

    @property
    def path(self) -> Path:
        assert self.spec.path is not None
        return self.spec.path

    @property
    def kind(self) -> str:
        return QUANTIZED if self.spec.codec else self.spec.format


@dataclass(frozen=True)
class Pipeline:
    """What is to be done; `verify` are the checks after it, of `VERIFY`."""

    source: str
    targets: tuple[PipelineTarget, ...]
    download: Download | None = None
    verify: tuple[str, ...] = ("sample",)

    def sources_elsewhere(self) -> list[str]:
        """The sources that are Hub ids, not folders here and not made by this pipeline."""
        ours = {str(target.path) for target in self.targets}
        named = dict.fromkeys((self.source, *(target.source for target in self.targets)))
        return [source for source in named if HUB_ID.match(source) and source not in ours and not Path(source).exists()]

    def chosen(self, names: tuple[str, ...]) -> tuple[PipelineTarget, ...]:
        """The targets of these names, all of them if none is named. UsageError for a name that is no step."""
        known = [*(target.name for target in self.targets), *STEPS]
        for name in names:
            if name not in known:
                raise UsageError(f"no step is called {name!r}.", hint=f"Steps: {', '.join(known)}.")
        return tuple(target for target in self.targets if not names or target.name in names)


def load_pipeline(path: Path, variables: Mapping[str, str], options: OptionParser) -> Pipeline:
    """Read a pipeline's file. `variables` fill in `${NAME}`, before the file's own `variables`; `options` turns spelled options into fields.

    UsageError for anything that is not as it should be: no step is guessed at.
    """
    document = mapping(read_yaml(path), "the file", path)
    known(document, {"source", "download", "targets", "options", "verify", "variables"}, path)
    values = {**{str(name): scalar(value, f"variables: {name}", path) for name, value in entries(document, "variables", path)}, **variables}
    filled = mapping(expanded({name: value for name, value in document.items() if name != "variables"}, values, path), "the file", path)
    source = text(filled, "source", path)
    shared = options(dict(entries(filled, "options", path)))
    targets = tuple(target_of(name, entry, shared, options, path) for name, entry in entries(filled, "targets", path))
    if not targets and "download" not in filled:
        raise UsageError("has neither targets nor a download.", file=path)
    paths = [target.path for target in targets]
    twice = next((place for place in paths if paths.count(place) > 1), None)
    if twice is not None:
        raise UsageError(f"two targets are {twice}.", file=path, hint="Give each a path of its own.")
    return Pipeline(source, targets, download_of(filled.get("download"), path), verify_of(filled.get("verify", "sample"), path))


def read_yaml(path: Path) -> object:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}.", file=path) from error
    if len(content) > LARGEST:
        raise UsageError(f"is larger than {LARGEST:,} bytes: no pipeline is.", file=path)
    try:
        return plain_yaml(content.decode("utf-8"), path, unique=True)
    except UnicodeDecodeError as error:
        raise UsageError("is not UTF-8.", file=path) from error
    except SourceError as error:
        raise UsageError(error.line) from error


def expanded(value: object, variables: Mapping[str, str], path: Path) -> object:
    """Every `${NAME}` in the values (not in the keys) filled in; what is filled in is not looked at again. UsageError if it is not set, or empty."""

    def one(found: re.Match[str]) -> str:
        name = found[1]
        if not VARIABLE_NAME.fullmatch(name):
            raise UsageError(f"${{{printable(name)}}} is no variable.", file=path)
        if not variables.get(name):
            state = "is empty" if name in variables else "is not set"
            raise UsageError(f"${{{name}}} {state}.", file=path, hint=f"Set it in the environment, or pass --set {name}=VALUE.")
        return variables[name]

    if isinstance(value, str):
        return VARIABLE.sub(one, value)
    if isinstance(value, dict):
        return {key: expanded(inner, variables, path) for key, inner in value.items()}
    return [expanded(inner, variables, path) for inner in value] if isinstance(value, list) else value


def target_of(name: str, entry: object, shared: Mapping[str, object], options: OptionParser, path: Path) -> PipelineTarget:
    """`NAME: PATH`, or `NAME: {path, to, source, options}`; `to` is the name if it is not given."""
    if not NAME.fullmatch(name) or name in STEPS:
        raise UsageError(f"{printable(name)!r} is no name for a target.", file=path)
    fields = {"path": entry} if isinstance(entry, str) else mapping(entry, f"targets: {name}", path)
    known(fields, {"path", "to", "source", "options"}, path, f"targets: {name}: ")
    spec = parse_target(text(fields, "to", path, name), Path(text(fields, "path", path)))
    if "{" in str(spec.path):
        raise UsageError(f"targets: {name}: {printable(str(spec.path))} has a name to fill in; a pipeline's are written out.", file=path)
    own = options(dict(entries(fields, "options", path)))
    target = PipelineTarget(name, spec, {}, text(fields, "source", path, ""))
    for option in own:
        if not means(option, target.kind):
            raise UsageError(f"targets: {name}: the option {option.replace('_', '-')} means nothing to a target of this kind.", file=path)
    meant = {option: value for option, value in shared.items() if means(option, target.kind)}
    return PipelineTarget(name, spec, {**meant, **own}, target.source)


def means(option: str, kind: str) -> bool:
    """Whether an option changes anything of a target of this kind."""
    return ONLY.get(option, kind) == kind and not (option == "file_size" and kind == GGUF)


def download_of(entry: object, path: Path) -> Download | None:
    """`download: HUB_ID`, or a preset's name, or `download: {hub, revision}`."""
    if entry is None:
        return None
    fields = {"hub": entry} if isinstance(entry, str) else mapping(entry, "download", path)
    known(fields, {"hub", "revision"}, path, "download: ")
    found = Download(hub_id(text(fields, "hub", path)), text(fields, "revision", path, ""))
    if found.revision and not REVISION.fullmatch(found.revision):
        raise UsageError(f"download: {printable(found.revision)!r} is no revision.", file=path)
    return found


def hub_id(name: str) -> str:
    """The Hub id that a name means: itself, or a preset's (documents also write GLM-4.5-355B-A32B for glm4.5-355B-A32B). UsageError if neither."""
    if HUB_ID.match(name):
        return name
    try:
        return preset_named(name)[1].hub
    except UsageError:
        return preset_named(re.sub("^GLM-", "glm", name))[1].hub


def verify_of(entry: object, path: Path) -> tuple[str, ...]:
    steps = [entry] if isinstance(entry, str) else entry
    if not isinstance(steps, list) or not steps or any(step not in VERIFY for step in steps) or ("none" in steps and len(steps) > 1):
        raise UsageError(f"verify is none, or one or several of {', '.join(VERIFY[1:])}.", file=path)
    return tuple(str(step) for step in dict.fromkeys(steps) if step != "none")


def mapping(value: object, what: str, path: Path) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{what} is no mapping of names.", file=path)
    return value


def entries(fields: Mapping[str, object], key: str, path: Path) -> list[tuple[str, object]]:
    """The members of a mapping that may be left out."""
    return list(mapping(fields[key], key, path).items()) if key in fields else []


def known(fields: Mapping[str, object], names: set[str], path: Path, where: str = "") -> None:
    for name in fields:
        if name not in names:
            raise UsageError(f"{where}{printable(name)!r} means nothing here.", file=path, hint=f"Known: {', '.join(sorted(names))}.")


def scalar(value: object, what: str, path: Path) -> str:
    """A text or a number as it is written."""
    if isinstance(value, str) or type(value) is int:
        return str(value)
    raise UsageError(f"{what} is neither a text nor a whole number.", file=path)


def text(fields: Mapping[str, object], key: str, path: Path, default: str | None = None) -> str:
    value = fields.get(key, default)
    if not isinstance(value, str) or (not value and default is None) or not value.isprintable():
        raise UsageError(f"{key} is {'missing' if value is None else 'no text'}.", file=path)
    return value
