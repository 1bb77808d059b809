"""NeMo AutoModel's tools/merge_lora.py: a LoRA adapter merged into its base model, a few rows at a time."""

from __future__ import annotations

import sys

from dropin import Parser, accept, finish, glmconv, refuse, run


def parser() -> Parser:
    made = Parser("NeMo AutoModel's tools/merge_lora.py", "Merge a LoRA adapter, as PEFT saves it, into its base model: in float32, rounded once.")
    made.add_argument("-m", "--base-model", required=True, help="folder or Hub id of the model")
    made.add_argument("-a", "--adapter-path", required=True, help="folder or Hub id of the adapter")
    made.add_argument("-o", "--output-dir", required=True, help="folder to write")
    made.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="must be the weights' own, which is the default")
    made.add_argument("--qlora", action="store_true", help="refused: the base would have to be the 4-bit one that the adapter was trained on")
    accept(made, "--device", "--model-class", because="everything is done on the CPU, and no model is built")
    accept(made, "--no-save-tokenizer", "--trust-remote-code", nargs=0, because="the release's files are copied, and no code of them is run")
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.qlora:
        return refuse("--qlora: bitsandbytes' 4-bit weights are not made here.", "Without it the adapter is merged into the weights as they are.")
    if args.dtype:
        with glmconv.open_checkpoint(args.base_model, strict=False) as checkpoint:
            own = next(tensor.dtype.name for _, tensor in checkpoint)
        if args.dtype != own:
            return refuse(f"--dtype {args.dtype}: the weights are {own}, and are not cast.", "Leave it out.")
    return run("convert", args.base_model, args.output_dir, "--to", "hf", "--lora", args.adapter_path)


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
