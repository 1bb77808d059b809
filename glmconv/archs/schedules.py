"""Sets of layers: those that a config lists by their kind, or that follow from its numbers as transformers derives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from glmconv.archs.spec import Fields, Layers, Sizes


def decoder(s: Sizes, fields: Fields) -> Sequence[int]:
    return range(s["layers"])


def mtp(s: Sizes, fields: Fields) -> Sequence[int]:
    """MTP layers are numbered behind the decoder's."""
    return range(s["layers"], s["layers"] + s["mtp"])


def leading(s: Sizes, fields: Fields) -> Sequence[int]:
    """The dense layers before the first with experts."""
    return range(min(s["first_dense"], s["layers"]))


def others(of: Layers) -> Layers:
    """The decoder's layers that are not in a set."""

    def chosen(s: Sizes, fields: Fields) -> Sequence[int]:
        there = set(of(s, fields))
        return [layer for layer in range(s["layers"]) if layer not in there]

    return chosen


def both(first: Layers, second: Layers) -> Layers:
    """The layers that are in two sets."""

    def chosen(s: Sizes, fields: Fields) -> Sequence[int]:
        there = set(second(s, fields))
        return [layer for layer in first(s, fields) if layer in there]

    return chosen


def listed(field: str, kinds: Mapping[str, bool], otherwise: Layers) -> Layers:
    """The layers whose entry in the config's list `field` is of a kind that `kinds` says True of; `otherwise` if the config has no such list.

    ValueError for a list of another length than the decoder's, or with a kind that is not in `kinds`.
    """

    def chosen(s: Sizes, fields: Fields) -> Sequence[int]:
        value = fields(field)
        if value is None:
            return otherwise(s, fields)
        if not isinstance(value, list) or len(value) != s["layers"]:
            raise ValueError(f"{field} does not list one kind for each of the {s['layers']} layers")
        for kind in value:
            if not isinstance(kind, str) or kind not in kinds:
                raise ValueError(f"{field} has {str(kind)[:40]!r}; known are {', '.join(kinds)}")
        return [layer for layer, kind in enumerate(value) if kinds[kind]]

    return chosen


def indexed(text: str = "") -> Layers:
    """The layers that run an indexer of their own; the others share the last one's choice (GLM-5.2).

    `indexer_types` lists them, else `index_topk_pattern` ("FSSF..."), else every `index_topk_freq`-th from `index_skip_topk_offset` on.
    Source: transformers' GlmMoeDsaConfig.
    """

    kinds = {"full": True, "shared": False}

    def by_number(s: Sizes, fields: Fields) -> Sequence[int]:
        every, offset = max(s["index_every"], 1), s["index_offset"]
        return [layer for layer in range(s["layers"]) if max(layer - offset + 1, 0) % every == 0]

    def by_pattern(s: Sizes, fields: Fields) -> Sequence[int]:
        name = f"{text}index_topk_pattern"
        pattern = fields(name)
        if not isinstance(pattern, str):
            return listed(name, kinds, by_number)(s, fields)
        if len(pattern) != s["layers"] or set(pattern) - set("FS"):
            raise ValueError(f"{name} is no row of {s['layers']} letters F and S")
        return [layer for layer, kind in enumerate(pattern) if kind == "F"]

    return listed(f"{text}indexer_types", kinds, by_pattern)
