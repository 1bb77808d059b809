"""The door for sources: what it opens, what it refuses, and that it notices when a file is not the one that it was."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.engine import inputs
from glmconv.engine.inputs import OPEN_AT_ONCE, InputFolder, plain_name
from glmconv.errors import SourceError

CONTENT = bytes(range(256)) * 16
ETAG = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(CONTENT)
    with InputFolder(tmp_path) as opened:
        yield opened


def descriptors() -> int:
    gc.collect()  # of folders that earlier tests forgot
    return len(os.listdir("/proc/self/fd"))


def cached(cache: Path, name: str = "model.safetensors", *, repository: str = "models--org--name") -> Path:
    """A repository as the Hub's cache has it; returns its snapshot."""
    blob = cache / repository / "blobs" / ETAG
    snapshot = cache / repository / "snapshots" / ("c" * 40)
    (snapshot / name).parent.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_bytes(CONTENT)
    (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def share(cache: Path, snapshot: Path) -> Path:
    """Move the snapshot's blob to the store that all repositories of the cache share."""
    blob = snapshot.parent.parent / "blobs" / ETAG
    shared = cache / "blobs" / ETAG[:2] / ETAG
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    return shared


def test_ranges_of_a_file_are_read(folder):
    file = folder.open("model.safetensors")
    assert (file.name, file.size, file.path) == ("model.safetensors", 4096, folder.root / "model.safetensors")
    assert file.read(250, 10) == CONTENT[250:260]
    assert file.read(4096, 0) == b""
    out = bytearray(20)
    file.read_into(4080, memoryview(out)[2:18])
    assert out == bytes(2) + CONTENT[4080:] + bytes(2)


def test_words_are_filled_like_bytes(folder):
    out = memoryview(bytearray(16)).cast("I")
    folder.open("model.safetensors").read_into(16, out)
    assert out.tobytes() == CONTENT[16:32]


@pytest.mark.parametrize(("offset", "size"), [(0, 4097), (4096, 1), (-1, 2), (0, -1), (1 << 62, 1), (0, 1 << 62)])
def test_a_range_beyond_the_file_is_refused_before_anything_is_allocated(folder, offset, size):
    with pytest.raises(SourceError, match=r"model.safetensors: ends early"):
        folder.open("model.safetensors").read(offset, size)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "a\x7fb", "a\x85b", "a\udcffb", "n" * 256, "é" * 128, "a/", "/a", "./a"],
)
def test_what_is_no_plain_name_is_never_looked_up(folder, name):
    for look in (folder.open, folder.exists):
        with pytest.raises(SourceError, match=r"cannot be the name of a file"):
            look(name)


@given(name=st.text())
@settings(max_examples=300)
def test_a_plain_name_names_something_in_the_folder_and_nowhere_else(name):
    if plain_name(name):
        assert Path("/root", name).parent == Path("/root")
        assert os.path.normpath(f"/root/{name}") == f"/root/{name}"
        assert len(os.fsencode(name)) <= 255


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "...", "..a", "~", "-rf", "a b", "$(x)", "模型.safetensors"])
def test_odd_but_plain_names_are_opened(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with InputFolder(tmp_path) as folder:
        assert folder.names() == [name]
        assert folder.exists(name)
        assert folder.open(name).read(0, 1) == b"x"


def test_a_missing_file_is_said_to_be_missing(folder):
    assert not folder.exists("config.json")
    with pytest.raises(SourceError, match=r"config.json: is missing. Is the download complete"):
        folder.open("config.json")


@pytest.mark.parametrize(("what", "kind"), [(os.mkfifo, "a pipe"), (os.mkdir, "a folder"), (lambda path: path.symlink_to("/dev/null"), "a link")])
def test_only_regular_files_are_opened(folder, what, kind):
    what(folder.root / "other")
    with pytest.raises(SourceError, match=f"other: is {kind}"):
        folder.open("other")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_a_device_is_refused_unopened(folder):
    try:
        os.mknod(folder.root / "zero", 0o20666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("device nodes cannot be made here")
    with pytest.raises(SourceError, match=r"zero: is a device"):
        folder.open("zero")


@pytest.mark.skipif(not Path("/sys/class/net/lo/speed").exists(), reason="needs a file whose reading fails")
def test_a_failing_read_names_the_file_and_the_offset():
    with (
        InputFolder(Path("/sys/class/net/lo")) as folder,
        pytest.raises(SourceError, match=r"speed: @3: cannot be read: Invalid argument. Is the disk"),
    ):
        folder.open("speed").read(3, 4)


@pytest.mark.parametrize("what", ["nowhere", "file", "pipe", "nul\0"])
def test_what_is_no_folder_is_refused(tmp_path, what):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match=r"cannot be opened"):
        InputFolder(tmp_path / what)


def test_a_folder_may_itself_be_given_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    with InputFolder(tmp_path / "link") as folder:
        assert folder.open("a").read(0, 1) == b"x"


def test_another_folder_put_in_its_place_is_not_read(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a").write_bytes(b"ours")
    with InputFolder(tmp_path / "source") as folder:
        (tmp_path / "source").rename(tmp_path / "moved")
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "a").write_bytes(b"theirs")
        assert folder.open("a").read(0, 4) == b"ours"


def test_names_are_listed_with_all_that_open_will_refuse_but_no_folders(folder):
    os.mkfifo(folder.root / "pipe")
    (folder.root / "inner").mkdir()
    (folder.root / "link").symlink_to("nowhere")
    (folder.root / "to-inner").symlink_to("inner")
    (folder.root / ".nfs0000000000000001").touch()
    assert folder.names() == ["link", "model.safetensors", "pipe", "to-inner"]
    assert folder.names() == ["link", "model.safetensors", "pipe", "to-inner"]


@pytest.mark.parametrize("pair", [("a", "A"), ("straße", "STRASSE"), ("caf\u00e9", "cafe\u0301"), ("\u212b", "\u00c5")])
def test_two_spellings_of_one_name_are_refused(tmp_path, pair):
    for name in pair:
        (tmp_path / name).touch()
    with InputFolder(tmp_path) as folder, pytest.raises(SourceError, match=r"is spelled .* too"):
        folder.names()


@pytest.mark.parametrize("name", [b"a\nb", b"a\\b", b"a\xffb", b"\x1b[2J"])
def test_a_name_that_cannot_be_opened_is_refused_when_listed(tmp_path, name):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    with InputFolder(tmp_path) as folder, pytest.raises(SourceError, match=r"control characters") as caught:
        folder.names()
    assert caught.value.line.isprintable()


def test_files_of_known_folders_are_opened_and_of_no_others(tmp_path):
    for inner in ("origin", "other"):
        (tmp_path / inner).mkdir()
        (tmp_path / inner / "config.json").write_bytes(b"{}")
    (tmp_path / "linked").symlink_to("origin")
    with InputFolder(tmp_path, folders=("origin", "gone", "linked")) as folder:
        file = folder.open("origin/config.json")
        assert file.read(0, 2) == b"{}"
        file.check_unchanged()
        assert folder.exists("origin/config.json")
        assert not folder.exists("gone/config.json")
        assert not folder.exists("origin/nothing")
        for name in ("other/config.json", "origin/../other", "origin/a/b", "../origin/config.json"):
            with pytest.raises(SourceError, match=r"cannot be the name"):
                folder.open(name)
        with pytest.raises(SourceError, match=r"is missing"):
            folder.open("gone/config.json")
        with pytest.raises(SourceError, match=r"cannot be opened"):
            folder.open("linked/config.json")


def test_the_hubs_links_to_its_blobs_are_followed(tmp_path):
    with InputFolder(cached(tmp_path)) as folder:
        assert folder.names() == ["model.safetensors"]
        file = folder.open("model.safetensors")
        assert file.read(0, 4096) == CONTENT
        file.check_unchanged()


def test_the_hubs_links_are_followed_from_a_folder_inside_a_snapshot(tmp_path):
    with InputFolder(cached(tmp_path, "original/model.safetensors"), folders=("original",)) as folder:
        assert folder.open("original/model.safetensors").read(0, 4) == CONTENT[:4]


def test_the_hubs_shared_blobs_are_followed(tmp_path):
    snapshot = cached(tmp_path)
    shared = share(tmp_path, snapshot)
    with InputFolder(snapshot) as folder:
        file = folder.open("model.safetensors")
        assert file.read(0, 4096) == CONTENT
        shared.write_bytes(CONTENT[:-1])
        with pytest.raises(SourceError, match=r"changed while it was read"):
            file.check_unchanged()


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../secret", "../../blobs/../../secret", "../../blobs/sub/secret", "../../blobs/", "secret",
                                    "../../blobs/..", "../blobs/secret", "../../blobs/.hidden", "../../blobs", "../../blobs/secret\n"])  # fmt: skip
def test_no_other_link_of_a_snapshot_is_followed(tmp_path, target):
    snapshot = cached(tmp_path)
    for secret in (tmp_path / "secret", snapshot / "secret", snapshot.parent / "secret"):
        secret.write_bytes(b"secret")
    (snapshot / "config.json").symlink_to(target)
    with InputFolder(snapshot) as folder, pytest.raises(SourceError, match=r"config.json: is a link; only"):
        folder.open("config.json")


@pytest.mark.parametrize("target", ["/etc/passwd", "../../blobs/ab/secret", "../../secret", f"../../blobs/ff/{ETAG}",
                                    f"../../../blobs/{ETAG[:2]}/{ETAG}", ETAG[:-1]])  # fmt: skip
def test_no_other_link_of_a_blob_is_followed(tmp_path, target):
    snapshot = cached(tmp_path)
    share(tmp_path, snapshot)
    (tmp_path / "secret").write_bytes(b"secret")
    blob = snapshot.parent.parent / "blobs" / ETAG
    blob.unlink()
    blob.symlink_to(target)
    with InputFolder(snapshot) as folder, pytest.raises(SourceError, match=r"link out of the Hub's cache"):
        folder.open("model.safetensors")


def test_blobs_beside_a_folder_that_is_no_snapshot_are_not_read(tmp_path):
    snapshot = cached(tmp_path)
    snapshot.parent.rename(snapshot.parent.with_name("versions"))
    with InputFolder(snapshot.parent.with_name("versions") / snapshot.name) as folder, pytest.raises(SourceError, match=r"is a link; only"):
        folder.open("model.safetensors")


def test_blobs_are_shared_only_between_repositories_of_a_cache(tmp_path):
    snapshot = cached(tmp_path, repository="unpacked")
    assert InputFolder(snapshot).open("model.safetensors").size == 4096
    share(tmp_path, snapshot)
    with InputFolder(snapshot) as folder, pytest.raises(SourceError, match=r"link out of the Hub's cache"):
        folder.open("model.safetensors")


def test_a_blobs_folder_that_is_a_link_is_not_entered(tmp_path):
    snapshot = cached(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with InputFolder(snapshot) as folder, pytest.raises(SourceError, match=r"cannot be opened: Not a directory"):
        folder.open("model.safetensors")


@pytest.mark.parametrize("what", [os.mkfifo, os.mkdir])
def test_a_blob_that_is_no_file_is_refused(tmp_path, what):
    snapshot = cached(tmp_path)
    blob = snapshot.parent.parent / "blobs" / ETAG
    blob.unlink()
    what(blob)
    with InputFolder(snapshot) as folder, pytest.raises(SourceError, match=r"model.safetensors: is not a file"):
        folder.open("model.safetensors")


def test_a_link_to_a_blob_that_is_gone_is_a_missing_file(tmp_path):
    snapshot = cached(tmp_path)
    (snapshot.parent.parent / "blobs" / ETAG).unlink()
    with InputFolder(snapshot) as folder:
        assert folder.exists("model.safetensors")
        with pytest.raises(SourceError, match=r"is missing. Is the download complete"):
            folder.open("model.safetensors")


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def touched(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """By a file of the same size and time."""
    times = path.stat()
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.rename(path)


@pytest.mark.parametrize("change", [longer, touched, replaced, lambda path: os.truncate(path, 10)])
def test_a_changed_file_is_noticed(folder, change):
    file = folder.open("model.safetensors")
    folder.check_unchanged()
    change(file.path)
    with pytest.raises(SourceError, match=r"model.safetensors: changed while it was read\. Start again"):
        folder.check_unchanged()


def test_a_file_that_is_gone_is_noticed(folder):
    file = folder.open("model.safetensors")
    file.path.unlink()
    with pytest.raises(SourceError, match=r"is missing"):
        folder.check_unchanged()


def test_a_file_cut_off_after_it_was_opened_ends_early(folder):
    file = folder.open("model.safetensors")
    os.truncate(file.path, 1000)
    assert file.read(0, 1000) == CONTENT[:1000]
    for read in (lambda: file.read(900, 200), lambda: file.read_into(900, memoryview(bytearray(200)))):
        with pytest.raises(SourceError, match=r"@1000: ends early: it was longer"):
            read()


def test_a_file_opened_twice_is_one(folder):
    assert folder.open("model.safetensors") is folder.open("model.safetensors")


def many(path: Path, count: int) -> dict[str, bytes]:
    contents = {f"model-{n:05d}.safetensors": n.to_bytes(4, "little") * 64 for n in range(count)}
    for name, content in contents.items():
        (path / name).write_bytes(content)
    return contents


def test_a_thousand_files_are_read_by_many_threads_through_few_descriptors(tmp_path):
    contents = many(tmp_path, 1000)
    before = descriptors()
    most = []
    with InputFolder(tmp_path) as folder:
        files = [folder.open(name) for name in folder.names()]

        def reads(seed: int) -> int:
            rng = random.Random(seed)
            wrong = 0
            for file in rng.choices(files, k=1500):
                wrong += file.read(4, 8) != contents[file.name][4:12]
            most.append(len(os.listdir("/proc/self/fd")))
            return wrong

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(reads, range(8))) == 0
        assert max(most) <= before + OPEN_AT_ONCE + 20
        folder.check_unchanged()
    assert descriptors() == before


def test_a_file_replaced_while_its_descriptor_was_closed_is_not_read(tmp_path):
    many(tmp_path, OPEN_AT_ONCE + 2)
    with InputFolder(tmp_path) as folder:
        first, *_ = [folder.open(name) for name in folder.names()]
        replaced(first.path)
        with pytest.raises(SourceError, match=r"changed while it was read"):
            first.read(0, 4)
        (tmp_path / first.name).unlink()
        with pytest.raises(SourceError, match=r"is missing"):
            first.read(0, 4)


def test_a_descriptor_in_use_is_not_closed_for_another(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "OPEN_AT_ONCE", 1)
    contents = many(tmp_path, 3)
    with InputFolder(tmp_path) as folder:
        files = [folder.open(name) for name in contents]
        with folder.borrowed(files[0]) as fd:
            inside = threading.Event()
            other = threading.Thread(target=lambda: (files[1].read(0, 4), files[2].read(0, 4), inside.set()))
            other.start()
            other.join(10)
            assert inside.is_set()
            assert os.pread(fd, 256, 0) == contents[files[0].name]


@pytest.mark.parametrize("name", ["pipe", "nothing", "..", "link"])
def test_refusals_leave_no_descriptor_open(folder, name):
    os.mkfifo(folder.root / "pipe")
    (folder.root / "link").symlink_to("/dev/null")
    before = descriptors()
    for _ in range(3):
        with pytest.raises(SourceError):
            folder.open(name)
    assert descriptors() == before


def test_a_forgotten_folder_closes_its_descriptors(tmp_path):
    (tmp_path / "a").touch()
    before = descriptors()
    InputFolder(tmp_path).open("a")
    assert descriptors() == before


def test_nothing_is_read_after_close(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    folder = InputFolder(tmp_path)
    file = folder.open("a")
    folder.close()
    folder.close()
    for use in (lambda: file.read(0, 1), lambda: folder.open("b"), folder.names, lambda: folder.exists("a"), folder.check_unchanged):
        with pytest.raises(ValueError, match=r"is closed"):
            use()
