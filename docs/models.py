"""Writes docs/models.md from the architectures' tables: `make docs`. The tests fail when the page is older than the tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from glmconv.archs import SPECS, ArchSpec, Model, Preset, bind
from glmconv.codecs import codec_of
from glmconv.codecs.codec import Grid
from glmconv.dtypes import BY_NAME
from glmconv.errors import CapacityError
from glmconv.formats.selection import QuantOptions, Selection, select
from glmconv.formats.serving import serving

PAGE = Path(__file__).parent / "models.md"
TARGETS = ("fp8", "fp8:channel", "mxfp8", "awq:auto", "int4:auto")
SERVED = ("fp8", "fp8:channel", "awq:auto")
BFLOAT16 = BY_NAME["bfloat16"]
HEAD = """# Models

<!-- written by docs/models.py from the tables in glmconv/archs/: change those and run `make docs` -->

Every released model that glmconv knows as a preset, as it would be converted with no further options. Sizes are those of the tensors; files add
less than 0.1 %. `bf16` is Hugging Face and torch_dist alike. What stays as it is in a quantized target is counted in. `TP` are the tensor-parallel
sizes, up to 16, at which the quantized weights can be split (routed experts too; with expert parallelism more may do): `glmconv plan --serve-tp`
says why others cannot.
`glmconv models show NAME` prints a table with every tensor's shape and its place in Megatron.
"""


@dataclass(frozen=True)
class Families:
    """A model's tensors by what they are: one of each kind of row, and how many there are of it."""

    model: Model
    counts: Mapping[str, int]

    @classmethod
    def of(cls, model: Model) -> Families:
        first: dict[tuple[str, str], str] = {}
        counts: dict[str, int] = {}
        for name, tensor in model.tensors.items():
            one = first.setdefault((tensor.scope.title, tensor.row.name), name)
            counts[one] = counts.get(one, 0) + 1
        return cls(model, counts)

    def plain(self, name: str) -> int:
        tensor = self.model.tensors[name]
        return tensor.elements * (4 if tensor.dtype == "float32" else 2)

    def sizes(self, selection: Selection | None) -> dict[str, int]:
        """Stored bytes of all tensors of a family, by its first."""
        found = {}
        for name, count in self.counts.items():
            size = self.plain(name)
            if selection and name in selection.encoded:
                rows, columns = self.model.tensors[name].shape
                size = sum(part.size for part in selection.codec.parts((rows, columns), BFLOAT16))
            found[name] = count * size
        return found


def selected(families: Families, target: str) -> Selection | None:
    """What a target encodes; None if it has no way to."""
    codec = codec_of(target)
    try:
        return select(families.model, families.counts, codec, QuantOptions())
    except CapacityError:
        return None


def parallel_sizes(families: Families, selection: Selection) -> str:
    def grid_of(name: str) -> Grid | None:
        return selection.codec.grid if name in selection.encoded else None

    answers = serving(families.model, families.sizes(selection), grid_of, 1)
    return ", ".join(str(answer.parallel.tensor) for answer in answers if not answer.problem) or "none"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f}"


def row(preset: Preset, families: Families) -> str:
    tensors = [tensor for tensor in families.model.tensors.values() if not tensor.alias]
    cells = [
        f"`{preset.name}`", preset.hub.rpartition("/")[2], f"{sum(t.elements for t in tensors) / 1e9:,.1f} B", f"{preset.tensors:,}",
        f"{preset.mtp_tensors:,}", gigabytes(sum(families.sizes(None).values())),
    ]  # fmt: skip
    served = []
    for target in TARGETS:
        selection = selected(families, target)
        cells.append(gigabytes(sum(families.sizes(selection).values())) + group_of(selection) if selection else "-")
        if target in SERVED:
            served.append(parallel_sizes(families, selection) if selection else "-")
    return "| " + " | ".join([*cells, *served]) + " |"


def group_of(selection: Selection) -> str:
    """The group that `auto` chose, if the target has groups of 4 bits."""
    group = getattr(selection.codec, "group", None)
    return f" (g{group})" if group else ""


def remarks(spec: ArchSpec, families: Families) -> Iterator[str]:
    yield from spec.remarks
    dialects: dict[str, list[str]] = {}
    for name, key in spec.dialects.items():
        dialects.setdefault(key, []).append(f"`{name}`")
    if not dialects:
        yield f"Not as torch_dist: {spec.undialected}."
    elif len(dialects) > 1:
        yield "Megatron dialects: " + "; ".join(" = ".join(names) for names in dialects.values()) + " ([torch_dist.md](torch_dist.md#dialects))."
    elif spec.undialected:
        names = ", ".join(next(iter(dialects.values())))
        yield f"As torch_dist for {names} only: {spec.undialected}."


def kept(families: Families, preset: Preset) -> Iterator[str]:
    """What block FP8 and 4 bits leave as they are of a preset, and why."""
    for target in ("fp8", "awq:auto"):
        selection = selected(families, target)
        for note in selection.notes if selection else ():
            name, _, reason = note.partition(": ")[2].partition(": ")
            yield f"`{preset.name}`, `{selection.codec.name if selection else target}`: `{name}` and its partners stay bf16: {reason}."


def sections() -> Iterator[str]:
    for spec in SPECS.values():
        yield f"\n## {spec.title}\n\n`model_type` {spec.model_type}\n"
        yield (
            "| preset | release | parameters | tensors | of them MTP | bf16, GB | "
            + " | ".join(f"`{t}`" for t in TARGETS)
            + " | "
            + " | ".join(f"TP of `{t}`" for t in SERVED)
            + " |"
        )
        yield "|---|---|" + "---:|" * (4 + len(TARGETS)) + "---|" * len(SERVED)
        made = [(preset, Families.of(bind(spec, preset.config, aliases=preset.aliases))) for preset in spec.presets]
        yield from (row(preset, families) for preset, families in made)
        said = dict.fromkeys([*remarks(spec, made[0][1]), *(line for preset, families in made for line in kept(families, preset))])
        if said:
            yield "\n" + "\n".join(f"- {line}" for line in said)


def page() -> str:
    return HEAD + "\n".join(sections()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
