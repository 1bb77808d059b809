"""common.pt: a run's arguments and counters, as Megatron's `load_checkpoint` and the trainers' exporters ask for them."""

from __future__ import annotations

from collections.abc import Mapping

from glmconv.dtypes import BY_NAME
from glmconv.errors import SourceError
from glmconv.formats.pickle_reader import Object
from glmconv.formats.pickle_writer import NAMESPACE
from glmconv.formats.torch_zip import object_blob, read_object_blob
from glmconv.formats.zip_directory import ReadAt

LARGEST = 256 << 20


def write_common(content: Mapping[str, object]) -> bytes:
    """torch.save of `content`, its `args` as an argparse.Namespace. `params_dtype` is added: it is a torch dtype, not a name."""
    args = content["args"]
    assert isinstance(args, Mapping)
    dtype = BY_NAME[str(args.get("params_dtype", "bfloat16"))]
    return object_blob({**content, "args": Object(NAMESPACE, (), {**args, "params_dtype": dtype})})


def read_common(read_at: ReadAt, size: int, *, file: object) -> Mapping[str, object]:
    """common.pt, or the list of one dict that Megatron from 0.19 on keeps inside, as plain data; `args` becomes a mapping."""
    if size > LARGEST:
        raise SourceError(f"is {size:,} bytes; at most {LARGEST:,} are read.", file=file)
    value = read_object_blob(read_at, size, file=file)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        raise SourceError("is not a dict.", file=file)
    args = value.get("args")
    plain = args.state if isinstance(args, Object) and args.named("argparse.Namespace", "types.SimpleNamespace") else args
    return {**{key: item for key, item in value.items() if isinstance(key, str)}, "args": plain}
