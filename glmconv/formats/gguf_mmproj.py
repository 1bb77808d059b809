"""The vision tower as a GGUF file of its own, which llama.cpp calls mmproj.

Source: llama.cpp's conversion/base.py (MmprojModel) and qwen3vl.py (Glm4VVisionModel, Glm5NextVisionModel), tools/mtmd/clip.cpp for what it can run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from glmconv.archs import Model
from glmconv.codecs.ggml import TYPES, GgmlType
from glmconv.errors import SourceError, UnsupportedError, UsageError
from glmconv.formats.format import LayoutOptions, Opened, RowReader
from glmconv.formats.gguf_general import CARD, GENERATION, general_entries
from glmconv.formats.gguf_layout import GgufPlan, Planned, name_of, output_files, side_bytes
from glmconv.formats.gguf_metadata import CONFIG, FILE_TYPES, QUANTIZATION_VERSION
from glmconv.formats.gguf_tensors import GGUFTensor, in_tower, placed
from glmconv.formats.gguf_types import Array, Entry, Kind, single
from glmconv.strict_json import mapping, parse

Images = Mapping[str, tuple[str, object]]  # how pictures are prepared: field -> (the file that says it, its value)
MMPROJ = "mmproj"
OUT_TYPES = ("F32", "F16", "BF16", "Q8_0")
CONVOLUTIONS = ("v.patch_embd.weight", "v.patch_embd.weight.1", "mm.patch_merger.weight")
PROJECTORS = {"glm4v_moe": "glm4v", "glm5_next": "glm5v"}
# A key under clip.vision and the field of vision_config that it says, in the converter's order
FIELDS = {
    "image_size": "image_size", "patch_size": "patch_size", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "block_count": "depth", "attention.head_count": "num_heads",
}  # fmt: skip
RUNNABLE = {"frames": (2, "temporal_patch_size"), "merge": (2, "spatial_merge_size"), "channels": (3, "in_channels")}  # fixed in clip.cpp
DEFAULTS: dict[str, object] = {"hidden_act": "silu", "rms_norm_eps": 1e-05, "swiglu_limit": 10.0}  # transformers', where vision_config is silent
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
# What transformers' image processors of these models take where the release does not say
IMAGES: dict[str, object] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "patch_size": 14, "merge_size": 2,
    "min_image_tokens": 16, "max_image_tokens": 8000,
}  # fmt: skip


def mmproj_named(file_type: str) -> str | None:
    """`mmproj` or `mmproj-TYPE` as it is spelled here, given in any case; None if it is a language model's. UsageError for another TYPE."""
    name, dash, out_type = file_type.partition("-")
    if name.lower() != MMPROJ:
        return None
    if dash and out_type.upper() not in OUT_TYPES:
        raise UsageError(f"an mmproj file is not written as {out_type!r}.", hint=f"Types: {', '.join(f'{MMPROJ}-{each}' for each in OUT_TYPES)}.")
    return MMPROJ + dash + out_type.upper()


def plan(opened: Opened, options: LayoutOptions) -> GgufPlan:
    """One file, beside the folder of its own. UnsupportedError for a model that does not see, or that llama.cpp would not run as it is meant.

    Options of GGUF files are the language model's: none changes the tower's.
    """
    refuse_unknown(opened)
    tensors = mmproj_tensors(opened.model, opened.tensors, shards(opened))
    out_type = options.file_type.partition("-")[2] or guessed(tensors, opened.tensors)
    planned = [Planned(tensor, *type_of(tensor, out_type)) for tensor in tensors]
    kv, notes = metadata(opened, out_type)
    files = output_files(planned, kv, opened.tensors, LayoutOptions(name=options.name))
    counts = Counter(each.kind.name for each in planned)
    said = (*opened.notes, f"the vision tower: {', '.join(f'{count:,} {name}' for name, count in counts.most_common())}", *notes)
    return GgufPlan(f"gguf:{options.file_type}", {"name": options.name}, opened.fingerprint, files, (), said, tuple(planned))


def refuse_unknown(opened: Opened) -> None:
    spec, s = opened.model.spec, opened.model.sizes
    if spec.model_type not in PROJECTORS:
        raise UnsupportedError(f"{spec.title} has no vision tower, so there is no mmproj file of it.", file=opened.path)
    for size, (number, field) in RUNNABLE.items():
        if s[size] != number:
            raise UnsupportedError(f"has vision_config.{field} {s[size]:,}; llama.cpp runs towers with {number}.", file=CONFIG)
    missing = [name for name, tensor in opened.model.tensors.items() if in_tower(tensor) and name not in opened.tensors]
    if missing:
        raise SourceError(f"is missing, one of {len(missing):,} tensors of the vision tower.", file=opened.path, tensor=missing[0])


def shards(opened: Opened) -> Mapping[str, int]:
    """Tensor -> number of its file in the release, where that is known."""
    files = sorted(opened.layout.files) if opened.layout else ()
    return {tensor: number for number, (_, _, tensors) in enumerate(files) for tensor in tensors}


def mmproj_tensors(model: Model, names: Collection[str] | None = None, files: Mapping[str, int] | None = None) -> list[GGUFTensor]:
    """Every tensor of the tower's file in the converter's order: file by file of the release, by canonical name in each.

    `names` are the canonical tensors that are there (None: all of the model's); `files` says in which file each lies (None: all in one).
    """

    def order(tensor: GGUFTensor) -> tuple[int, str, int]:
        canonical = tensor.runs[0].tensor
        return (files or {}).get(canonical, 0), canonical, tensor.frame

    return sorted(placed(model, names, tower=True), key=order)


def guessed(tensors: Sequence[GGUFTensor], readers: Mapping[str, RowReader]) -> str:
    """The converter's own choice: what the first weight is stored in, F16 if that is float32."""
    first = next(tensor for tensor in tensors if len(tensor.ne) > 1)
    return "BF16" if readers[first.runs[0].tensor].dtype.name == "bfloat16" else "F16"


def type_of(tensor: GGUFTensor, out_type: str) -> tuple[GgmlType, str]:
    """A tensor's type in a file of `out_type`, and why. ggml's convolutions take float32 and float16; rows that do not fill blocks become float16."""
    if tensor.name in CONVOLUTIONS:
        return TYPES["F16" if out_type == "F16" else "F32"], "convolution"
    if tensor.dtype == "F32":
        return TYPES["F32"], "kept"
    kind = TYPES[out_type]
    return (TYPES["F16"], f"fallback from {kind}") if tensor.ne[0] % kind.block else (kind, "base")


def metadata(opened: Opened, out_type: str) -> tuple[list[Entry], list[str]]:
    """Every key in the converter's order, and what is to be said of it."""
    files = side_bytes(opened, (GENERATION, CARD, PREPROCESSOR, PROCESSOR))
    images, notes = image_settings(files)
    found = [Entry("general.architecture", Kind.STRING, "clip"), Entry("general.type", Kind.STRING, MMPROJ)]
    found += general_entries(opened.model, opened.config, files, name_of(opened), vision=True)
    found.append(Entry("general.file_type", Kind.U32, FILE_TYPES[out_type]))
    found += clip_entries(opened.model, mapping(opened.config["vision_config"], "vision_config", CONFIG), images)
    return [*found, Entry("general.quantization_version", Kind.U32, QUANTIZATION_VERSION)], notes


def image_settings(files: Mapping[str, bytes]) -> tuple[Images, list[str]]:
    """What processor_config.json says, before preprocessor_config.json, before what transformers takes; and what is to be told of that."""
    said: dict[str, tuple[str, object]] = {}
    for name, inner in ((PREPROCESSOR, "media_proc_cfg"), (PROCESSOR, "image_processor")):
        if name in files:
            whole = mapping(parse(files[name], file=name), name, name)
            part = whole.get(inner)
            both = {**whole, **(part if isinstance(part, Mapping) else {})}
            said |= {field: (name, value) for field, value in both.items() if value is not None}
    notes = [] if "image_mean" in said else [f"{PREPROCESSOR} is not there or silent: image_mean and image_std are those of transformers' processor"]
    return {field: ("transformers", value) for field, value in IMAGES.items()} | said, notes


def clip_entries(model: Model, vision: Mapping[str, object], images: Images) -> Iterator[Entry]:
    """The keys that llama.cpp runs the tower by. `vision` is vision_config, whose sizes are checked."""
    projector = PROJECTORS[model.spec.model_type]
    vision = {**DEFAULTS, **{field: value for field, value in vision.items() if value is not None}}
    yield Entry("clip.has_vision_encoder", Kind.BOOL, True)
    yield _number("projection_dim", model.sizes["hidden"])
    for key, field in FIELDS.items():
        yield _number(key, vision[field])
    for field in ("image_mean", "image_std"):
        yield Entry(f"clip.vision.{field}", Kind.ARRAY, Array(Kind.F32, _colours(field, images)))
    yield Entry("clip.projector_type", Kind.STRING, projector)
    act = str(vision["hidden_act"]).lower()
    if act not in ("silu", "gelu"):
        raise UnsupportedError(f"has vision_config.hidden_act {act[:60]}; llama.cpp runs towers with silu and gelu.", file=CONFIG)
    yield Entry(f"clip.use_{act}", Kind.BOOL, True)
    yield Entry("clip.vision.attention.layer_norm_epsilon", Kind.F32, single(vision["rms_norm_eps"], "vision_config.rms_norm_eps", CONFIG))
    if projector == "glm5v":
        yield _number("spatial_merge_size", model.sizes["merge"])
        yield Entry("clip.vision.swiglu_clamp", Kind.F32, single(vision["swiglu_limit"], "vision_config.swiglu_limit", CONFIG))
        token = (_whole("patch_size", images) * _whole("merge_size", images)) ** 2
        for least in ("min", "max"):
            yield _number(f"image_{least}_pixels", min(_whole(f"{least}_image_tokens", images) * token, 2**32 - 1))


def _number(key: str, value: object) -> Entry:
    return Entry(f"clip.vision.{key}", Kind.U32, value)


def _colours(field: str, images: Images) -> list[float]:
    file, value = images[field]
    if not isinstance(value, list) or len(value) != 3:
        raise SourceError(f"{field} is {str(value)[:60]}, three numbers are needed.", file=file)
    return [single(each, field, file) for each in value]


def _whole(field: str, images: Images) -> int:
    file, value = images[field]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**24:
        raise SourceError(f"{field} is {str(value)[:60]}, a whole number from 1 to {2**24 - 1:,} is needed.", file=file)
    return value
