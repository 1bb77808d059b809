"""slime's and miles' tools/convert_hf_to_torch_dist.py: a Hugging Face release as a Megatron torch_dist checkpoint."""

from __future__ import annotations

import sys

from dropin import Parser, accept, finish, glmconv, note, refuse, run

WHY = "the checkpoint has no parallel layout and no model is built"


def parser() -> Parser:
    made = Parser(
        "slime's and miles' tools/convert_hf_to_torch_dist.py",
        "Write SAVE/release and SAVE/latest_checkpointed_iteration.txt from a Hugging Face release.",
        epilog="Every argument of Megatron is accepted. Those of MODEL_ARGS are held against config.json: what contradicts the weights' shapes\n"
        "is an error, anything else a warning. The MTP layer is kept, whether or not --mtp-num-layers is there; 0 leaves it out.\n"
        "Runs alone or as any number of torchrun's or srun's ranks, which share the work.",
    )
    made.add_argument("--hf-checkpoint", required=True, help="folder or Hub id of the release")
    made.add_argument("--save", required=True, help="folder to write")
    made.add_argument("--megatron-to-hf-mode", choices=["raw", "bridge"], default="raw", help="bridge: refused where it would order rows otherwise")
    accept(made, "--custom-model-provider-path", because=WHY)
    accept(made, "--allgather-cp", nargs=0, because=WHY)
    return made


def main(argv: list[str]) -> int:
    args, megatron = parser().parse_known_args(argv)
    flags = glmconv.read_flags(megatron)
    with glmconv.open_checkpoint(args.hf_checkpoint, strict=False) as checkpoint:
        found = glmconv.disagreements(checkpoint, flags)
        has_mtp, dialects = checkpoint.arch.sizes.get("mtp", 0), set(checkpoint.arch.spec.dialects.values())
    for one in found:
        note(f"{'error' if one.shape else 'warning'}: {one.line}")
    if any(one.shape for one in found):
        note("error: these arguments are another model's: Megatron could not load what they describe from these weights. Nothing is written.")
        return 2
    if args.megatron_to_hf_mode == "bridge" and len(dialects) > 1:
        return refuse("--megatron-to-hf-mode bridge: this architecture has several Megatron dialects, and which one is meant is not known.",
                      "Run glmconv convert with --megatron-dialect slime, mcore or bridge.")  # fmt: skip
    if flags.others:
        note(f"note: {len(flags.others)} arguments of Megatron are not needed: {WHY}")
    return run("convert", args.hf_checkpoint, args.save, "--to", "torch_dist", "--mtp", mtp(flags.args.get("mtp_num_layers"), has_mtp))


def mtp(said: object, has: int) -> str:
    """`keep` or `drop`, and a line on what became of the MTP layers."""
    if said == 0 and has:
        note("warning: --mtp-num-layers 0: the MTP layer is left out, and cannot be had back from the output")
        return "drop"
    if has and said is None:
        note(f"note: the MTP layer is kept, though --mtp-num-layers {has} is not given (slime would drop it); --mtp-num-layers 0 leaves it out")
    elif said != has and said is not None:
        note(f"warning: --mtp-num-layers {said}: the weights have {has}, which is what is written")
    return "keep"


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
