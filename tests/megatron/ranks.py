"""What each of two processes does with Megatron-Core: save a model at every parallel layout, load checkpoints into it, run it.

`python -m tests.megatron.ranks FOLDER RANK`: FOLDER/work.json names the cases, FOLDER/work.pt holds their tensors; the ranks leave
FOLDER/found.RANK.json, case -> what is wrong (empty when nothing is), and rank 0 FOLDER/logits.NAME.pt.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
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
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.megatron.model import EXPERTS, FFN, GROUPS, HEAD_DIM, HEADS, HIDDEN, MOE_FFN, TOP_K, VOCAB, Shape, tokens  # noqa: E402

LAYOUTS: dict[str, dict[str, int]] = {
    "tp1": {},  # two replicas
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "ep2": {"expert_model_parallel_size": 2},
    "tp2_ep2": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
}
PADDING = -7.0  # what a saved checkpoint's rows behind the vocabulary hold


def config_of(shape: Shape, layout: dict[str, int]) -> TransformerConfig:
    dtype = getattr(torch, shape.dtype)
    return TransformerConfig(
        num_layers=shape.layers, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=HEAD_DIM,
        num_moe_experts=EXPERTS, moe_ffn_hidden_size=MOE_FFN, moe_shared_expert_intermediate_size=MOE_FFN * shape.shared, moe_grouped_gemm=True,
        moe_layer_freq=[int(layer >= shape.dense) for layer in range(shape.layers)], moe_router_topk=TOP_K, moe_router_topk_scaling_factor=2.5,
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_pre_softmax=True, moe_router_dtype="fp32",
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="allgather", mtp_num_layers=1, normalization="RMSNorm",
        layernorm_epsilon=1e-5, gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False, add_qkv_bias=True,
        qk_layernorm=shape.qk_norm, hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False, bias_activation_fusion=False,
        apply_rope_fusion=False, gradient_accumulation_fusion=False, use_cpu_initialization=True, perform_initialization=False, params_dtype=dtype,
        pipeline_dtype=dtype, bf16=shape.dtype == "bfloat16", **layout,
    )  # fmt: skip


def build(shape: Shape, layout: dict[str, int]) -> GPTModel:
    """This rank's part of the model, every weight NaN: what a load leaves out stays seen."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**layout, distributed_timeout_minutes=1)
    config = config_of(shape, layout)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    multiple = 128 * layout.get("tensor_model_parallel_size", 1)
    model = GPTModel(
        config, block, vocab_size=-(-VOCAB // multiple) * multiple, max_sequence_length=128, pre_process=first, post_process=last, rotary_percent=0.5,
        rotary_base=10000, position_embedding_type="rope", share_embeddings_and_output_weights=False,
        mtp_block_spec=get_gpt_mtp_block_spec(config, block, use_transformer_engine=True),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for tensor in weights(model).values():
            tensor.fill_(float("nan"))
    return model


def weights(model: GPTModel) -> dict[str, Tensor]:
    """What a checkpoint must hold: parameters and the routers' biases, without `_extra_state`."""
    return {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and not key.endswith("_extra_state")}


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


def save(folder: Path, shape: Shape, layout: dict[str, int], tensors: dict[str, Tensor]) -> list[str]:
    """Leave Megatron-Core's own checkpoint of `tensors` in `folder`, with what a training run keeps beside them."""
    model = build(shape, layout)
    with torch.no_grad():
        for _, mine, wanted in pieces(model, tensors, PADDING):
            mine.copy_(wanted)
    state = {"checkpoint_version": 3.0, "iteration": 37, "num_floating_point_operations_so_far": 0, "args": arguments(shape, layout)}
    iteration = folder / "iter_0000037"
    if torch.distributed.get_rank() == 0:
        iteration.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state | sharded_state(model, CONTENT), str(iteration), content_metadata=CONTENT)
    (folder / "latest_checkpointed_iteration.txt").write_text("37")
    return [f"{key} is still empty" for key, tensor in weights(model).items() if bool(tensor.isnan().any())]


def arguments(shape: Shape, layout: dict[str, int]) -> argparse.Namespace:
    """As Megatron-LM's `args`: what describes the model, and among it classes that no reader should need to know."""
    config = config_of(shape, layout)
    padded = 128 * config.tensor_model_parallel_size
    return argparse.Namespace(
        **{name: getattr(config, name) for name in ARGUMENTS.split()}, num_experts=EXPERTS, group_query_attention=True, norm_epsilon=1e-5,
        swiglu=True, position_embedding_type="rope", rotary_base=10000, rotary_percent=0.5, rotary_interleaved=False,
        untie_embeddings_and_output_weights=True, max_position_embeddings=128, vocab_size=VOCAB, padded_vocab_size=-(-VOCAB // padded) * padded,
        make_vocab_size_divisible_by=128, multi_latent_attention=False, q_lora_rank=None,
        attention_backend=AttnBackend.auto, save=Path("/somewhere"), finetune=False,
    )  # fmt: skip


ARGUMENTS = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels moe_ffn_hidden_size moe_shared_expert_intermediate_size
    moe_layer_freq moe_router_topk moe_router_topk_scaling_factor moe_router_score_function moe_router_enable_expert_bias moe_router_pre_softmax
    moe_grouped_gemm mtp_num_layers normalization layernorm_epsilon add_bias_linear add_qkv_bias qk_layernorm params_dtype bf16
    tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
"""
CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def loaded(folder: Path, shape: Shape, layout: dict[str, int]) -> tuple[GPTModel, list[str]]:
    """The model, strictly loaded from `folder` as a training run does it, and the keys on which the two disagree."""
    model = build(shape, layout)
    wanted = sharded_state(model, dist_checkpointing.load_content_metadata(str(folder)))
    state, surplus, absent = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RETURN_ALL)
    model.load_state_dict({key: value for key, value in state.items() if key in model.state_dict()}, strict=True)
    older = "self_attention.core_attention._extra_state"  # Megatron-Core up to 0.14 asks for it in every layer, 0.16 only in MTP layers
    return model, [f"{key} is not in the file" for key in absent] + [f"{key} is not asked for" for key in surplus if older not in key]


def load(folder: Path, shape: Shape, layout: dict[str, int], tensors: dict[str, Tensor]) -> list[str]:
    """Load `folder` and compare every parameter of this rank with `tensors`, bit by bit."""
    model, problems = loaded(folder, shape, layout)
    found = list(pieces(model, tensors, 0.0))
    compared, all_there = sum(mine.numel() for _, mine, _ in found), sum(tensor.numel() for tensor in weights(model).values())
    if compared != all_there:
        problems.append(f"{compared} of {all_there} numbers were compared")
    return problems + [f"{key} differs" for key, mine, wanted in found if not same(mine, wanted)]


def logits(folder: Path, shape: Shape, out: Path) -> list[str]:
    """Run the model loaded from `folder` on the tests' tokens; leaves {"mtp", "main"}: [tokens, vocab] in `out`."""
    model, problems = loaded(folder, shape, {})
    heard: list[Tensor] = []  # the output layer is called for the MTP layer first, then for the model
    model.output_layer.register_forward_hook(lambda module, given, answer: heard.append(answer[0][:, 0, :VOCAB].clone()))
    ids = tokens()
    with torch.no_grad():
        model(ids, torch.arange(ids.shape[1])[None], None, labels=ids)
    if torch.distributed.get_rank() == 0:
        torch.save(dict(zip(("mtp", "main"), heard, strict=True)), out)
    return problems


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    work = json.loads((folder / "work.json").read_text())
    shapes = {name: Shape(**fields) for name, fields in work["shapes"].items()}
    tensors = torch.load(folder / "work.pt", weights_only=True)
    found: dict[str, list[str]] = {}
    for case in work["cases"]:
        shape, path = shapes[case["shape"]], Path(case["path"])
        do: dict[str, Callable[[], list[str]]] = {
            "save": lambda: save(path, shape, LAYOUTS[case["layout"]], tensors[shape.name]),  # noqa: B023
            "load": lambda: load(path, shape, LAYOUTS[case["layout"]], tensors[case.get("expect", shape.name)]),  # noqa: B023
            "logits": lambda: logits(path, shape, folder / f"logits.{shape.name}.pt"),  # noqa: B023
        }
        try:
            found[case["name"]] = do[case["do"]]()
        except BaseException:  # torch's CheckpointException is no Exception
            found[case["name"]] = [traceback.format_exc()]
            break  # the other rank may wait for this one in a case of its own: end, so that it ends too
        finally:
            (folder / f"found.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
