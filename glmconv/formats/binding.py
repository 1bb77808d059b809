"""Brings a spec and the tensors that a source really holds together: what is missing, unexpected, or of the wrong shape or dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glmconv.archs import Model, TensorSpec, bind, spec_for
from glmconv.archs.model import field_of
from glmconv.dtypes import BY_NAME, DType
from glmconv.errors import SourceError


@dataclass(frozen=True)
class Expected:
    """What a source should hold: its canonical tensors, those that `--mtp drop` leaves out, what there is to say of sets of layers without any."""

    model: Model
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()


def expected(
    config: Mapping[str, object], there: Callable[[str], bool], *, aliases: bool, mtp: bool, file: object, whole: Model | None = None
) -> Expected:
    """Bind `config`; with `mtp` False the MTP tensors become `dropped`.

    `whole` is the model, if it is bound already. `there` says whether the source has a canonical tensor. Fine-tunes saved without their MTP layers
    keep the number of them in config.json: a set of layers that the spec calls optional and that is wholly absent is none of the model's.
    """
    spec = spec_for(config, file)
    whole = whole or bind(spec, config, aliases=aliases, file=file)
    absent = [name for name in spec.optional if whole.layers[name] and not any(map(there, whole.names_of(name)))]
    left = bind(spec, config, aliases=aliases, mtp=mtp and "mtp" not in absent, without=absent, file=file) if absent or not mtp else whole
    dropped = () if mtp or "mtp" in absent else tuple(name for name in whole.tensors if name not in left.tensors)
    notes = tuple(f"config.json asks for {spec.mtp_field} {len(whole.layers[name])}, and no tensor of them is there: 0 is written"
                  for name in absent if name == "mtp" and mtp)  # fmt: skip
    return Expected(left, dropped, notes)


def has_aliases(config: Mapping[str, object], names: Mapping[str, object], file: object) -> bool:
    """Whether a release carries the copies (aliases) that its spec allows; one is enough, the other is then missing."""
    whole = bind(spec_for(config, file), config, aliases=True, file=file)
    return any(tensor.alias and name in names for name, tensor in whole.tensors.items())


def config_dtype(config: Mapping[str, object]) -> DType | None:
    """The dtype that config.json names (`torch_dtype`, `dtype` since transformers 5), if it is one of a model's."""
    for field in ("dtype", "torch_dtype", "text_config.dtype", "text_config.torch_dtype"):
        name = field_of(config, field)
        if isinstance(name, str) and name.removeprefix("torch.") in ("bfloat16", "float16", "float32"):
            return BY_NAME[name.removeprefix("torch.")]
    return None


def model_dtype(config: Mapping[str, object], found: Mapping[str, DType], model: Model) -> DType:
    """The dtype of the weights: what the largest share of the tensors has, among those whose dtype the table leaves open.

    A config may say another (a bf16 config beside float32 weights is common after training); single strays are then wrong, not the rest.
    """
    counts: dict[DType, int] = {}
    for name, tensor in model.tensors.items():
        if not tensor.dtype and not tensor.row.loose and name in found and found[name].name in ("bfloat16", "float16", "float32"):
            counts[found[name]] = counts.get(found[name], 0) + tensor.elements
    if counts:
        return max(counts, key=lambda dtype: (counts[dtype], dtype.name))
    return config_dtype(config) or BY_NAME["bfloat16"]


def canonical_dtype(tensor: TensorSpec, model_dtype: DType, stored: DType | None = None) -> DType:
    """What the table says; for a row that is loose, what the source has, if that is float32 or the model's."""
    if tensor.row.loose and stored is not None and stored in (BY_NAME["float32"], model_dtype):
        return stored
    return BY_NAME[tensor.dtype] if tensor.dtype else model_dtype


def mismatch(tensor: TensorSpec, shape: tuple[int, ...], dtype: DType, wanted: DType) -> str:
    """What is wrong with a stored tensor, in words; empty if nothing is. A narrower float is right where float32 is asked for: it widens."""
    if shape != tensor.shape:
        return f"is {list(shape)}, the config needs {list(tensor.shape)}"
    if dtype != wanted and not widens(dtype, wanted):
        return f"is {dtype}, {wanted} is needed"
    return ""


def widens(stored: DType, wanted: DType) -> bool:
    return stored.name in ("bfloat16", "float16") and wanted.name == "float32"


def refuse(file: object, missing: tuple[str, ...], unexpected: tuple[str, ...], wrong: tuple[tuple[str, str], ...], model: Model) -> None:
    """SourceError for the first tensor that is missing, unknown or wrong, with the number of the others. Nothing is lost silently."""
    if wrong:
        name, what = wrong[0]
        raise SourceError(f"{what}{_more(wrong)}.", file=file, tensor=name, hint="Is this config.json from another model?")
    if missing and unexpected:
        raise SourceError(
            f"is missing{_more(missing)}, and {unexpected[0]} is unknown to {model.spec.model_type}{_more(unexpected)}.",
            file=file, tensor=missing[0], hint="Does config.json belong to these weights? `glmconv inspect` lists all.",
        )  # fmt: skip
    if missing:
        only_mtp = all(name in model.tensors and model.tensors[name].mtp for name in missing)
        hint = (
            "The MTP layer is not there; to go on without it pass --mtp drop."
            if only_mtp
            else "Is the download complete? `glmconv inspect` lists all."
        )
        raise SourceError(f"is missing{_more(missing)}.", file=file, tensor=missing[0], hint=hint)
    if unexpected:
        raise SourceError(
            f"is unknown to {model.spec.model_type}{_more(unexpected)}; converting would lose it.",
            file=file, tensor=unexpected[0], hint="Does config.json belong to these weights? `glmconv inspect` lists all.",
        )  # fmt: skip


def _more(names: tuple[object, ...]) -> str:
    return f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
