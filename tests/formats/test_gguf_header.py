"""GGUF headers: what is read, what is refused, and llama.cpp's headers and its Python package as the judges of both."""

from __future__ import annotations

import json
import math
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.codecs.ggml import row_size
from glmconv.engine.inputs import InputFolder
from glmconv.errors import GlmconvError, SourceError, UnsupportedError
from glmconv.formats.gguf_header import ALIGNMENTS, TENSORS, GgufHeader, data_size, padded, read_header, write_header
from glmconv.formats.gguf_types import BY_NAME, GGML_TYPES, Array, Entry, Kind, Value
from tests.attacks.gguf_files import ATTACKS, GOOD, Attack, mutations, tensor
from tests.attacks.gguf_files import packed as file_of

SOAK = bool(os.environ.get("GLMCONV_SOAK"))
SEED = int(os.environ.get("GLMCONV_SEED", "20261101"))
PEAK = 200 << 20  # bytes above what the process had
WEIGHTS = "model.gguf"
GOLDEN = sorted((Path(__file__).parent.parent / "vectors" / "gguf_header").glob("*/*-*.json"))
KINDS = {"str": Kind.STRING, "arr": Kind.ARRAY} | {kind.name.lower(): kind for kind in Kind}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=63)
whole = {
    Kind.U8: (0, 8),
    Kind.I8: (1, 8),
    Kind.U16: (0, 16),
    Kind.I16: (1, 16),
    Kind.U32: (0, 32),
    Kind.I32: (1, 32),
    Kind.U64: (0, 64),
    Kind.I64: (1, 64),
}
scalars = {kind: st.integers(-(2 ** (bits - 1)) * signed, 2 ** (bits - signed) - 1) for kind, (signed, bits) in whole.items()}
scalars |= {Kind.F32: st.floats(width=32, allow_nan=False), Kind.F64: st.floats(allow_nan=False), Kind.BOOL: st.booleans(), Kind.STRING: text}
scalar = st.sampled_from(list(scalars)).flatmap(lambda kind: st.tuples(st.just(kind), scalars[kind]))
flat = st.sampled_from(list(scalars)).flatmap(lambda kind: st.builds(Array, st.just(kind), st.lists(scalars[kind], max_size=5)))
arrays = flat | st.builds(Array, st.just(Kind.ARRAY), st.lists(flat, max_size=3))
values = scalar | st.tuples(st.just(Kind.ARRAY), arrays)
keys = names.filter(lambda key: key != "general.alignment")
entries = st.lists(st.tuples(keys, values).map(lambda made: Entry(made[0], *made[1])), max_size=6, unique_by=lambda entry: entry.key)
shapes = st.tuples(st.sampled_from(GGML_TYPES), st.lists(st.integers(1, 3), min_size=1, max_size=4))
tensors = st.lists(st.tuples(names, shapes), max_size=6, unique_by=lambda made: made[0]).map(
    lambda made: [(name, kind, (ne[0] * kind.block, *ne[1:])) for name, (kind, ne) in made]
)


def header_of(folder: Path, content: bytes) -> GgufHeader:
    (folder / WEIGHTS).write_bytes(content)
    with InputFolder(folder) as opened:
        return read_header(opened.open(WEIGHTS))


def whole_file(kv, described, alignment=32) -> bytes:
    """A file of zeros for data."""
    return write_header(kv, described, alignment) + bytes(sum(padded(data_size(kind, ne), alignment) for _, kind, ne in described))


def golden(path: Path) -> tuple[list[Entry], list]:
    document = json.loads(path.read_text(encoding="utf-8"))

    def entry(key, kind, value):
        return Entry(key, KINDS[kind], Array(KINDS[value[0]], value[1]) if kind == "arr" else value)

    return [entry(*row) for row in document["kv"]], [(name, BY_NAME[kind], tuple(ne)) for name, kind, ne in document["tensors"]]


def peak() -> int:
    """The most memory that the process ever held, since the last `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_a_hostile_file_is_refused_at_once_and_in_little_memory(attack: Attack, tmp_path):
    content = attack.hostile()
    (tmp_path / WEIGHTS).write_bytes(content)
    del content
    before, began = forget_peak(), time.thread_time()
    with pytest.raises(GlmconvError) as caught, InputFolder(tmp_path) as opened:
        read_header(opened.open(WEIGHTS))
    assert time.thread_time() - began < 1.5
    assert peak() - before < PEAK
    assert type(caught.value) is attack.error
    assert len(caught.value.line) < 5000
    assert caught.value.line.isprintable()
    assert str(tmp_path) in caught.value.line


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_benign_twin_of_an_attack_is_read_at_once_and_in_little_memory(attack: Attack, tmp_path):
    (tmp_path / WEIGHTS).write_bytes(attack.twin())
    before, began = forget_peak(), time.thread_time()
    with InputFolder(tmp_path) as opened:
        read_header(opened.open(WEIGHTS))
    assert time.thread_time() - began < 1.5
    assert peak() - before < PEAK


def test_there_are_enough_attacks_and_each_has_a_name_of_its_own():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 70


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_llama_cpps_keys_and_tensors_are_written_and_read_back(path, tmp_path):
    kv, described = golden(path)
    header = header_of(tmp_path, whole_file(kv, described))
    assert [Entry(key, *value) for key, value in header.kv.items()] == kv
    assert [(name, found.type, found.ne) for name, found in header.tensors.items()] == described
    assert len(header.kv) > 35
    assert len(header.tensors) > 90


@given(kv=entries, described=tensors, alignment=st.sampled_from(ALIGNMENTS[:6]))
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, kv, described, alignment):
    kv = [*kv, *([Entry("general.alignment", Kind.U32, alignment)] if alignment != 32 else [])]
    content = whole_file(kv, described, alignment)
    header = header_of(tmp_path_factory.getbasetemp(), content)
    assert [Entry(key, *value) for key, value in header.kv.items()] == kv
    assert [(name, found.type, found.ne) for name, found in header.tensors.items()] == described
    assert header.alignment == alignment
    assert header.data_start == len(write_header(kv, described, alignment))
    at = header.data_start
    for found in header.tensors.values():
        assert found.offset == at
        at += padded(found.size, alignment)
    assert at == len(content)


@given(described=tensors, kv=st.lists(st.tuples(keys, flat.filter(lambda a: a.values)), max_size=4, unique_by=lambda pair: pair[0]), plain=entries)
@settings(max_examples=60, deadline=None)
def test_the_packages_writer_writes_the_same_bytes(tmp_path_factory, described, kv, plain):
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.getbasetemp() / "theirs.gguf"
    path.unlink(missing_ok=True)
    described = [made for made in described if made[1].name not in ("Q1_0", "Q2_0")]  # newer than the package
    kv = [Entry(key, Kind.ARRAY, value) for key, value in kv]
    kv += [entry for entry in plain if entry.kind is not Kind.ARRAY and entry.key not in {other.key for other in kv}]
    writer = gguf.GGUFWriter(path, "glm4")
    for key, kind, value in kv:
        if kind is Kind.ARRAY:
            writer.add_key_value(key, value.values, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(value.kind))
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType(kind))
    for name, kind, ne in described:
        bytes_of_row = (*reversed(ne[1:]), row_size(kind, ne[0]))
        theirs = gguf.GGMLQuantizationType(kind.id)
        writer.add_tensor_info(name, bytes_of_row, np.dtype(np.uint8), math.prod(bytes_of_row), raw_dtype=theirs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    content = path.read_bytes()
    content += bytes(-len(content) % 32)
    kv = [Entry("general.architecture", Kind.STRING, "glm4"), *kv] if all(entry.key != "general.architecture" for entry in kv) else kv
    assert write_header(kv, described) == content


@given(kv=entries, described=tensors.filter(bool))
@settings(max_examples=60, deadline=None)
def test_the_packages_reader_reads_the_same_from_our_files(tmp_path_factory, kv, described):
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.getbasetemp() / "ours.gguf"
    described = [made for made in described if made[1].name not in ("Q1_0", "Q2_0")]
    kv = [entry for entry in kv if not isinstance(entry.value, Array) or (entry.value.kind is not Kind.ARRAY and entry.value.values)]
    path.write_bytes(whole_file(kv, described))
    reader = gguf.GGUFReader(path)
    start = len(write_header(kv, described))
    for key, kind, value in kv:
        field = reader.fields[key]
        assert field.types[0] == int(kind)
        assert field.contents() == (value.values if isinstance(value, Array) else value)
    at = start
    for found, (name, kind, ne) in zip(reader.tensors, described, strict=True):
        assert (found.name, int(found.tensor_type), tuple(found.shape.tolist()), found.data_offset) == (name, kind.id, ne, at)
        assert found.n_bytes == data_size(kind, ne)
        at += padded(data_size(kind, ne))


def test_what_we_accept_of_broken_files_the_package_reads_alike(tmp_path):
    gguf = pytest.importorskip("gguf")
    read = refused = 0
    for content in mutations(SEED, 50_000 if SOAK else 1_500):
        try:
            header = header_of(tmp_path, content)
        except GlmconvError:
            refused += 1
            continue
        read += 1
        if not header.tensors or any(found.type.name in ("Q1_0", "Q2_0") for found in header.tensors.values()):
            continue
        theirs = gguf.GGUFReader(tmp_path / WEIGHTS)
        assert {name: found.offset for name, found in header.tensors.items()} == {found.name: found.data_offset for found in theirs.tensors}
        assert set(header.kv) <= set(theirs.fields), (SEED, content)
        for key, value in header.kv.items():
            if value.kind not in (Kind.ARRAY, Kind.F32, Kind.F64, Kind.STRING):
                assert theirs.fields[key].contents() == value.value, (SEED, content)
    assert read > 300
    assert refused > 500


def test_sizes_of_types_are_the_packages():
    gguf = pytest.importorskip("gguf")
    theirs = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {kind.name: (kind.id, kind.block, kind.size) for kind in GGML_TYPES}
    assert {name: ours[name] for name in ours if name in theirs} == {name: theirs[name] for name in theirs if name in ours}
    assert ours.keys() - theirs.keys() <= {"Q1_0", "Q2_0"}
    assert theirs.keys() - ours.keys() <= {"Q8_1", "Q8_K"}  # of activations, never in a file


@pytest.mark.parametrize(
    ("kind", "value"),
    [(Kind.U8, 256), (Kind.U32, -1), (Kind.U32, True), (Kind.BOOL, 1), (Kind.STRING, b"x"), (Kind.ARRAY, [1]), (Kind.F32, 1e39), (Kind.I32, 1.0),
     (Kind.ARRAY, Array(Kind.U8, [256])), (Kind.ARRAY, Array(Kind.STRING, [1]))],
)  # fmt: skip
def test_a_value_of_another_kind_is_not_written(kind, value):
    with pytest.raises(ValueError):
        write_header([Entry("k", kind, value)], [])


@pytest.mark.parametrize(
    ("name", "ne"), [("", (1,)), ("a\n", (1,)), ("a" * 64, (1,)), ("a", ()), ("a", (0,)), ("a", (1, 1, 1, 1, 1)), ("\u00e9", (1,))]
)
def test_a_tensor_that_could_not_be_read_is_not_written(name, ne):
    with pytest.raises(ValueError, match=r"is no tensor"):
        write_header([], [(name, BY_NAME["F32"], ne)])


def test_names_keys_and_alignments_must_agree_to_be_written():
    with pytest.raises(ValueError, match=r"a is there twice"):
        write_header([], [("a", BY_NAME["F32"], (1,))] * 2)
    with pytest.raises(ValueError, match=r"k is there twice"):
        write_header([Entry("k", Kind.U8, 1)] * 2, [])
    with pytest.raises(ValueError, match=r"aligned to 64"):
        write_header([], [], alignment=64)
    with pytest.raises(ValueError, match=r"is no tensor"):
        write_header([], [("a", BY_NAME["Q8_0"], (33,))])


def test_a_string_cut_inside_a_character_travels_unchanged(tmp_path):
    cut = "é".encode()[:1].decode("utf-8", "surrogateescape")
    header = header_of(tmp_path, write_header([Entry("quantize.imatrix.file", Kind.STRING, cut)], []))
    assert header.kv == {"quantize.imatrix.file": Value(Kind.STRING, cut)}


def test_an_error_names_the_file_the_tensor_and_what_is_wrong(tmp_path):
    with pytest.raises(SourceError, match=r"model\.gguf: b: leaves a gap before it: it begins at 64 of the data, not at 32\."):
        header_of(tmp_path, file_of(tensors=(tensor(b"a"), tensor(b"b", offset=64)), data=96))
    with pytest.raises(UnsupportedError, match=r"model\.gguf: @4: is big-endian GGUF, version 3; versions 2 and 3, little-endian, are read\."):
        header_of(tmp_path, file_of(version=3 << 24))
    with pytest.raises(SourceError, match=r"ends early: 10 bytes of .* are missing\. Is it cut off"):
        header_of(tmp_path, GOOD[:-40])


def test_the_longest_header_of_many_tensors_is_read_in_a_second(tmp_path):
    content = write_header([], [(f"blk.{n}.weight", BY_NAME["F32"], (8,)) for n in range(TENSORS)]) + bytes(32 * TENSORS)
    began = time.thread_time()
    assert len(header_of(tmp_path, content).tensors) == TENSORS
    assert time.thread_time() - began < 1.5


def test_every_cut_of_a_file_is_refused(tmp_path):
    for size in range(len(GOOD) - 30):  # the last tensor's padding may be missing
        with pytest.raises(SourceError):
            header_of(tmp_path, GOOD[:size])
    assert struct.calcsize("<34x") == BY_NAME["Q8_0"].size


def test_a_header_as_large_as_glm_5s_is_read_at_once_and_in_little_memory(tmp_path):
    tokens = [f"Ġtoken{n}" for n in range(154_880)]
    kv = [
        Entry("tokenizer.ggml.tokens", Kind.ARRAY, Array(Kind.STRING, tokens)),
        Entry("tokenizer.ggml.token_type", Kind.ARRAY, Array(Kind.I32, [1] * len(tokens))),
        Entry("tokenizer.ggml.merges", Kind.ARRAY, Array(Kind.STRING, [f"Ġtok en{n}" for n in range(322_000)])),
        Entry("glmconv.source.tokenizer.json", Kind.STRING, "Ġ" + "x" * (21 << 20)),
    ]
    (tmp_path / WEIGHTS).write_bytes(write_header(kv, []))
    before, began = forget_peak(), time.thread_time()
    with InputFolder(tmp_path) as opened:
        header = read_header(opened.open(WEIGHTS))
    assert time.thread_time() - began < 1.5
    assert peak() - before < PEAK
    assert [Entry(key, *value) for key, value in header.kv.items()] == kv
