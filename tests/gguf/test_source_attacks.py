"""GGUF models that are broken or hostile, each beside a twin that differs in that alone and is read: one line, at once, nothing written."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from glmconv import convert
from glmconv.codecs.ggml import TYPES
from glmconv.formats.gguf_types import Array, Entry, Kind
from tests.attacks.gguf_files import ATTACKS
from tests.conftest import EACH
from tests.formats.test_gguf_header import forget_peak, peak
from tests.gguf.rewritten import changed
from tests.roundtrip.shards import marks

PRESET = "glm4.7-flash-30B-A3B"
MOST = 200 << 20
SOURCE = "glmconv.source."
Entries = list[Entry]
Tensors = dict[str, tuple[object, tuple[int, ...], bytes]]
Change = Callable[[Entries, Tensors], None]


@dataclass(frozen=True)
class Bad:
    """`hostile` and `twin` change a good file; `code` and `says` are what a command answers to the first."""

    name: str
    hostile: Change
    twin: Change
    says: str
    code: int = 5


def nothing(entries: Entries, tensors: Tensors) -> None:
    pass


def key(name: str, value: object, kind: Kind | None = None) -> Change:
    """A key set, or taken away."""

    def change(entries: Entries, tensors: Tensors) -> None:
        at = next((n for n, entry in enumerate(entries) if entry.key == name), len(entries))
        old = entries[at : at + 1]
        entries[at : at + 1] = [] if value is None else [Entry(name, kind or old[0].kind, value)]

    return change


def embedded(name: str, content: object = "{}", kind: Kind = Kind.STRING) -> Change:
    return key(SOURCE + name, content, kind)


def config(**fields: object) -> Change:
    """The model's config.json rides along, with these fields changed."""

    def change(entries: Entries, tensors: Tensors) -> None:
        known = {entry.key: entry.value for entry in entries}
        base = json.loads(CONFIG["text"]) | fields
        assert known["general.architecture"] == "deepseek2"
        embedded("config.json", json.dumps(base))(entries, tensors)

    return change


CONFIG: dict[str, str] = {}


def both(*changes: Change) -> Change:
    def change(entries: Entries, tensors: Tensors) -> None:
        for one in changes:
            one(entries, tensors)

    return change


def tensor(name: str, *, kind: str | None = None, ne: tuple[int, ...] | None = None, data: bytes | None = None, called: str | None = None) -> Change:
    """A tensor changed; of no other type it is taken away."""

    def change(entries: Entries, tensors: Tensors) -> None:
        old = tensors.pop(name)
        if kind or ne or data is not None or called:
            tensors[called or name] = (TYPES[kind] if kind else old[0], ne or old[1], old[2] if data is None else data)

    return change


def scale(bits: int) -> Change:
    """A tensor of Q8_0 with this scale in its second row."""
    blocks = struct.pack("<H", 0x1C00) + b"\x01" * 32

    def change(entries: Entries, tensors: Tensors) -> None:
        _, ne, _ = tensors[NAME]
        rows = bytearray(blocks * (ne[0] // 32) * ne[1])
        rows[len(rows) // ne[1] :][:2] = b""
        struct.pack_into("<H", rows, len(rows) // ne[1], bits)
        tensors[NAME] = (TYPES["Q8_0"], ne, bytes(rows))

    return change


NAME = "token_embd.weight"
NORM = "blk.1.attn_norm.weight"
BLOCKS = "deepseek2.block_count"
BAD = (
    Bad("no architecture", key("general.architecture", None), nothing, "general.architecture is missing"),
    Bad("an architecture that is a number", key("general.architecture", 5, Kind.U32), nothing, "general.architecture is no text"),
    Bad("an architecture that nobody knows", key("general.architecture", "gpt5"), nothing, "architecture gpt5", 6),
    Bad("no layers", key(BLOCKS, 0), nothing, "layers to the decoder"),
    Bad("2^31 - 1 layers", key(BLOCKS, 2**31 - 1), nothing, "layers to the decoder"),
    Bad("2^32 - 1 layers", key(BLOCKS, 2**32 - 1), nothing, "whole number"),
    Bad("a layer more than there is", key(BLOCKS, 6), nothing, "is unknown"),
    Bad("three layers more than there are", key(BLOCKS, 8), nothing, "has tensors of 5 layers"),
    Bad("a layer fewer than there is", key(BLOCKS, 4), nothing, "is unknown"),
    Bad("layers that are a text", key(BLOCKS, "5", Kind.STRING), nothing, "whole number"),
    Bad("layers that are true", key(BLOCKS, True, Kind.BOOL), nothing, "whole number"),
    Bad("no layers said", key(BLOCKS, None), nothing, "block_count is missing"),
    Bad("2^24 heads", key("deepseek2.attention.head_count", 2**24), nothing, "there are 16,777,216 heads"),
    Bad("4,096 experts", key("deepseek2.expert_count", 4096), nothing, "there are 4,096 experts"),
    Bad("1,000 heads", key("deepseek2.attention.head_count", 1000), nothing, "there are 1,000 heads"),
    Bad("no heads", key("deepseek2.attention.head_count", 0), nothing, "num_attention_heads is 0"),
    Bad("2^30 experts", key("deepseek2.expert_count", 2**30), nothing, "n_routed_experts is"),
    Bad("more chosen experts than there are", key("deepseek2.expert_used_count", 5), key("deepseek2.expert_used_count", 3),
        "at most n_routed_experts"),
    Bad("an epsilon of NaN", key("deepseek2.attention.layer_norm_rms_epsilon", float("nan")),
        key("deepseek2.attention.layer_norm_rms_epsilon", 2.0**-20), "a number is needed"),
    Bad("an epsilon that is a text", key("deepseek2.attention.layer_norm_rms_epsilon", "1", Kind.STRING), nothing, "a number is needed"),
    Bad("a flag that is a number", key("deepseek2.expert_weights_norm", 1, Kind.U32), nothing, "neither true nor false"),
    Bad("a key of 8 parts without the others", both(key("split.no", 0, Kind.U16), key("split.count", 8, Kind.U16)),
        both(key("split.no", 0, Kind.U16), key("split.count", 0, Kind.U16)), "part 1 of 8"),
    Bad("an importance matrix", key("general.type", "imatrix"), nothing, "holds a imatrix", 6),
    # what rides along
    Bad("a file above the folder", embedded("../x.json"), embedded("x.json"), "cannot be the name"),
    Bad("a file two above", embedded("../../etc/x.json"), embedded("etc.json"), "cannot be the name"),
    Bad("an absolute path", embedded("/tmp/x.json"), embedded("tmp.json"), "cannot be the name"),
    Bad("a folder's file", embedded(".glmconv/plan.json"), embedded("plan.json"), "cannot be the name"),
    Bad("our own state", embedded(".glmconv"), embedded("glmconv.json"), "cannot be the name"),
    Bad("our manifest", embedded("glmconv_manifest.json"), embedded("manifest.json"), "cannot be the name"),
    Bad("an index", embedded("model.safetensors.index.json"), embedded("model.json"), "cannot be the name"),
    Bad("weights", embedded("model.safetensors"), embedded("model.txt"), "cannot be the name"),
    Bad("code", embedded("modeling.py"), embedded("modeling.md"), "cannot be the name"),
    Bad("a pickle", embedded("x.pt"), embedded("x.txt"), "cannot be the name"),
    Bad("a backslash", embedded("..\\x.json"), embedded("x.json"), "cannot be the name"),
    Bad("no name", embedded(""), embedded("x.json"), "cannot be the name"),
    Bad("a name of dots", embedded(".."), embedded("x.json"), "cannot be the name"),
    Bad("two files but for case", both(embedded("x.json"), embedded("X.json")), both(embedded("x.json"), embedded("y.json")), "is spelled"),
    Bad("a file that is numbers", embedded("x.json", Array(Kind.U8, [1]), Kind.ARRAY), embedded("x.json"), "is no text"),
    Bad("a config that is no JSON", embedded("config.json", "{"), config(), "is not JSON"),
    Bad("a config that is a list", embedded("config.json", "[]"), config(), "not an object"),
    Bad("a config of 100,000 brackets", embedded("config.json", "[" * 100_000), config(), "nested"),
    Bad("a config of another model", config(model_type="glm4"), config(), "general.architecture deepseek2"),
    Bad("a config of a model that nobody knows", config(model_type="llama"), config(), "general.architecture deepseek2"),
    Bad("a config with another width", config(hidden_size=4096), config(hidden_act="gelu"), "hidden_size is 4096"),
    Bad("a config with other experts", config(num_experts_per_tok=3), config(use_cache=False), "num_experts_per_tok is 3"),
    Bad("a config with another base", config(rope_theta=5.0), config(initializer_range=5.0), "rope_theta is 5.0"),
    Bad("a config with a base that is a text", config(rope_theta="1"), config(), "rope_theta is 1"),
    Bad("a config with 10^300 for an epsilon", config(rms_norm_eps=1e300), config(), "rms_norm_eps is"),
    Bad("a config without layers", config(num_hidden_layers=None), config(num_nextn_predict_layers=0), "num_hidden_layers is missing"),
    Bad("a layout that leads elsewhere", embedded("glmconv_layout.json", '{"version": 1, "files": [["../x.safetensors", {}, []]], "index": null}'),
        embedded("glmconv_layout.json", '{"version": 1, "files": [["x.safetensors", {}, []]], "index": null}'), "cannot be the name of a shard"),
    # tensors
    Bad("no embedding", tensor(NAME), nothing, "holds no language model"),
    Bad("no norm", tensor(NORM), nothing, "model.layers.1.input_layernorm.weight: is missing"),
    Bad("a norm under another name", tensor(NORM, called="blk.1.attn_nrom.weight"), nothing, "is missing"),
    Bad("a tensor too many", lambda e, t: t.update({"blk.1.what.weight": t[NORM]}), nothing, "blk.1.what.weight: is unknown"),
    Bad("a tensor of a layer that is not there", lambda e, t: t.update({"blk.99.attn_norm.weight": t[NORM]}), nothing, "is unknown"),
    Bad("a tower's tensor", lambda e, t: t.update({"v.post_ln.weight": t[NORM]}), nothing, "is unknown"),
    Bad("half a kv_b", tensor("blk.1.attn_v_b.weight"), nothing, "lacks a part of it, blk.1.attn_v_b.weight"),
    Bad("half an MTP layer", tensor("blk.4.ffn_gate_exps.weight"), nothing, "is missing"),
    Bad("a norm of two axes", tensor(NORM, ne=(8, 4)), tensor(NORM, ne=(32, 1, 1, 1)), "the model's sizes need"),
    Bad("a norm that is longer", tensor(NORM, ne=(33,), data=bytes(132)), tensor(NORM, data=bytes(128)), "the model's sizes need"),
    Bad("a norm of Q8_0", tensor(NORM, kind="Q8_0", data=bytes(34)), tensor(NORM, kind="BF16", data=bytes(64)), "has one axis"),
    Bad("whole numbers", lambda e, t: t.update({NAME: (INTEGERS, t[NAME][1], bytes(4 * t[NAME][1][0] * t[NAME][1][1]))}), nothing, "type I32", 6),
)  # fmt: skip
from glmconv.formats.gguf_types import BY_NAME  # noqa: E402

INTEGERS = BY_NAME["I32"]


@pytest.fixture(scope="module")
def good(toy, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.gguf"
    convert(toy(PRESET, EACH), {"gguf:BF16": path})
    CONFIG["text"] = (toy(PRESET, EACH) / "config.json").read_text()
    return path


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_bad_model_is_refused_and_its_twin_read(bad, good, glmconv, tmp_path):
    hostile = changed(good, tmp_path / "in" / "model.gguf", bad.hostile)
    twin = changed(good, tmp_path / "twin" / "model.gguf", bad.twin)
    before = marks(tmp_path)
    assert glmconv("inspect", twin, "-q").code == 0
    for command in (("convert", hostile, tmp_path / "out", "--to", "hf"), ("plan", hostile, "--to", "fp8:channel"), ("inspect", hostile, "-q")):
        held, began = forget_peak(), time.thread_time()
        answer = glmconv(*command)
        assert time.thread_time() - began < 1
        assert peak() - held < MOST
        assert answer.code == bad.code, answer.err
        assert bad.says in answer.err
        if command[0] != "inspect":
            assert (answer.out, len(answer.err.splitlines())) == ("", 1)
        assert len(answer.errors[0]) < 1500
        assert answer.errors[0].isprintable()
    assert marks(tmp_path) == before


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_hostile_header_is_refused_on_the_command_line(attack, glmconv, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(attack.hostile())
    held, began = forget_peak(), time.thread_time()
    answer = glmconv("convert", path, tmp_path / "out", "--to", "hf")
    assert time.thread_time() - began < 1.5
    assert peak() - held < MOST
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (attack.error.code, "", 1)
    assert [child.name for child in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(("bits", "code"), [(0x1C00, 0), (0x7C00, 5), (0xFC00, 5), (0x7E01, 5)])
def test_a_scale_that_is_no_number_is_an_error_that_names_the_tensor(bits, code, good, glmconv, tmp_path):
    path = changed(good, tmp_path / "in" / "model.gguf", scale(bits))
    for to in ("hf", "gguf:Q8_0", "gguf:Q4_0"):
        out = tmp_path / (f"{to[5:]}.gguf" if ":" in to else to)
        answer = glmconv("convert", path, out, "--to", to)
        assert answer.code == code, answer.err
        if code:
            assert f"{NAME}: has a scale of Q8_0 that is NaN or infinite in row 1." in answer.err
            assert not (out / "config.json").exists()
            assert not out.is_file()


def test_a_pipe_a_link_and_a_folder_are_no_files(good, glmconv, tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "link.gguf").symlink_to(good)
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "empty").mkdir()
    for name, code in (("pipe.gguf", 6), ("link.gguf", 5), ("folder.gguf", 6), ("empty", 6), ("nothing.gguf", 5)):
        answer = glmconv("convert", tmp_path / name, tmp_path / "out", "--to", "hf")
        assert (answer.code, len(answer.errors)) == (code, 1), name
