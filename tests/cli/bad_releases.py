"""Hugging Face folders broken by name: each change is made to a copy of a good toy, with the exit code that it must get."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.roundtrip.shards import INDEX, Stored, Surgery, home, load, reindexed, save

NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
SECRET = "tripwire: this file lies outside of the source\n"
Change = Callable[[Path], object]


@dataclass(frozen=True)
class Bad:
    """What is done to the folder, and how glmconv must answer; `says` is in its one line."""

    name: str
    change: Change
    code: int = 5
    says: str = ""


def shard(change: Callable[[bytes], bytes]) -> Change:
    """The bytes of one shard."""

    def do(root: Path) -> None:
        file = home(root, NORM)
        file.write_bytes(change(file.read_bytes()))

    return do


def header(change: Callable[[dict[str, Any]], object], spell: Callable[[dict[str, Any]], bytes] = lambda value: json.dumps(value).encode()) -> Change:
    """The header of one shard; its data stay."""

    def edit(raw: bytes) -> bytes:
        begin = 8 + int.from_bytes(raw[:8], "little")
        value = json.loads(raw[8:begin])
        change(value)
        text = spell(value)
        return len(text).to_bytes(8, "little") + text + raw[begin:]

    return shard(edit)


def entry(**fields: object) -> Change:
    """Fields of one tensor's entry in its header."""
    return header(lambda value: value[NORM].update(fields))


def offsets(begin: int, end: int) -> Change:
    """One tensor's range, moved by so many bytes at both ends."""
    return header(lambda value: value[NORM].update(data_offsets=[value[NORM]["data_offsets"][0] + begin, value[NORM]["data_offsets"][1] + end]))


def tensors(change: Callable[[dict[str, Stored]], object], name: str = NORM) -> Change:
    """The tensors of one well-formed shard; the index is made to agree."""

    def do(root: Path) -> None:
        work = Surgery.at(root, name)
        change(work.tensors)
        work.close()
        reindexed(root)

    return do


def index(**fields: object) -> Change:
    """Fields of the index."""

    def do(root: Path) -> None:
        value = json.loads((root / INDEX).read_bytes())
        (root / INDEX).write_text(json.dumps({**value, **fields}))

    return do


def mapped(place: object, tensor: str = NORM) -> Change:
    """Where the index says that one tensor is; None takes it out."""

    def do(root: Path) -> None:
        value = json.loads((root / INDEX).read_bytes())
        value["weight_map"][tensor] = place
        if place is None:
            del value["weight_map"][tensor]
        (root / INDEX).write_text(json.dumps(value))

    return do


def config(**fields: object) -> Change:
    """Fields of config.json; None takes one out."""

    def do(root: Path) -> None:
        value = json.loads((root / "config.json").read_bytes()) | fields
        (root / "config.json").write_text(json.dumps({key: field for key, field in value.items() if field is not None}))

    return do


def written(name: str, content: bytes) -> Change:
    return lambda root: (root / name).write_bytes(content)


def removed(name: str) -> Change:
    return lambda root: (root / name).unlink()


def outside(root: Path) -> Path:
    """A file beside the folder that nobody asked to be read."""
    secret = root.parent / "secret"
    secret.write_text(SECRET)
    return secret


def linked(name: str) -> Change:
    """A file replaced by a link to a file outside of the folder; its own content lies there, so that only the link is wrong."""

    def do(root: Path) -> None:
        shutil.move(root / name, outside(root))
        (root / name).symlink_to("../secret")

    return do


def replaced(make: Callable[[Path], object]) -> Change:
    """Something else than a file in a shard's place."""

    def do(root: Path) -> None:
        file = home(root, NORM)
        file.unlink()
        make(file)

    return do


def twice(root: Path) -> None:
    """The same tensor in two shards."""
    tensor = load(home(root, NORM))[NORM]
    other = Surgery.at(root, "model.embed_tokens.weight")
    assert other.file != home(root, NORM)
    other.tensors[NORM] = tensor
    other.close()


def repeated(root: Path) -> None:
    """A key twice in one header."""
    file = home(root, NORM)
    raw = file.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    text = raw[8:begin].rstrip()
    text = text[:-1] + b"," + json.dumps(NORM).encode() + b":" + json.dumps(json.loads(text)[NORM]).encode() + b"}"
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[begin:])


def unshared(root: Path) -> None:
    home(root, NORM).unlink()


def unindexed(root: Path) -> None:
    unshared(root)
    (root / INDEX).unlink()


def apart(root: Path) -> None:
    """A tensor in a shard of its own, which the index does not name."""
    surgery = Surgery.at(root, NORM)
    save(root / "extra.safetensors", {NORM: surgery.tensors.pop(NORM)})
    surgery.close()
    index = json.loads((root / INDEX).read_bytes())
    del index["weight_map"][NORM]
    (root / INDEX).write_text(json.dumps(index))


def pickles_only(root: Path) -> None:
    for file in root.glob("*.safetensors"):
        file.unlink()
    (root / INDEX).unlink()
    (root / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def nothing(root: Path) -> None:
    for file in root.iterdir():
        file.unlink()


def config_alone(root: Path) -> None:
    for file in root.iterdir():
        if file.name != "config.json":
            file.unlink()


def legacy(root: Path) -> None:
    nothing(root)
    (root / "mp_rank_00").mkdir()
    (root / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"PK")


def quantized(root: Path) -> None:
    config(quantization_config={"quant_method": "gptq"})(root)


def rename_expert(found: dict[str, Stored]) -> None:
    found[GATE.replace("experts.2", "experts.77")] = found.pop(GATE)


def as_dtype(dtype: str, itemsize: int, tensor: str = NORM) -> Change:
    def change(found: dict[str, Stored]) -> None:
        count = len(found[tensor].data) // (4 if found[tensor].dtype == "F32" else 2)
        found[tensor] = Stored(dtype, found[tensor].shape, bytes(count * itemsize))

    return tensors(change, tensor)


def reshaped(*shape: int) -> Change:
    def change(found: dict[str, Stored]) -> None:
        count = 1
        for n in shape:
            count *= n
        found[GATE] = Stored("BF16", list(shape), bytes(2 * count))

    return tensors(change, GATE)


HUGE = b"[" * 100_000 + b"]" * 100_000
FILES = (
    Bad("a shard cut by a byte", shard(lambda raw: raw[:-1])),
    Bad("a shard cut in the middle", shard(lambda raw: raw[: len(raw) // 2])),
    Bad("a shard cut in its header", shard(lambda raw: raw[:100])),
    Bad("a shard cut in its first number", shard(lambda raw: raw[:7])),
    Bad("an empty shard", shard(lambda raw: b"")),
    Bad("a shard with a byte too many", shard(lambda raw: raw + b"\0")),
    Bad("a header one byte longer than the file", shard(lambda raw: (len(raw) - 7).to_bytes(8, "little") + raw[8:])),
    Bad("a header of 2**63 bytes", shard(lambda raw: (2**63).to_bytes(8, "little") + raw[8:])),
    Bad("a header of no byte", shard(lambda raw: bytes(8) + raw[8:])),
    Bad("a header that is no JSON", shard(lambda raw: raw[:8] + b"}" + raw[9:])),
    Bad("a header that is a list", header(lambda value: None, lambda value: b"[]")),
    Bad("a header nested 100,000 deep", header(lambda value: None, lambda value: HUGE)),
    Bad("a header that is no UTF-8", header(lambda value: None, lambda value: b'{"\xff\xfe":' + json.dumps(value[NORM]).encode() + b"}")),
    Bad("overlapping tensors", offsets(-2, -2)),
    Bad("a gap between tensors", offsets(2, 2)),
    Bad("a tensor behind the file's end", offsets(1 << 40, 1 << 40)),
    Bad("a range of another size than the shape", offsets(0, 2)),
    Bad("a range that begins before the data", entry(data_offsets=[-160, 0])),
    Bad("a range that ends before it begins", entry(data_offsets=[160, 0])),
    Bad("a range of fractions", entry(data_offsets=[0.0, 160.0])),
    Bad("a range of one number", entry(data_offsets=[0])),
    Bad("a shape that wraps 64 bits", entry(shape=[2**32, 2**32])),
    Bad("a shape of 2**62 rows", entry(shape=[2**62])),
    Bad("a negative shape", entry(shape=[-80])),
    Bad("a shape of true", entry(shape=[True])),
    Bad("a dtype that nobody knows", entry(dtype="Q9_K"), 6, "Q9_K"),
    Bad("a dtype that is a number", entry(dtype=7)),
    Bad("an entry with one field more", entry(extra=1)),
    Bad("an entry without a shape", header(lambda value: value[NORM].pop("shape"))),
    Bad("metadata that is no text", header(lambda value: value.update(__metadata__={"format": 1}))),
    Bad("a key twice in one header", repeated),
    Bad("a tensor in two shards", twice, says=NORM),
    Bad("a name with control characters", tensors(lambda found: found.update({"a\x1b[2J\nb": Stored("BF16", [1], b"ab")}))),
    Bad("an index that is no JSON", written(INDEX, b"{")),
    Bad("an index that is empty", written(INDEX, b"")),
    Bad("an index nested 100,000 deep", written(INDEX, HUGE)),
    Bad("an index without a map", index(weight_map=None)),
    Bad("an index whose map is a list", index(weight_map=[NORM])),
    Bad("an index with a key twice", written(INDEX, b'{"metadata":{},"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}')),
    Bad("an index that names a missing file", mapped("model-00099-of-00099.safetensors"), says="model-00099"),
    Bad("an index that names another shard", mapped("model-00001-of-00005.safetensors")),
    Bad("an index that names a number", mapped(1)),
    Bad("an index that names an absolute path", mapped("/etc/passwd")),
    Bad("an index that leaves the folder", mapped("../secret.safetensors")),
    Bad("an index that names a folder's file", mapped("deep/model.safetensors")),
    Bad("an index that misses a tensor", mapped(None, GATE), says=GATE),
    Bad("a shard that is not there", unshared),
    Bad("a shard that links out of the folder", lambda root: linked(home(root, NORM).name)(root)),
    Bad("a config.json that links out of the folder", linked("config.json")),
    Bad("an index that links out of the folder", linked(INDEX)),
    Bad("a tokenizer that links out of the folder", linked("tokenizer.json")),
    Bad("a shard that is a folder", replaced(Path.mkdir)),
    Bad("a shard that is a pipe", replaced(os.mkfifo)),
    Bad("a shard that is a device", replaced(lambda path: path.symlink_to("/dev/zero"))),
    Bad("a shard that links to itself", replaced(lambda path: path.symlink_to(path.name))),
    Bad("two names that differ by case alone", lambda root: (root / "TOKENIZER.json").write_bytes(b"{}")),
)
TENSORS = (
    Bad("a tensor that is missing", tensors(lambda found: found.pop(NORM)), says=NORM),
    Bad("an expert that is missing", tensors(lambda found: found.pop(GATE), GATE), says=GATE),
    Bad("a copy that is missing", tensors(lambda found: found.pop("model.layers.2.embed_tokens.weight"), "model.layers.2.embed_tokens.weight")),
    Bad("a tensor that is unknown", tensors(lambda found: found.update(extra=Stored("BF16", [2], bytes(4)))), says="extra"),
    Bad("an expert of another number", tensors(rename_expert, GATE), says=GATE),
    Bad("a transposed tensor", reshaped(80, 24), says=GATE),
    Bad("a flattened tensor", reshaped(80 * 24), says=GATE),
    Bad("a tensor of no rows", reshaped(0, 80), says=GATE),
    Bad("a tensor in float16", as_dtype("F16", 2), says=NORM),
    Bad("a tensor in float32", as_dtype("F32", 4), says=NORM),
    Bad("a tensor of integers", as_dtype("I64", 8), says=NORM),
    Bad("a tensor in 8 bits", as_dtype("F8_E4M3", 1, GATE), says=GATE),
    Bad("a router's bias in float64", as_dtype("F64", 8, "model.layers.1.mlp.gate.e_score_correction_bias"), says="e_score_correction_bias"),
)
CONFIGS = (
    Bad("no config.json", removed("config.json"), says="config.json"),
    Bad("an empty config.json", written("config.json", b"")),
    Bad("a config.json cut off", written("config.json", b'{"model_type": "glm4_moe",')),
    Bad("a config.json that is a list", written("config.json", b"[]")),
    Bad("a config.json that is no UTF-8", written("config.json", b'{"a": "\xff"}')),
    Bad("a config.json with a key twice", written("config.json", b'{"model_type": "glm4_moe", "model_type": "glm4_moe"}')),
    Bad("a config.json nested 100,000 deep", written("config.json", HUGE)),
    Bad("a config.json of 5 MB", written("config.json", b'{"a": "' + b"x" * 5_000_000 + b'"}')),
    Bad("a number of 5,000 digits", written("config.json", b'{"num_hidden_layers": ' + b"9" * 5000 + b"}")),
    Bad("an architecture that is unknown", config(model_type="llama", architectures=["LlamaForCausalLM"]), 6, "llama"),
    Bad("an architecture that is no text", config(model_type=["glm4_moe"], architectures=None), 6),
    Bad("no architecture", config(model_type=None, architectures=None), 6),
    Bad("an architecture with control characters", config(model_type="a\x1b[2J\nb", architectures=["x"]), 6),
    Bad("a release quantized in a way that is not read", quantized, 6, "gptq"),
    Bad("a release that is said to be quantized and is not", config(quantization_config={"quant_method": "fp8"}), 5, "none is"),
    Bad("a quantized release without a method", config(quantization_config={}), 6),
    Bad("10**9 layers", config(num_hidden_layers=10**9)),
    Bad("10**18 layers", config(num_hidden_layers=10**18)),
    Bad("no layers", config(num_hidden_layers=0)),
    Bad("-2 layers", config(num_hidden_layers=-2)),
    Bad("2.5 layers", config(num_hidden_layers=2.5)),
    Bad("true layers", config(num_hidden_layers=True)),
    Bad("layers in words", config(num_hidden_layers="2")),
    Bad("no number of layers", config(num_hidden_layers=None), says="num_hidden_layers"),
    Bad("one layer more than there is", config(num_hidden_layers=3)),
    Bad("one layer fewer than there are", config(num_hidden_layers=1)),
    Bad("a million experts", config(n_routed_experts=10**6)),
    Bad("no experts", config(n_routed_experts=0)),
    Bad("more experts chosen than there are", config(num_experts_per_tok=5)),
    Bad("a hidden size that is true", config(hidden_size=True), says="hidden_size is True"),
    Bad("a hidden size of 2**40", config(hidden_size=2**40)),
    Bad("another hidden size", config(hidden_size=72)),
    Bad("another vocabulary", config(vocab_size=3000)),
    Bad("heads that are no multiple of the groups", config(num_attention_heads=3)),
    Bad("no KV groups", config(num_key_value_heads=0)),
    Bad("more dense layers than layers", config(first_k_dense_replace=9)),
    Bad("1,000 MTP layers", config(num_nextn_predict_layers=1000)),
    Bad("no bias where there is one", config(attention_bias=False)),
    Bad("a norm where there is none", config(use_qk_norm=False)),
    Bad("a bias of 7", config(attention_bias=7)),
)
KINDS = (
    Bad("pickled weights alone", pickles_only, 6, "pytorch_model.bin"),
    Bad("an empty folder", nothing, 6),
    Bad("a legacy Megatron folder", legacy, 6, "torch_dist"),
    Bad("a config.json alone", config_alone),
    Bad("weights and no index, one shard away", unindexed),
    Bad("a shard that the index does not name", apart, says="not in the index"),
)
BAD = FILES + TENSORS + CONFIGS + KINDS
