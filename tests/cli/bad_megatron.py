"""torch_dist folders broken by name, and pickles that would run something if a pickle machine read them. torch itself writes both."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from tests.cli.bad_releases import Bad, Change, config, linked, written

NORM = "decoder.final_layernorm.weight"
TABLE = "embedding.word_embeddings.weight"
METADATA, COMMON, TRACKER, LAYOUT = (
    "release/.metadata",
    "release/common.pt",
    "latest_checkpointed_iteration.txt",
    "glmconv_origin/glmconv_layout.json",
)


def metadata(change: Callable[[Metadata], object]) -> Change:
    """What .metadata says, as torch reads and writes it."""

    def do(root: Path) -> None:
        value = FileSystemReader(root / "release").read_metadata()
        change(value)
        (root / METADATA).write_bytes(pickle.dumps(value))

    return do


def stored(**fields: object) -> Change:
    """Where one tensor's bytes lie."""

    def change(value: Metadata) -> None:
        (index,) = [index for index in value.storage_data if index.fqn == NORM]
        value.storage_data[index] = replace(value.storage_data[index], **fields)

    return metadata(change)


def shared(value: Metadata) -> None:
    """Two tensors behind the same bytes."""
    places = {index.fqn: index for index in value.storage_data if index.fqn in (TABLE, "output_layer.weight")}
    value.storage_data[places[TABLE]] = value.storage_data[places["output_layer.weight"]]


def chunk(*, offsets: tuple[int, ...], sizes: tuple[int, ...], keep: bool = False) -> Change:
    """The boxes that one tensor is stored in: another one instead, or one more."""

    def change(value: Metadata) -> None:
        chunks = value.state_dict_metadata[NORM].chunks
        (index,) = [index for index in value.storage_data if index.fqn == NORM]
        made = MetadataIndex(NORM, torch.Size(offsets))
        value.storage_data[made] = value.storage_data[index] if keep else value.storage_data.pop(index)
        chunks[:] = (
            [*chunks, ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))]
            if keep
            else [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))]
        )

    return metadata(change)


def sized(*size: int) -> Change:
    return metadata(lambda value: setattr(value.state_dict_metadata[NORM], "size", torch.Size(size)))


def of_dtype(dtype: torch.dtype) -> Change:
    return metadata(lambda value: setattr(value.state_dict_metadata[NORM].properties, "dtype", dtype))


def lost(value: Metadata) -> None:
    del value.state_dict_metadata[NORM]
    for index in [index for index in value.storage_data if index.fqn == NORM]:
        del value.storage_data[index]


def undescribed(value: Metadata) -> None:
    """Bytes of a tensor that nothing says the shape of."""
    del value.state_dict_metadata[NORM]


def renamed(value: Metadata) -> None:
    """A weight that no rule claims."""
    value.state_dict_metadata["decoder.extra.weight"] = value.state_dict_metadata.pop(NORM)
    for index in [index for index in value.storage_data if index.fqn == NORM]:
        value.storage_data[MetadataIndex("decoder.extra.weight", index.offset)] = value.storage_data.pop(index)


def weights(root: Path) -> Path:
    return min((root / "release").glob("*.distcp"))


def common(change: Callable[[argparse.Namespace], object]) -> Change:
    """The run's arguments."""

    def do(root: Path) -> None:
        value = torch.load(root / COMMON, weights_only=False)
        change(value["args"])
        torch.save(value, root / COMMON)

    return do


def origin(change: Change) -> Change:
    return lambda root: change(root / "glmconv_origin")


def NO_ORIGIN(root: Path) -> None:
    """As a trainer saves it: no config.json, no tokenizer."""
    shutil.rmtree(root / "glmconv_origin")


def cut(name: str, size: int) -> Change:
    return lambda root: os.truncate(root / name, size)


def linked_weights(root: Path) -> None:
    linked(weights(root).name)(root / "release")


def linked_folder(name: str) -> Change:
    """One of its folders lies elsewhere, and a link to it here."""

    def do(root: Path) -> None:
        elsewhere = root.parent / f"elsewhere {name}"
        shutil.move(root / name, elsewhere)
        (root / name).symlink_to(elsewhere)

    return do


def layout(text: str) -> Change:
    return written(LAYOUT, text.encode())


def layout_repeated(change: Callable[[list[Any]], object]) -> Change:
    """The layout that is there, with something in it twice."""

    def do(root: Path) -> None:
        value = json.loads((root / LAYOUT).read_bytes())
        change(value["files"])
        (root / LAYOUT).write_text(json.dumps(value))

    return do


BAD_MEGATRON = (
    Bad("no .metadata", lambda root: (root / METADATA).unlink()),
    Bad("an empty .metadata", written(METADATA, b"")),
    Bad("a .metadata cut in the middle", cut(METADATA, 3000)),
    Bad("a .metadata of another object", written(METADATA, pickle.dumps({"a": 1}))),
    Bad("a .metadata that is a number", written(METADATA, pickle.dumps(1))),
    Bad("a .metadata that links out of the folder", lambda root: linked(".metadata")(root / "release")),
    Bad("an iteration that links out of the folder", linked_folder("release"), says="is a link"),
    Bad("an origin that links out of the folder", linked_folder("glmconv_origin"), says="is a link"),
    Bad("no weights", lambda root: weights(root).unlink(), says=".distcp"),
    Bad("weights cut in the middle", lambda root: os.truncate(weights(root), weights(root).stat().st_size // 2)),
    Bad("no byte of weights", lambda root: os.truncate(weights(root), 0)),
    Bad("weights that link out of the folder", linked_weights),
    Bad("weights that are a pipe", lambda root: (path := weights(root)).unlink() or os.mkfifo(path)),
    Bad("a chunk outside of the folder", stored(relative_path="../secret.distcp")),
    Bad("a chunk at an absolute path", stored(relative_path="/etc/passwd")),
    Bad("a chunk in a folder", stored(relative_path="deep/__0_0.distcp")),
    Bad("a chunk in a file that is not there", stored(relative_path="__7_7.distcp"), says="__7_7.distcp"),
    Bad("a chunk in a file of many bytes' name", stored(relative_path="x" * 300)),
    Bad("a chunk behind the end of the file", stored(offset=1 << 40)),
    Bad("a chunk before the begin of the file", stored(offset=-1)),
    Bad("a chunk of 2**62 bytes", stored(length=1 << 62)),
    Bad("a chunk of no bytes", stored(length=0)),
    Bad("two tensors behind the same bytes", metadata(shared)),
    Bad("a chunk that leaves a gap", chunk(offsets=(8,), sizes=(72,))),
    Bad("a chunk that is too large", chunk(offsets=(0,), sizes=(88,))),
    Bad("two chunks that overlap", chunk(offsets=(40,), sizes=(40,), keep=True)),
    Bad("a chunk of two axes", chunk(offsets=(0, 0), sizes=(80, 1))),
    Bad("a tensor of 2**62 rows", sized(2**62)),
    Bad("a tensor of no rows", sized(0)),
    Bad("a tensor of another shape", sized(40, 2)),
    Bad("a tensor of integers", of_dtype(torch.int64)),
    Bad("a tensor of another float", of_dtype(torch.float16)),
    Bad("a tensor that is missing", metadata(lost), says="model.norm.weight"),
    Bad("a tensor that is stored and not described", metadata(undescribed), says=NORM),
    Bad("a tensor that is unknown", metadata(renamed), says="decoder.extra.weight"),
    Bad("another backend", written("release/metadata.json", b'{"sharded_backend": "zarr", "sharded_backend_version": 1}'), 6, "zarr"),
    Bad("a backend that is no JSON", written("release/metadata.json", b"{")),
    Bad("a tracker of an iteration that is not there", written(TRACKER, b"7")),
    Bad("a tracker that leaves the folder", written(TRACKER, b"../../etc")),
    Bad("a tracker of control characters", written(TRACKER, b"\x1b[2J")),
    Bad("a layout that leaves the folder", layout('{"version":1,"files":[["../x.safetensors",{},["model.norm.weight"]]],"index":null}')),
    Bad("a layout at an absolute path", layout('{"version":1,"files":[["/tmp/x.safetensors",{},["model.norm.weight"]]],"index":null}')),
    Bad("a layout with a file twice", layout('{"version":1,"files":[["x.safetensors",{},["a"]],["x.safetensors",{},["b"]]],"index":null}')),
    Bad("a layout with a tensor in two files", layout_repeated(lambda files: files.append(["x.safetensors", {}, files[0][2][:1]])), says="twice"),
    Bad("a layout with a tensor twice in a file", layout_repeated(lambda files: files[0][2].append(files[0][2][0])), says="twice"),
    Bad("a layout that is no JSON", layout("{")),
    Bad("a layout of another version", layout('{"version":2,"files":[],"index":null}')),
    Bad("a config.json that links out of the folder", origin(linked("config.json"))),
    Bad("a config.json of 10**9 layers", origin(config(num_hidden_layers=10**9))),
    Bad("a config.json of one layer more", origin(config(num_hidden_layers=3))),
    Bad("a config.json of another architecture", origin(config(model_type="llama", architectures=["LlamaForCausalLM"])), 6, "llama"),
)
WITHOUT_ORIGIN = (
    Bad("nothing that tells the config", lambda root: (root / COMMON).unlink(), says="--origin"),
    Bad("a common.pt cut in the middle", cut(COMMON, 900)),
    Bad("an empty common.pt", cut(COMMON, 0)),
    Bad("a common.pt that is no zip", written(COMMON, b"x" * 1000)),
    Bad("10**9 layers", common(lambda args: setattr(args, "num_layers", 10**9))),
    Bad("layers in words", common(lambda args: setattr(args, "num_layers", "2"))),
    Bad("a hidden size that is none", common(lambda args: setattr(args, "hidden_size", None)), says="hidden_size"),
    Bad("another hidden size", common(lambda args: setattr(args, "hidden_size", 72))),
    Bad("latent attention", common(lambda args: setattr(args, "multi_latent_attention", True)), 6),
)


# Pickles


class Runs:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def touch(canary: Path) -> str:
    return f"touch {canary}"


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda canary: pickle.dumps(Runs(os.system, touch(canary))),
    "os.system, text pickle": lambda canary: pickle.dumps(Runs(os.system, touch(canary)), protocol=0),
    "eval": lambda canary: pickle.dumps(Runs(eval, f"open({str(canary)!r}, 'w')")),
    "exec in a dict": lambda canary: pickle.dumps({"args": Runs(exec, f"open({str(canary)!r}, 'w')")}),
    "a process": lambda canary: pickle.dumps(Runs(subprocess.Popen, ["touch", str(canary)])),
    "getattr": lambda canary: pickle.dumps(Runs(getattr, Path(canary), "touch")),
    "a path's method": lambda canary: b"\x80\x04\x8c\x07pathlib\x8c\x0aPath.touch\x93cpathlib\nPath\n" + text(str(canary)) + b"\x85R\x85R.",
    "inst": lambda canary: b"(" + text(touch(canary)) + b"ios\nsystem\n.",
    "obj": lambda canary: b"(cos\nsystem\n" + text(touch(canary)) + b"o.",
    "newobj": lambda canary: b"\x80\x02csubprocess\nPopen\n" + text(touch(canary)) + b"\x85\x81.",
    "newobj with keywords": lambda canary: b"\x80\x04csubprocess\nPopen\n)}" + text("args") + text(touch(canary)) + b"s\x92.",
    "build": lambda canary: b"\x80\x02cargparse\nNamespace\n)\x81}" + text("__setstate__") + b"cos\nsystem\nsb" + text(touch(canary)) + b"b.",
    "an attribute of a class that is allowed": lambda canary: b"\x80\x04\x8c\x08argparse\x8c\x0f_sys.modules.get\x93\x8c\x02os\x85R.",
    "an extension": lambda canary: b"\x80\x02\x82\x01.",
    "a persistent id": lambda canary: b"\x80\x02" + text(touch(canary)) + b"Q.",
    "torch.load": lambda canary: pickle.dumps(Runs(torch.load, str(canary))),
    "a module to import": lambda canary: b"\x80\x02cantigravity\nfly\n)R.",
    "the evil beside the good": lambda canary: pickle.dumps([Runs(os.system, touch(canary)), {"a": 1}]),
    "after the end": lambda canary: pickle.dumps({"a": 1}) + pickle.dumps(Runs(os.system, touch(canary))),
    "a recursion of 100,000": lambda canary: b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a recursion of tuples": lambda canary: b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "10 GB in a few bytes": lambda canary: b"\x80\x02K\x01" + b"2\x86" * 200 + b".",
    "a string of 2**62 bytes": lambda canary: b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
    "a memo of 2**32 slots": lambda canary: b"\x80\x02Nr\xff\xff\xff\xff.",
    "a list of itself": lambda canary: b"\x80\x02]q\x00h\x00a.",
    "no pickle": lambda canary: os.urandom(3000),
}  # fmt: skip


def planted(payload: Callable[[Path], bytes]) -> Callable[[Path, str, Path], None]:
    """Puts a pickle in the place of .metadata, or into common.pt where it is asked for: beside no config.json."""

    def plant(root: Path, where: str, canary: Path) -> None:
        data = payload(canary)
        if where == ".metadata":
            (root / METADATA).write_bytes(data)
            return
        if (root / "glmconv_origin").exists():
            NO_ORIGIN(root)
        if where == "common.pt, bare":
            (root / COMMON).write_bytes(data)
            return
        good = zipfile.ZipFile(io.BytesIO((root / COMMON).read_bytes()))
        with zipfile.ZipFile(root / COMMON, "w") as made:
            for name in good.namelist():
                made.writestr(name, data if name.endswith("data.pkl") else good.read(name))

    return plant


def amidst(root: Path, where: str, canary: Path) -> None:
    """A call in the midst of what is right: the weights' places and the run's arguments are all as they should be."""
    evil = Runs(os.system, touch(canary))
    if where == ".metadata":
        metadata(lambda value: setattr(value, "planner_data", {"a": evil}))(root)
        return
    NO_ORIGIN(root)
    torch.save({**torch.load(root / COMMON, weights_only=False), "rerun_state_machine": evil}, root / COMMON)


HOSTILE = {name: planted(payload) for name, payload in PAYLOADS.items()}
