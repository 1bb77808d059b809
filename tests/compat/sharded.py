"""A model as AutoModel saves it on several ranks: torch's own writer, given each rank's parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

import glmconv

RANKS = 3


class RanksPlanner(DefaultSavePlanner):
    """Gives torch's writer one rank's part of each tensor, as DTensors would: the writer itself is real, the ranks are not."""

    def __init__(self, parts: dict[str, tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]]) -> None:
        super().__init__()
        self.parts = parts

    def plan(self) -> SavePlan:
        items = []
        for name, (at, whole, part) in self.parts.items():
            chunk = ChunkStorageMetadata(torch.Size(at), part.shape)
            data = TensorWriteData(chunk, TensorProperties(dtype=part.dtype), torch.Size(whole))
            items.append(WriteItem(MetadataIndex(name, torch.Size(at)), WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self.parts[write_item.index.fqn][2]


def parts_of(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> list[tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """One rank's part: columns of o_proj and down_proj (tensor parallelism), rows of the rest, unevenly (FSDP), small ones on the first rank only."""
    axis = 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0
    step = -(-tensor.shape[axis] // ranks) + (1 if axis == 0 and tensor.shape[0] > 8 else 0)
    if tensor.shape[axis] < ranks * 2:
        return [((0,) * tensor.dim(), tuple(tensor.shape), tensor)] if rank == 0 else []
    begin, end = min(rank * step, tensor.shape[axis]), min((rank + 1) * step, tensor.shape[axis])
    at = tuple(begin if n == axis else 0 for n in range(tensor.dim()))
    return [(at, tuple(tensor.shape), tensor.narrow(axis, begin, end - begin).contiguous())] if end > begin else []


def saved_in_shards(source: Path, there: Path) -> None:
    """The release `source` as three ranks save it into `there`, with AutoModel's `.hf_metadata`."""
    with glmconv.open_checkpoint(source) as checkpoint:
        whole = {name: tensor.read() for name, tensor in checkpoint}
    numbers = {name: 1 + n % 3 for n, name in enumerate(sorted(whole))}
    parts = [{name: part for name, tensor in whole.items() for part in parts_of(name, tensor, rank, RANKS)} for rank in range(RANKS)]
    planners = [RanksPlanner(mine) for mine in parts]
    writer = HuggingFaceStorageWriter(there, fqn_to_index_mapping=numbers, save_distributed=True)
    writer.set_up_storage_writer(True)
    there.mkdir(parents=True)
    plans = writer.prepare_global_plan([planner.plan() for planner in planners])
    for plan, planner in zip(plans, planners, strict=True):
        writer.write_data(plan, planner).wait()
    metadata = there / ".hf_metadata"
    metadata.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(source / name, metadata / name)
    (metadata / "fqn_to_file_index_mapping.json").write_text(json.dumps(numbers))
