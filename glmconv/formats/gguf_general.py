"""The keys that describe a GGUF file to people: `general.name`, its size, licence and origin, and how to sample.

Source: gguf-py's metadata.py and utility.py, which the converter asks. What they guess from a folder's name is guessed alike here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glmconv.archs import Model, Role
from glmconv.errors import SourceError
from glmconv.formats.gguf_types import Array, Entry, Kind, single
from glmconv.formats.run_config import plain_yaml
from glmconv.strict_json import mapping, parse

CARD, GENERATION = "README.md", "generation_config.json"
CARD_LARGEST = 1 << 20
# generation_config.json's field, the key, its kind; in the converter's order
SAMPLING = (
    ("sequence", "sequence", Kind.STRING), ("top_k", "top_k", Kind.I32), ("top_p", "top_p", Kind.F32), ("min_p", "min_p", Kind.F32),
    ("xtc_probability", "xtc_probability", Kind.F32), ("xtc_threshold", "xtc_threshold", Kind.F32), ("temperature", "temp", Kind.F32),
    ("penalty_last_n", "penalty_last_n", Kind.I32), ("penalty_repeat|repetition_penalty", "penalty_repeat", Kind.F32),
    ("mirostat", "mirostat", Kind.I32), ("mirostat_tau", "mirostat_tau", Kind.F32), ("mirostat_eta", "mirostat_eta", Kind.F32),
)  # fmt: skip
# A key under `general`, and the model card's fields for it, the first that is there
FROM_CARD = {
    "name": "name model_name", "author": "author model_author model_creator", "version": "version model_version",
    "organization": "organization model_organization", "finetune": "finetune model_finetune", "basename": "basename model_basename model_type",
    "description": "description model_description", "size_label": "size_label model_size_label", "license": "license",
    "license.name": "license_name", "license.link": "license_link", "source.url": "url model_url", "source.doi": "doi model_doi",
    "source.uuid": "uuid model_uuid", "source.repo_url": "repo_url model_repo_url",
}  # fmt: skip
ORIGINS = {"base_model": "base_model base_models base_model_sources", "dataset": "datasets dataset dataset_sources"}
SCALES = ((1e12, 1e-12, "T"), (1e9, 1e-9, "B"), (1e6, 1e-6, "M"))
LISTS = {"tags": "tags pipeline_tag", "languages": "languages language"}


@dataclass(frozen=True)
class NameParts:
    """What a model's id says: `ORG/BASENAME-VERSION-FINETUNE-SIZE`, in any order."""

    name: str = ""
    organization: str = ""
    basename: str = ""
    finetune: str = ""
    version: str = ""
    size_label: str = ""

    @property
    def title(self) -> str:
        words = self.name.strip().replace("-", " ").split()
        return " ".join(word.title() if word.islower() and not re.match(r"^(v\d+(?:\.\d+)*|\d.*)$", word) else word for word in words)


def general_entries(model: Model, config: Mapping[str, object], files: Mapping[str, bytes], folder: str, *, vision: bool = False) -> list[Entry]:
    """Everything under `general` that describes the language model, or its vision tower, in the converter's order.

    `folder` is the name of the one it came from.
    """
    count, each, shared = _parameters(model, vision)
    experts = model.sizes.get("experts", 0) if each else 0
    card = read_card(files)
    found = {key: value for key, fields in FROM_CARD.items() if (value := _first_text(card, fields.split()))}
    for source in (config.get("_name_or_path"), folder):
        if isinstance(source, str) and source.count("/") <= 1:
            parts = name_parts(source, count)
            guesses = {"name": parts.title, "organization": _title(parts.organization), "basename": parts.basename, "finetune": parts.finetune}
            guesses |= {"version": parts.version, "size_label": parts.size_label}
            found = {key: value for key, value in guesses.items() if value} | found
    found.setdefault("name", folder)
    found.setdefault("size_label", f"{experts}x{rounded(shared + each)}" if experts else rounded(count))
    entries = _sampling(files)
    entries += [Entry(f"general.{key}", Kind.STRING, found[key]) for key in FROM_CARD if key in found]
    for kind, fields in ORIGINS.items():
        entries += _origins(kind, _texts(card, fields.split()[:1]) or _texts(card, fields.split()), count)
    for key, fields in LISTS.items():
        if texts := _texts(card, fields.split()):
            entries.append(Entry(f"general.{key}", Kind.ARRAY, Array(Kind.STRING, texts)))
    return entries


def _parameters(model: Model, vision: bool) -> tuple[int, int, int]:
    """(all, one expert's, all but the experts') elements of what a file holds: the vision tower has one of its own."""
    experts = model.sizes.get("experts", 0)
    each = shared = 0
    for name, tensor in model.tensors.items():
        if (".visual." in name) is not vision or tensor.index["expert"]:
            continue
        if tensor.role is Role.EXPERT:
            each += tensor.elements
        else:
            shared += tensor.elements
    return shared + each * experts, each, shared


def rounded(count: int) -> str:
    """A number of parameters in two digits or more."""
    scale, suffix = next(((scale, suffix) for least, scale, suffix in SCALES if count > least), (1e-3, "K"))
    scaled = count * scale
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{suffix}"


def _title(text: str) -> str:
    return NameParts(text).title


SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)


def name_parts(model_id: str, parameters: int) -> NameParts:
    """The parts of a model's id; a size that is far from `parameters` is no size but a context length."""
    if " " in model_id:
        return NameParts(model_id)
    organization, _, name = model_id.partition("/") if "/" in model_id else ("", "", model_id)
    if organization.startswith("."):
        organization = ""
    parts = [part for part in name.split("-") if part]
    kinds: list[set[str]] = [set() for _ in parts]
    for place, part in enumerate(parts):
        parts[place], plain = _kind_of(part, place, parameters)
        kinds[place] |= {plain} if plain else set()
    if any(c.isdecimal() for part, kind in zip(parts, kinds, strict=True) if "size_label" in kind for c in part):
        for part, kind in zip(parts, kinds, strict=True):
            if part.isalpha():
                kind.discard("size_label")
    _mark_basename(parts, kinds)

    def joined(wanted: str) -> list[str]:
        return [part for part, kind in zip(parts, kinds, strict=True) if wanted in kind]

    size = "-".join(dict.fromkeys(joined("size_label")))
    version = "-".join(part for part, kind in zip(parts, kinds, strict=True) if "version" in kind and "basename" not in kind)
    finetune, basename = "-".join(joined("finetune")), "-".join(joined("basename"))
    return NameParts(name, organization, basename if size or finetune or version else "", finetune, version, size)


def _kind_of(part: str, place: int, parameters: int) -> tuple[str, str]:
    """(a part of a name as it is spelled from here on, what it is); nothing if that is not plain from itself."""
    if re.fullmatch(r"(v|iter)?\d+([.]\d+)*", part, re.IGNORECASE):
        return part, "version"
    if re.fullmatch(r"i?q\d(_\w)*|b?fp?(16|32)", part, re.IGNORECASE):
        return part.upper(), "type"
    if place and SIZE.fullmatch(part):
        part = part.replace("_", ".")
        if part[-1].isdecimal():  # bloom-7b1
            part = part[:-2] + "." + part[-1] + part[-2]
        if len(part) > 1 and part[-2].isdecimal() and part[-1] in "kmbt":
            part = part[:-1] + part[-1].upper()
        try:
            claimed = float(part[:-1]) * float(pow(1000, " KMBT".find(part[-1])))
        except ValueError:
            return part, "size_label"
        if parameters and abs(claimed - parameters) > 7 * parameters // 8:
            return part[:-1] + part[-1].lower(), "finetune"
        return part, "size_label"
    if place and re.fullmatch(r"chat|instruct|vision|lora", part, re.IGNORECASE):
        return part, "finetune"
    return part, ""


def _mark_basename(parts: Sequence[str], kinds: Sequence[set[str]]) -> None:
    """The basename is what stands first, versions inside it included; what is left over is a finetune."""
    at_start = True
    for part, kind in zip(parts, kinds, strict=True):
        if at_start and ((not kind and part[0].isalpha()) or "version" in kind):
            kind.add("basename")
        else:
            at_start = False
            if not kind:
                kind.add("finetune")
    for kind in reversed(kinds):
        if "basename" not in kind or len(kind) == 1:
            break
        kind.remove("basename")


def read_card(files: Mapping[str, bytes]) -> Mapping[str, object]:
    """The front matter of README.md; nothing if there is none, or none that is plain YAML: it only describes."""
    lines = files.get(CARD, b"")[:CARD_LARGEST].decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    text = "\n".join(lines[1 : lines.index("---", 1)]).replace("\t", "  ") + "\n"
    try:
        value = plain_yaml(text.replace("- no\n", '- "no"\n'), CARD)
    except SourceError:
        return {}
    return value if isinstance(value, dict) else {}


def _first_text(card: Mapping[str, object], fields: Sequence[str]) -> str:
    value = next((card[field] for field in fields if card.get(field) is not None), None)
    if isinstance(value, list):
        return ",".join(item for item in value if isinstance(item, str))
    return value if isinstance(value, str) else ""


def _texts(card: Mapping[str, object], fields: Sequence[str]) -> list[str]:
    values = [card.get(field) for field in fields]
    listed = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in listed if isinstance(item, str)]


def _origins(kind: str, ids: Sequence[str], parameters: int) -> list[Entry]:
    """What a model was made from: base models, datasets."""
    if not ids:
        return []
    entries = [Entry(f"general.{kind}.count", Kind.U32, len(ids))]
    for number, model_id in enumerate(ids):
        at = f"general.{kind}.{number}."
        known = re.match(r"https?://huggingface.co/([^/]+/[^/]+)$", model_id)
        web = model_id.startswith(("http://", "https://", "ssh://"))
        parts = name_parts(known[1] if known else model_id, parameters) if known or not web else NameParts()
        url = model_id if web else f"https://huggingface.co/{parts.organization}/{parts.name}" if parts.organization else ""
        texts = {"name": parts.title, "version": parts.version, "organization": _title(parts.organization), "repo_url": url}
        entries += [Entry(at + key, Kind.STRING, text) for key, text in texts.items() if text]
    return entries


def _sampling(files: Mapping[str, bytes]) -> list[Entry]:
    if GENERATION not in files:
        return []
    settings = mapping(parse(files[GENERATION], file=GENERATION), GENERATION, GENERATION)
    entries = []
    for fields, key, kind in SAMPLING:
        field, value = next(((field, settings[field]) for field in fields.split("|") if settings.get(field) is not None), ("", None))
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is Kind.F32 and number:
            entries.append(Entry(f"general.sampling.{key}", kind, single(value, field, GENERATION)))
        elif (kind is Kind.STRING and isinstance(value, str)) or (kind is Kind.I32 and isinstance(value, int) and number and abs(value) < 2**31):
            entries.append(Entry(f"general.sampling.{key}", kind, value))
        else:
            raise SourceError(f"{field} is {str(value)[:60]}, which is no {kind.name}.", file=GENERATION)
    return entries
