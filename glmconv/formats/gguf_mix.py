"""Which type each tensor of a GGUF file gets: llama-quantize's mixes as a table.

Source: llama.cpp's `llama-quant.cpp`, and 420 dry runs of llama-quantize over the shapes of six models (tests/vectors/mixes), all reproduced.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache

from glmconv.codecs.ggml import TYPES
from glmconv.errors import UsageError, printable

BLOCKS = {name: (kind.block, kind.size) for name, kind in TYPES.items()}  # type -> elements of a block, its bytes
FALLBACK = {  # where a row is no whole number of blocks; where that does not divide it either: F16
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    **{name: "F16" for name, (elements, _) in BLOCKS.items() if elements == 32},
}  # fmt: skip
# Types that the encoders do not make without importance data -> the next larger k-quant that needs none. Q2_K only inside a Q2_K_S file.
UNAIDED = {**dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "Q2_K"), "IQ3_XXS": "Q3_K", "Q2_K": "Q3_K"}


class Kind(Enum):
    """What the rules tell apart; a tensor is of the first kind whose text is in its name."""

    OUT = "output.weight"
    EMB = "token_embd.weight"
    V = "attn_v.weight"
    K = "attn_k.weight"  # an indexer's too
    Q = "attn_q.weight"
    O = "attn_output.weight"  # noqa: E741
    UP = "ffn_up"
    GATE = "ffn_gate"
    DOWN = "ffn_down"
    OTHER = ""  # latent attention, the rest of the indexer, the MTP head


@dataclass(frozen=True)
class Facts:
    """What a file's metadata says of the model. `layers` counts the MTP layers, of which there are `nextn`."""

    arch: str
    layers: int
    nextn: int = 0
    experts: int = 0
    heads: int = 1
    kv_heads: int = 1  # 1 for latent attention; the first layer's, where each layer has its own

    @property
    def shared(self) -> int:
        """How many query heads share a key's."""
        return self.heads // self.kv_heads if self.kv_heads else 0


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: the i-th of n layers, and how many of its kind the mix chose before it.

    i is the number of its layer, in a model without experts `count`. For V, i is `count` and n the number of all V tensors.
    """

    i: int
    n: int
    count: int
    facts: Facts
    imatrix: bool


When = Callable[[Place], bool]
Cell = Mapping[When, str]  # the first condition that holds gives the type; none: the base type
NOTHING: Cell = {}


def always(at: Place) -> bool:
    return True


def first(number: int) -> When:
    return lambda at: at.i < number


def eighth(at: Place) -> bool:
    return at.i < at.n // 8


def sixteenth(at: Place) -> bool:
    return at.i < at.n // 16


def eighth_counted(at: Place) -> bool:
    """An eighth of the layers, though a layer with experts has two such tensors."""
    return at.count < at.n // 8


def more(at: Place) -> bool:
    """The first eighth, the last, and every third between."""
    return at.i < at.n // 8 or at.i >= 7 * at.n // 8 or (at.i - at.n // 8) % 3 == 2


def middle(at: Place) -> bool:
    return at.n // 8 <= at.i < 7 * at.n // 8


def shared(at: Place) -> bool:
    """At least four query heads to a key's: V is small."""
    return at.facts.shared >= 4


def small(at: Place) -> bool:
    return shared(at) or at.facts.experts >= 4


def plain(at: Place) -> bool:
    return not at.imatrix


def plain_eighth(at: Place) -> bool:
    return plain(at) and eighth(at)


def aided_eighth(at: Place) -> bool:
    return at.imatrix and eighth(at)


def more_of_eight(at: Place) -> bool:
    return at.facts.experts == 8 and more(at)


@dataclass(frozen=True)
class Mix:
    """One file type: the type that tensors have unless their kind has another. `id` is the file's `general.file_type`.

    `flat`: what all tensors but stacks of matrices have.
    """

    name: str
    id: int
    base: str
    out: str = "Q6_K"
    emb: str = ""
    v: Cell = field(default_factory=dict)
    down: Cell = field(default_factory=dict)
    o: str = ""
    qk: str = ""
    up: Cell = field(default_factory=dict)  # gate as well
    flat: str = ""

    @property
    def quantized(self) -> bool:
        return BLOCKS[self.base][0] > 1


V4: Cell = {shared: "Q4_K"}
V5: Cell = {shared: "Q5_K"}
# fmt: off
TABLE = (
    #   file type    id  base       output  embedding  attn_v                              ffn_down                                 attn_output
    Mix("F32",       0,  "F32",     "F32"),
    Mix("F16",       1,  "F16",     "F16"),
    Mix("BF16",      32, "BF16",    "BF16"),
    Mix("Q8_0",      7,  "Q8_0",    "Q8_0"),
    Mix("Q6_K",      18, "Q6_K",    "Q6_K"),
    Mix("Q5_K_M",    17, "Q5_K",    "Q6_K", "",        {more: "Q6_K"},                     {more: "Q6_K"}),
    Mix("Q5_K_S",    16, "Q5_K",    "Q6_K"),
    Mix("Q5_0",      8,  "Q5_0",    "Q6_K", "",        NOTHING,                            {aided_eighth: "Q5_1"}),
    Mix("Q5_1",      9,  "Q5_1",    "Q6_K"),
    Mix("Q4_K_M",    15, "Q4_K",    "Q6_K", "",        {more: "Q6_K"},                     {more: "Q6_K"}),
    Mix("Q4_K_S",    14, "Q4_K",    "Q6_K", "",        {first(4): "Q5_K"},                 {eighth: "Q5_K"}),
    Mix("Q4_0",      2,  "Q4_0",    "Q6_K", "",        NOTHING,                            {aided_eighth: "Q4_1"}),
    Mix("Q4_1",      3,  "Q4_1",    "Q6_K"),
    Mix("Q3_K_L",    13, "Q3_K",    "Q6_K", "",        {always: "Q5_K"},                   {always: "Q5_K"},                        "Q5_K"),
    Mix("Q3_K_M",    12, "Q3_K",    "Q6_K", "",        {first(2): "Q5_K", always: "Q4_K"}, {sixteenth: "Q5_K", always: "Q4_K"},     "Q4_K"),
    Mix("Q3_K_S",    11, "Q3_K",    "Q6_K"),
    Mix("Q2_K",      10, "Q2_K",    "Q6_K", "",        {shared: "Q4_K", always: "Q3_K"},   {always: "Q3_K"},                        "Q3_K"),
    Mix("Q2_K_S",    21, "Q2_K",    "Q6_K", "",        V4,                                 {eighth: "Q4_K"}),
    Mix("IQ4_XS",    30, "IQ4_XS",  "Q6_K", "",        V5,                                 {plain_eighth: "Q5_K"}),
    Mix("IQ4_NL",    25, "IQ4_NL",  "Q6_K", "",        V5,                                 {plain_eighth: "Q5_K"}),
    Mix("IQ3_M",     27, "IQ3_S",   "Q6_K", "",        {always: "Q4_K"},                   {eighth: "Q4_K", more_of_eight: "Q4_K"}, "Q4_K"),
    Mix("IQ3_S",     26, "IQ3_S",   "Q6_K", "",        V4),
    Mix("IQ3_XS",    22, "IQ3_S",   "Q6_K", "",        V4,                                 qk="IQ3_XXS", up={middle: "IQ3_XXS"}),
    Mix("IQ3_XXS",   23, "IQ3_XXS", "Q5_K", "IQ3_S",   {shared: "Q4_K", plain: "IQ3_S"},   {plain_eighth: "Q4_K", plain: "Q3_K"},   "IQ3_S", "IQ2_S"),
    Mix("IQ2_M",     29, "IQ2_S",   "Q5_K", "IQ3_S",   {small: "Q4_K", always: "IQ3_S"},   {eighth_counted: "IQ3_S"},               "IQ3_S"),
    Mix("IQ2_S",     28, "IQ2_XS",  "Q5_K", "IQ3_S",   {small: "Q4_K", always: "IQ3_S"},   {eighth_counted: "IQ3_S"},               "IQ3_S"),
    Mix("IQ2_XS",    20, "IQ2_XS",  "Q5_K", "Q2_K",    {small: "Q4_K", always: "Q2_K"},    {eighth_counted: "Q2_K"}),
    Mix("IQ2_XXS",   19, "IQ2_XXS", "Q5_K", "Q2_K",    {small: "Q4_K", always: "Q2_K"},    {eighth_counted: "Q2_K"}),
    Mix("IQ1_M",     31, "IQ1_M",   "Q5_K", "Q2_K",    {small: "Q4_K", always: "Q2_K"},    {eighth_counted: "Q2_K"},                "IQ2_XXS"),
    Mix("IQ1_S",     24, "IQ1_S",   "Q5_K", "Q2_K",    {small: "Q4_K", always: "Q2_K"},    {eighth_counted: "Q2_K"},                "IQ2_XXS"),
    Mix("TQ1_0",     36, "TQ1_0",   "Q6_K", "Q4_K"),
    Mix("TQ2_0",     37, "TQ2_0",   "Q6_K", "Q4_K"),
    Mix("Q1_0",      40, "Q1_0",    "Q6_K"),
    Mix("Q2_0",      41, "Q2_0",    "Q6_K", "Q4_K"),
    Mix("MXFP4_MOE", 38, "MXFP4",   "Q8_0", flat="Q8_0"),
)
# fmt: on
MIXES = {mix.name: mix for mix in TABLE}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
EIGHT_O = {"Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"}
INSIDE = [kind for kind in Kind if kind not in (Kind.OUT, Kind.EMB)]
KEPT = ("_norm.weight", "ffn_gate_inp.weight")
# Of GLM-5.3-Flash: what selects or decays, where errors add up, stays as it is, and three projections are never below 8 bits
KEPT_NEXT = (
    "hc_", "indexer.", "indexer_compressor_", "ssm_conv1d", "ssm_f_a", "ssm_f_b", "ssm_g_a", "ssm_g_b", "ssm_beta",
    "attn_kv_a_mqa", "attn_k_b", "attn_v_b",
)  # fmt: skip
EIGHT_BITS_NEXT = ("attn_q_a.weight", "attn_q_b.weight", "nextn.eh_proj.weight")
NEXT = "glm5-next"
BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the float file: `ne` is its shape with the columns first, `type` what it is stored in."""

    name: str
    ne: tuple[int, ...]
    type: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The type of one tensor, and why: "kept", "base", "rule", "override", "fallback from Q4_K", "no importance data for IQ2_XS".

    `needs_imatrix`: encoding fails unless the importance matrix has an entry for this tensor.
    """

    type: str
    why: str
    needs_imatrix: bool = False


def mix_named(name: str) -> Mix:
    """The mix of a file type, in any case; UsageError lists all."""
    upper = name.upper()
    upper = ALIASES.get(upper, upper)
    if upper not in MIXES:
        raise UsageError(f"no GGUF file type is called {name!r}.", hint=f"File types: {', '.join([*MIXES, *ALIASES])}.")
    return MIXES[upper]


def type_named(name: str) -> str:
    """A tensor type, in any case; UsageError lists all."""
    if name.upper() not in BLOCKS:
        raise UsageError(f"no GGUF tensor type is called {name!r}.", hint=f"Types: {', '.join(BLOCKS)}.")
    return name.upper()


def type_bytes(kind: str, ne: Sequence[int]) -> int:
    """Bytes of a tensor's data, padding left out. Its row is a whole number of blocks."""
    elements, size = BLOCKS[kind]
    return math.prod(ne) // elements * size


@lru_cache(1 << 14)
def kind_of(name: str) -> Kind:
    """The first two are whole names: a layer's `attn_output.weight` is no output."""
    whole = next((kind for kind in (Kind.OUT, Kind.EMB) if name == kind.value), None)
    return whole or next(kind for kind in INSIDE if kind.value in name)


def kept(tensor: Tensor, arch: str) -> bool:
    """Whether llama-quantize leaves the tensor as it is, whatever the file type."""
    dimensions = max((n + 1 for n, size in enumerate(tensor.ne) if size != 1), default=1)
    if dimensions < 2 or not tensor.name.endswith("weight") or any(part in tensor.name for part in KEPT):
        return True
    return arch == NEXT and any(part in tensor.name for part in KEPT_NEXT)


def choose(
    file_type: str,
    tensors: Sequence[Tensor],
    facts: Facts,
    *,
    imatrix: bool = False,
    entries: Collection[str] = (),
    overrides: Sequence[tuple[str, str]] = (),
    token_embedding_type: str = "",
    output_tensor_type: str = "",
    pure: bool = False,
) -> list[Choice]:
    """What llama-quantize makes of each tensor; `tensors` are all of the file's, in its order.

    imatrix:   whether an importance matrix is given; some rules ask for that alone
    entries:   the tensors for which it has values
    overrides: (regex, type); the first that is found in a name decides, and the mix does not count that tensor
    pure:      every tensor has the file type's base type
    One thing differs from llama-quantize, which fails: a tensor of an MTP layer, of which nobody measures the inputs, gets the next larger k-quant
    where its type needs importance data and `entries` has none. UsageError for an unknown file type, type or regex.
    """
    mix = mix_named(file_type)
    given = _Given(
        [(_regex(pattern), type_named(name)) for pattern, name in overrides],
        type_named(token_embedding_type) if token_embedding_type else "",
        type_named(output_tensor_type) if output_tensor_type else "",
        tied=all(kind_of(tensor.name) is not Kind.OUT for tensor in tensors),
    )
    if overrides and not mix.quantized:
        raise UsageError(f"types of single tensors mean nothing for {mix.name}, which stores all in one.")
    values = sum(kind_of(tensor.name) is Kind.V for tensor in tensors)
    counts: Counter[Kind] = Counter()
    choices = []
    for tensor in tensors:
        if kept(tensor, facts.arch):
            choices.append(Choice(tensor.type, "kept"))
            continue
        name, why = given.type_of(tensor), "override"
        if not name:
            name, why = (mix.base, "base") if pure or not mix.quantized else _mixed(mix, tensor, given.tied, counts, values, facts, imatrix)
        choices.append(_possible(mix, tensor, Choice(name, why), facts, entries))
    return choices


@dataclass(frozen=True)
class _Given:
    """What the user said of single tensors."""

    patterns: Sequence[tuple[re.Pattern[str], str]]
    embedding: str
    output: str
    tied: bool  # no output.weight: the embedding is the output too

    def type_of(self, tensor: Tensor) -> str:
        """The type asked for; empty if none is."""
        kind = kind_of(tensor.name)
        if kind in (Kind.EMB, Kind.OUT) and (own := self.embedding if kind is Kind.EMB else self.output):
            return own
        found = next((name for pattern, name in self.patterns if pattern.search(tensor.name)), "")
        return found or (self.output if self.tied and kind is Kind.EMB else "")


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.lower())
    except re.error as error:
        raise UsageError(f"{printable(pattern)!r} is no regular expression: {error}.") from None


def _mixed(mix: Mix, tensor: Tensor, tied: bool, counts: Counter[Kind], values: int, facts: Facts, imatrix: bool) -> tuple[str, str]:
    """The mix's own choice; advances `counts`."""
    kind = kind_of(tensor.name)
    found = BLOCK.match(tensor.name)
    layer = int(found[1]) if found and facts.experts > 1 else counts[kind]
    i, n = (counts[kind], values) if kind is Kind.V else (layer, facts.layers)
    name = _rule(mix, kind, tensor, tied, Place(i, n, counts[kind], facts, imatrix))
    counts[kind] += 1
    return (name, "rule") if name else (mix.base, "base")


def _rule(mix: Mix, kind: Kind, tensor: Tensor, tied: bool, at: Place) -> str:
    """What the table has for the tensor; empty for the base type."""
    if at.facts.arch == NEXT and tensor.name.endswith(EIGHT_BITS_NEXT):
        return "Q8_0"
    if kind is Kind.OUT or (tied and kind is Kind.EMB):
        return mix.out if tensor.ne[0] % BLOCKS[mix.base][0] == 0 else "Q8_0"
    if mix.flat:
        return "" if len(tensor.ne) > 2 and tensor.ne[2] > 1 else mix.flat
    eight = _of_eight(mix, kind) if at.facts.experts == 8 else None
    if eight is not None:
        return eight
    same = {Kind.EMB: mix.emb, Kind.O: mix.o, Kind.Q: mix.qk, Kind.K: mix.qk}
    cells = {Kind.V: mix.v, Kind.DOWN: mix.down, Kind.UP: mix.up, Kind.GATE: mix.up}
    return same.get(kind, "") or next((name for when, name in cells.get(kind, NOTHING).items() if when(at)), "")


def _of_eight(mix: Mix, kind: Kind) -> str | None:
    """Rules for Mixtral, which llama-quantize applies to every model of eight experts; None: as for any other."""
    low = mix.base.startswith(("IQ1", "IQ2"))
    if kind is Kind.O:
        return "Q5_K" if low or mix.name in EIGHT_O else ""
    if kind is Kind.K:
        return "Q4_K" if low else "Q8_0"
    return "Q8_0" if kind is Kind.V and not low else None


def _possible(mix: Mix, tensor: Tensor, choice: Choice, facts: Facts, entries: Collection[str]) -> Choice:
    """The choice, or what can be encoded in its place."""
    if tensor.ne[0] % BLOCKS[choice.type][0]:
        if choice.type not in FALLBACK:
            raise UsageError(f"{tensor.name} has rows of {tensor.ne[0]}, {choice.type} needs a multiple of {BLOCKS[choice.type][0]}.",
                             hint="llama-quantize has no other type for it either.")  # fmt: skip
        other = FALLBACK[choice.type]
        return Choice("F16" if tensor.ne[0] % BLOCKS[other][0] else other, f"fallback from {choice.type}")
    if choice.type not in UNAIDED or (choice.type == "Q2_K" and mix.name != "Q2_K_S") or kind_of(tensor.name) in (Kind.OUT, Kind.EMB):
        return choice
    found = BLOCK.match(tensor.name)
    if found and facts.layers - facts.nextn <= int(found[1]) and tensor.name not in entries:
        return Choice(UNAIDED[choice.type], f"no importance data for {choice.type}")
    return Choice(choice.type, choice.why, needs_imatrix=True)
