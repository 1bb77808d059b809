"""What each of two processes does with Megatron-Core: save a model at every parallel layout, load checkpoints into it, run it.

`python -m tests.megatron.ranks FOLDER RANK`: FOLDER/work.json names the cases, FOLDER/work.pt holds their tensors; the ranks leave
FOLDER/found.RANK.json, case -> what is wrong (empty when nothing is), and rank 0 FOLDER/logits.NAME.pt.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.megatron import stand_in

stand_in.install()

import torch  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.megatron.network import Layout, build, config_of, weights  # noqa: E402
from tests.megatron.release import VOCAB, Shape, tokens  # noqa: E402
from tests.megatron.shapes import unpacked  # noqa: E402

LAYOUTS: dict[str, Layout] = {
    "tp1": {},  # two replicas
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2_ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
}
PADDING = -7.0  # what a saved checkpoint's rows behind the vocabulary hold


def sharded_state(model: GPTModel, content: dict[str, Any]) -> Any:
    """The model's `sharded_state_dict` as a training run asks for it; `content` is a checkpoint's content_metadata."""
    return model.sharded_state_dict(metadata=content | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)})


def pieces(model: GPTModel, expected: dict[str, Tensor], padding: float) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(key, this rank's piece, what it should be): Megatron-Core says where each of its tensors lies in the global one.

    `padding` is expected in the rows behind the vocabulary.
    """
    sharded: Any = sharded_state(model, CONTENT)
    apply_factories(sharded)
    for piece in nested_values(sharded):
        if isinstance(piece, ShardedObject):
            continue
        whole = expected[piece.key]
        if piece.allow_shape_mismatch:
            whole = torch.cat([whole, whole.new_full((piece.global_shape[0] - whole.shape[0], *whole.shape[1:]), padding)])
        if not isinstance(piece, ShardedTensor) or tuple(whole.shape) != tuple(piece.global_shape):
            raise AssertionError(f"{piece!r} is no tensor of shape {tuple(whole.shape)}")
        yield piece.key, piece.data, whole[piece.global_slice()]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def filled(shape: Shape, layout: Layout, tensors: dict[str, Tensor]) -> GPTModel:
    model = build(shape, layout)
    with torch.no_grad():
        for _, mine, wanted in pieces(model, tensors, PADDING):
            mine.copy_(wanted)
    return model


def save(folder: Path, shape: Shape, layout: Layout, tensors: dict[str, Tensor], content: dict[str, Any]) -> list[str]:
    """Leave Megatron-Core's own checkpoint of `tensors` in `folder`, with what a training run keeps beside them."""
    model = filled(shape, layout, tensors)
    state = {"checkpoint_version": 3.0, "iteration": 37, "num_floating_point_operations_so_far": 0, "args": arguments(shape, layout)}
    iteration = folder / "iter_0000037"
    if torch.distributed.get_rank() == 0:
        iteration.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state | sharded_state(model, content), str(iteration), content_metadata=content)
    (folder / "latest_checkpointed_iteration.txt").write_text("37")
    return [f"{key} is still empty" for key, tensor in weights(model).items() if bool(tensor.isnan().any())]


def arguments(shape: Shape, layout: Layout) -> argparse.Namespace:
    """As Megatron-LM's `args`: what describes the model, and among it classes that no reader should need to know."""
    config = config_of(shape, layout)
    padded = 128 * config.tensor_model_parallel_size
    latent = config.multi_latent_attention
    names = ARGUMENTS.split() + (LATENT_ARGUMENTS.split() if latent else [])
    return argparse.Namespace(
        **{name: getattr(config, name) for name in names} | ({} if latent else {"q_lora_rank": None}), num_experts=config.num_moe_experts,
        group_query_attention=not latent, norm_epsilon=config.layernorm_epsilon, swiglu=True, position_embedding_type="rope", rotary_base=10000,
        rotary_percent=shape.config().get("partial_rotary_factor", 1.0), untie_embeddings_and_output_weights=True, max_position_embeddings=128,
        vocab_size=VOCAB, padded_vocab_size=-(-VOCAB // padded) * padded, make_vocab_size_divisible_by=128,
        attention_backend=AttnBackend.auto, save=Path("/somewhere"), finetune=False,
    )  # fmt: skip


def other_arguments(folder: Path, shape: Shape) -> list[str]:
    """What a checkpoint's args tell otherwise than a run of this model, of all that both tell. Its vocabulary may be padded less."""
    told, run = (vars(args) for args in (torch.load(folder / "common.pt", weights_only=False)["args"], arguments(shape, {})))
    both = told.keys() & run.keys() - {"padded_vocab_size"}
    return [f"args.{name} is {told[name]!r}, not {run[name]!r}" for name in sorted(both) if told[name] != run[name]]


ARGUMENTS = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels moe_ffn_hidden_size moe_shared_expert_intermediate_size
    moe_layer_freq moe_router_topk moe_router_topk_scaling_factor moe_router_score_function moe_router_enable_expert_bias moe_router_pre_softmax
    moe_grouped_gemm mtp_num_layers normalization layernorm_epsilon add_bias_linear add_qkv_bias qk_layernorm params_dtype bf16 rotary_interleaved
    multi_latent_attention experimental_attention_variant dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk
    tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
"""
LATENT_ARGUMENTS = "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type rotary_scaling_factor mscale mscale_all_dim"
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
PER_LAYER = CONTENT | {"non_homogeneous_layers": True}


def loaded(folder: Path, shape: Shape, layout: Layout) -> tuple[GPTModel, list[str]]:
    """The model, strictly loaded from `folder` as a training run does it, and the keys on which the two disagree."""
    model = build(shape, layout)
    wanted = sharded_state(model, dist_checkpointing.load_content_metadata(str(folder)))
    state, surplus, absent = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RETURN_ALL)
    model.load_state_dict({key: value for key, value in state.items() if key in model.state_dict()}, strict=True)
    older = "self_attention.core_attention._extra_state"  # Megatron-Core up to 0.14 asks for it in every layer, 0.16 only in MTP layers
    return model, [f"{key} is not in the file" for key in absent] + [f"{key} is not asked for" for key in surplus if older not in key]


def load(folder: Path, shape: Shape, layout: Layout, tensors: dict[str, Tensor], padding: float) -> list[str]:
    """Load `folder` and compare every parameter of this rank with `tensors`, bit by bit."""
    model, problems = loaded(folder, shape, layout)
    found = list(pieces(model, tensors, padding))
    compared, all_there = sum(mine.numel() for _, mine, _ in found), sum(tensor.numel() for tensor in weights(model).values())
    if compared != all_there:
        problems.append(f"{compared} of {all_there} numbers were compared")
    return problems + [f"{key} differs" for key, mine, wanted in found if not same(mine, wanted)]


def logits(model: GPTModel, shape: Shape, out: Path) -> None:
    """Run the model on the tests' tokens; leaves {"main", "mtp"}: [tokens, vocab] in `out`."""
    heard: list[Tensor] = []  # the output layer is called for the MTP layer first, then for the model
    model.output_layer.register_forward_hook(lambda module, given, answer: heard.append(answer[0][:, 0, :VOCAB].clone()))
    ids = tokens()
    with torch.no_grad():
        model(ids, torch.arange(ids.shape[1])[None], None, labels=ids)
    if torch.distributed.get_rank() == 0:
        torch.save(dict(zip(["mtp"] * shape.mtp + ["main"], heard, strict=True)), out)


def done(case: dict[str, str], shape: Shape, tensors: dict[str, Tensor], out: Path) -> list[str]:
    """Do one case; returns what is wrong."""
    layout, path = LAYOUTS[case["layout"]], Path(case["path"])
    match case["do"]:
        case "save":
            return save(path, shape, layout, tensors, CONTENT)
        case "save per layer":
            return save(path, shape, layout, tensors, PER_LAYER)
        case "load":
            return load(path, shape, layout, tensors, 0.0) + other_arguments(path, shape)
        case "load back":  # what Megatron-Core saved
            return load(path, shape, layout, tensors, PADDING)
        case "run":  # what a checkpoint holds
            model, problems = loaded(path, shape, layout)
            logits(model, shape, out)
            return problems
        case "fill":  # run what the key map says
            logits(filled(shape, layout, tensors), shape, out)
            return []
    raise AssertionError(case)


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    work = json.loads((folder / "work.json").read_text())
    tensors = torch.load(folder / "work.pt", weights_only=True)
    found: dict[str, list[str]] = {}
    for case in work["cases"]:
        name = case["name"]
        try:
            found[name] = done(case, unpacked(work["shapes"][case["shape"]]), tensors[case["expect"]], folder / f"logits.{name}.pt")
        except BaseException:  # torch's CheckpointException is no Exception
            found[name] = [traceback.format_exc()]
            break  # the other rank may wait for this one in a case of its own: end, so that it ends too
        finally:
            (folder / f"found.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
