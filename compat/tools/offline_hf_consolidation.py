"""NeMo AutoModel's tools/offline_hf_consolidation.py: every rank's shards as one Hugging Face folder."""

from __future__ import annotations

import sys
from pathlib import Path

from dropin import Parser, accept, finish, glmconv, note, option, refuse, run, workers


def parser() -> Parser:
    made = Parser("NeMo AutoModel's tools/offline_hf_consolidation.py", "Write one Hugging Face folder from sharded safetensors. No process group.")
    made.add_argument("-m", "--model-name", required=True, help="folder or Hub id of the release, for shards without .hf_metadata/config.json")
    made.add_argument("-i", "--input-dir", required=True, help="folder of the shards (shard-N-model-N-of-N.safetensors), or the one above")
    made.add_argument("-o", "--output-dir", required=True, help="folder to write, not inside the input")
    made.add_argument("--num-threads", type=int, default=5, help="threads")
    made.add_argument("--cast-dtype", help="must be the weights' own, which is the default")
    accept(made, "--backend", because="there is no process group")
    accept(made, "--diffusers-compatible", nargs=0, because="GLM is no diffusion model")
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    has = any((Path(args.input_dir) / folder / ".hf_metadata/config.json").is_file() for folder in ("", "model"))
    if has:
        note("note: config and tokenizer are those of .hf_metadata, as they were trained with; -m is not needed")
    origin = None if has else args.model_name
    if args.cast_dtype:
        with glmconv.open_checkpoint(args.input_dir, origin=origin, strict=False) as checkpoint:
            own = next(tensor.dtype.name for _, tensor in checkpoint)
        if args.cast_dtype.removeprefix("torch.") not in (own, {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[own]):
            return refuse(f"--cast-dtype {args.cast_dtype}: the weights are {own}, and are not cast.", "Leave it out.")
    return run("convert", args.input_dir, args.output_dir, "--to", "hf", *option("--origin", origin), *workers(args.num_threads))


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
