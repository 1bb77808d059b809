"""Headers and indexes: what is read, what is refused, and the safetensors library as the judge of both."""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.dtypes import ALL, BY_NAME
from glmconv.engine.inputs import InputFolder
from glmconv.errors import GlmconvError, SourceError
from glmconv.formats.safetensors_header import TENSORS, Header, read_header, read_index, write_header
from tests.attacks.safetensors_files import ATTACKS, INDEX, SHARDS, WEIGHTS, Attack, mutations, packed, sharded, spelled

SOAK = bool(os.environ.get("GLMCONV_SOAK"))
SEED = int(os.environ.get("GLMCONV_SEED", "20260101"))
PEAK = 150 << 20  # bytes above what the process had

shapes = st.lists(st.integers(0, 4), max_size=8).map(tuple)
names = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=40).filter(lambda name: name != "__metadata__")
entries = st.lists(st.tuples(names, st.sampled_from(ALL), shapes), max_size=8, unique_by=lambda entry: entry[0])
anything = st.text(st.characters(exclude_categories=["Cs"]))
metadata = st.dictionaries(anything, anything, max_size=4)
one_pair = st.tuples(anything, anything).map(lambda pair: dict([pair]))  # the library writes several in an order of its own
tensors = st.dictionaries(names, st.tuples(st.sampled_from(ALL), st.lists(st.integers(0, 3), max_size=3)), max_size=8)


def size_of(dtype, shape) -> int:
    return math.prod(shape) * dtype.itemsize


def header_of(folder: Path, content: bytes) -> Header:
    (folder / WEIGHTS).write_bytes(content)
    with InputFolder(folder) as opened:
        return read_header(opened.open(WEIGHTS))


def read_folder(path: Path) -> list[Header]:
    """As a reader does: list, index, then each file's header."""
    with InputFolder(path) as folder:
        listed = folder.names()
        files = [name for name in listed if name.lower().endswith(".safetensors")]
        if INDEX in listed:
            file = folder.open(INDEX)
            read_index(file.read(0, file.size), file.path, files)
        return [read_header(folder.open(name)) for name in files]


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "folder"
    made.mkdir()
    return made


@pytest.fixture
def hanging():
    """Fails a test that waits for a pipe or a device."""

    def fail(signum, frame):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 30)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def peak() -> int:
    """The most memory that the process ever held, since the last `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
@pytest.mark.usefixtures("hanging")
def test_a_hostile_folder_is_refused_at_once_and_in_little_memory(attack: Attack, folder):
    attack.hostile(folder)
    before, began = forget_peak(), time.thread_time()
    with pytest.raises(GlmconvError) as caught:
        read_folder(folder)
    assert time.thread_time() - began < 10
    assert peak() - before < PEAK
    assert type(caught.value) is attack.error
    assert len(caught.value.line) < 5000
    assert caught.value.line.isprintable()
    assert str(folder) in caught.value.line


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_benign_twin_of_an_attack_is_read(attack: Attack, folder):
    attack.twin(folder)
    assert len(read_folder(folder)) >= 1


def test_there_are_enough_attacks_and_each_has_a_name_of_its_own():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 100


def test_what_we_accept_the_library_accepts_with_the_same_meaning(folder):
    read = refused = 0
    for content in mutations(SEED, 200_000 if SOAK else 4_000):
        try:
            header = header_of(folder, content)
        except GlmconvError:
            refused += 1
            continue
        read += 1
        theirs = dict(safetensors.deserialize(content))
        assert theirs.keys() == header.tensors.keys(), (SEED, content)
        for name, tensor in header.tensors.items():
            other = theirs[name]
            assert (tensor.dtype.safetensors, list(tensor.shape)) == (other["dtype"], list(other["shape"])), (SEED, content)
            assert content[tensor.offset : tensor.offset + tensor.size] == bytes(other["data"]), (SEED, content)
        with safetensors.safe_open(folder / WEIGHTS, "pt") as opened:
            assert (opened.metadata() or {}) == header.metadata, (SEED, content)
    assert read > 800
    assert refused > 1_500


@given(
    tensors=tensors,
    metadata=st.none() | st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.text(max_size=9)).map(lambda pair: dict([pair])),
)
@settings(max_examples=150, deadline=None)
def test_a_library_files_header_is_written_again_byte_by_byte(tmp_path_factory, tensors, metadata):
    stored = {name: torch.zeros(shape, dtype=getattr(torch, dtype.name)) for name, (dtype, shape) in tensors.items()}
    content = safetensors.torch.save(stored, metadata)
    header = header_of(tmp_path_factory.getbasetemp(), content)
    again = write_header([(name, tensor.dtype, tensor.shape) for name, tensor in header.tensors.items()], header.metadata)
    assert again == content[: header.data_start]
    assert header.metadata == (metadata or {})


@given(entries=entries, metadata=metadata)
@settings(max_examples=150, deadline=None)
def test_a_written_header_is_read_back_by_us_and_by_the_library(tmp_path_factory, entries, metadata):
    size = sum(size_of(dtype, shape) for _, dtype, shape in entries)
    start = write_header(entries, metadata)
    assert len(start) % 8 == 0
    header = header_of(tmp_path_factory.getbasetemp(), start + bytes(size))
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {name: (dtype, shape) for name, dtype, shape in entries}
    assert header.metadata == metadata
    assert header.data_start == len(start)
    theirs = [(name, t["dtype"], tuple(t["shape"])) for name, t in safetensors.deserialize(start + bytes(size))]
    assert sorted(theirs) == sorted((name, dtype.safetensors, shape) for name, dtype, shape in entries)


@given(entries=entries)
@settings(max_examples=50, deadline=None)
def test_tensors_come_in_the_order_of_their_data_wherever_the_header_names_them(tmp_path_factory, entries):
    document, at = {}, 0
    for name, dtype, shape in entries:
        end = at + size_of(dtype, shape)
        document[name] = {"data_offsets": [at, end], "shape": list(shape), "dtype": dtype.safetensors}
        at = end
    header = header_of(tmp_path_factory.getbasetemp(), packed(spelled(dict(reversed(document.items()))), bytes(at)))
    offsets = [(tensor.offset, tensor.size) for tensor in header.tensors.values()]
    assert offsets == sorted(offsets)
    filled = [name for name, dtype, shape in entries if size_of(dtype, shape)]
    assert [name for name, tensor in header.tensors.items() if tensor.size] == filled


def test_a_header_without_metadata_is_written_without_them():
    assert b"__metadata__" not in write_header([("a", BY_NAME["int8"], (1,))], {})


def test_two_tensors_of_one_name_are_not_written():
    with pytest.raises(ValueError, match=r"two tensors are called a"):
        write_header([("a", BY_NAME["int8"], (1,))] * 2)


def test_the_digest_changes_with_any_byte_of_the_header(folder):
    header = header_of(folder, packed(b'{"__metadata__":{"k":"v"}}'))
    other = header_of(folder, packed(b'{"__metadata__":{"k":"w"}}'))
    assert header.digest != other.digest
    assert header.digest != header_of(folder, packed(b'{"__metadata__":{"k":"v"}} ')).digest


def test_an_error_names_the_file_the_tensor_and_what_is_wrong(folder):
    with pytest.raises(SourceError, match=r"model\.safetensors: a: is \[2, 4\] of float32, 32 bytes, but lies from 0 to 24\."):
        header_of(folder, packed(spelled({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 24]}}), bytes(24)))


def test_a_cut_off_file_says_how_much_is_missing(folder):
    with pytest.raises(SourceError, match=r"ends early: 10 bytes of .* are missing. Is it cut off"):
        header_of(folder, packed(spelled({"a": {"dtype": "U8", "shape": [30], "data_offsets": [0, 30]}}), bytes(20)))


def test_a_header_longer_than_its_file_is_not_read(folder):
    with pytest.raises(SourceError, match=r"@0: says its header is 3 bytes long, but has 2 behind that\. Is it cut off"):
        header_of(folder, packed(b"{}", length=3))


def test_offsets_in_messages_are_those_of_the_file(folder):
    with pytest.raises(SourceError, match=r"@11: is not JSON"):
        header_of(folder, packed(b"{  a}"))


def many(count: int) -> bytes:
    entries = (b'"layers.%d.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[%d,%d]}' % (n, 4 * n, 4 * n + 4) for n in range(count))
    return b"{" + b",".join(entries) + b"}"


def test_a_header_of_ten_megabytes_is_read_in_seconds(folder):
    content = packed(many(120_000), bytes(480_000))
    began = time.thread_time()
    assert len(header_of(folder, content).tensors) == 120_000
    assert time.thread_time() - began < 15


def test_one_tensor_more_than_the_limit_is_refused(folder):
    with pytest.raises(SourceError, match=r"holds more than"):
        header_of(folder, packed(many(TENSORS + 1), bytes(4 * TENSORS + 4)))


def test_an_index_gives_its_map_and_its_metadata(folder):
    sharded()(folder)
    weight_map, found = read_index((folder / INDEX).read_bytes(), folder / INDEX, SHARDS)
    assert weight_map == {"a": SHARDS[0], "b": SHARDS[1]}
    assert found == {"total_size": 48}


def test_an_index_may_have_no_metadata():
    assert read_index(spelled({"weight_map": {"a": SHARDS[0]}}), Path("index"), SHARDS) == ({"a": SHARDS[0]}, {})


def test_an_index_says_how_many_shards_are_missing():
    index = spelled({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})
    with pytest.raises(SourceError, match=f"names 2 files, of which 1 are not here, {SHARDS[1]} first"):
        read_index(index, Path("index"), SHARDS[:1])


@pytest.mark.parametrize("shard", ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "b\\a.safetensors", ".a.safetensors", ".safetensors",
                                   "a.bin", "a.safetensors\n", "a\0.safetensors", "\u0430.safetensors", "n" * 244 + ".safetensors"])  # fmt: skip
def test_an_index_names_no_other_files_than_shards_of_its_folder_even_if_they_are_there(shard):
    with pytest.raises(SourceError, match=r"cannot be the name of a shard"):
        read_index(spelled({"weight_map": {"a": shard}}), Path("index"), [shard])
