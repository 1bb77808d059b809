"""Megatron dialects: which project's names and row orders a torch_dist checkpoint is written in, and which one it was read as."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from glmconv.archs import ArchSpec
from glmconv.errors import SourceError, UnsupportedError

AUTO = "auto"
DIALECTS = (AUTO, "slime", "miles", "bridge", "mcore")


def written(spec: ArchSpec, asked: str, config: Mapping[str, object], file: object) -> str:
    """The key of the rows' cells to write. UnsupportedError if no trainer, or not the one that is asked for, has this architecture."""
    if not spec.dialects:
        raise UnsupportedError(f"{spec.model_type} cannot be written as torch_dist: {spec.undialected}.", file=file)
    if asked == AUTO:
        return next(iter(spec.dialects.values()))
    if asked not in spec.dialects:
        raise UnsupportedError(
            f"{spec.model_type} has no Megatron dialect {asked}: {spec.undialected}.", file=file, hint=f"Dialects: {', '.join(spec.dialects)}."
        )
    if asked == "miles" and len(set(spec.dialects.values())) > 1 and config.get("indexer_rope_interleave") is False:
        raise UnsupportedError(
            "says indexer_rope_interleave false; how miles then orders an indexer's rows is not known.", file=file, hint="Write slime's or mcore's."
        )
    return spec.dialects[asked]


def known_as(spec: ArchSpec, dialect: str) -> str:
    """The first name that users have for a key of the rows' cells."""
    return next(name for name, key in spec.dialects.items() if key == dialect)


def read_as(spec: ArchSpec, asked: str, found: Callable[[str], int], file: object) -> str:
    """The dialect that a checkpoint is in: the one of whose tensors it holds the most (`found` counts them), or the one that is asked for.

    SourceError where two would fit as well: their rows may be in another order, so guessing would corrupt the weights.
    """
    if not spec.dialects:
        raise UnsupportedError(f"is of {spec.model_type}, of which there is no torch_dist form: {spec.undialected}.", file=file)
    if asked != AUTO:
        if asked not in spec.dialects:
            raise UnsupportedError(f"{spec.model_type} has no Megatron dialect {asked}: {spec.undialected}.", file=file)
        return spec.dialects[asked]
    counts = {dialect: found(dialect) for dialect in dict.fromkeys(spec.dialects.values())}
    best = max(counts.values())
    fit = [dialect for dialect, count in counts.items() if count == best]
    if len(fit) > 1 and best:
        names = [name for name, dialect in spec.dialects.items() if dialect in fit]
        raise SourceError(
            f"could be of several Megatron dialects ({', '.join(names)}), which order rows differently.", file=file,
            hint="Say which with --source-dialect.",
        )  # fmt: skip
    return fit[0]
