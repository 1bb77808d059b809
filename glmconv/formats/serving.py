"""At which parallel sizes a quantized checkpoint can be served: what each rank's share of a weight must divide by, and what it weighs.

Sources: vLLM's validate_fp8_block_shape and SGLang's validate_block_quant_shapes (every part of a merged matrix, even at TP 1), the group
checks of compressed-tensors' and AWQ's loaders; docs/quantization.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from glmconv.archs import Model, TensorSpec
from glmconv.archs.spec import Role
from glmconv.codecs.codec import Grid

SIZES = (1, 2, 4, 8, 16)
QUANTIZED = (Role.LINEAR, Role.EXPERT)


@dataclass(frozen=True)
class Parallel:
    """Tensor-parallel ranks, and expert-parallel ones: above 1, routed experts are dealt out whole."""

    tensor: int = 1
    expert: int = 1

    def splits(self, tensor: TensorSpec) -> int:
        """Into how many shares a linear weight is cut."""
        return 1 if tensor.role is Role.EXPERT and self.expert > 1 else self.tensor


@dataclass(frozen=True)
class Serving:
    """The answer for one size: `problem` is empty if it can be served; `bytes_per_rank` are those of the weights alone."""

    parallel: Parallel
    problem: str
    bytes_per_rank: int


def share(tensor: TensorSpec, model: Model, parallel: Parallel) -> tuple[int, int]:
    """Rows (of each fused part) and columns of one rank's share of a linear weight; 0 where they cannot be split evenly."""
    rows, columns = tensor.shape[0] // tensor.row.stacked, tensor.shape[1]
    ranks = parallel.splits(tensor)
    if tensor.row.parallel == "row":
        return rows, columns // ranks if columns % ranks == 0 else 0
    if tensor.row.parallel == "none":
        return rows, columns
    if tensor.row.parallel == "kv":
        ranks = min(ranks, rows // model.sizes["head_dim"])
    return (rows // ranks if rows % ranks == 0 else 0), columns


def problem(tensor: TensorSpec, model: Model, grid: Grid, parallel: Parallel) -> str:
    """Why no serving engine loads this weight so encoded at this size; empty if they do."""
    if tensor.row.parallel == "none":
        return ""
    rows, columns = share(tensor, model, parallel)
    ranks = parallel.splits(tensor)
    split = f" / {ranks}" if ranks > 1 else ""
    if tensor.row.parallel == "row":
        if columns == 0:
            return f"{tensor.shape[1]:,} columns cannot be split among {ranks}"
        if columns % grid.columns:
            return f"{tensor.shape[1]:,} columns{split} are no multiple of {grid.columns}"
        return ""
    whole = f"{tensor.shape[0] // tensor.row.stacked:,} rows"
    if rows == 0:
        return f"{whole} cannot be split among {ranks}"
    if rows % grid.rows:
        return f"{whole}{split} are no multiple of {grid.rows}"
    return f"{columns:,} columns are no multiple of {grid.columns}" if columns % grid.columns else ""


def serving(model: Model, sizes: Mapping[str, int], grid_of: Callable[[str], Grid | None], expert: int, at: Sequence[int] = SIZES) -> list[Serving]:
    """One answer for each tensor-parallel size. `sizes`: stored bytes of each canonical tensor; `grid_of`: None where one is not encoded."""
    found = []
    for ranks in at:
        parallel = Parallel(ranks, expert)
        heads = model.sizes["heads"]
        first, total = f"{heads} attention heads cannot be split among {ranks}" if heads % ranks else "", 0
        for name, size in sizes.items():
            tensor = model.tensors[name]
            grid = grid_of(name)
            if not first and tensor.role in QUANTIZED and (why := problem(tensor, model, grid or Grid(), parallel)):
                first = f"{name}: {why}"
            total += size // _copies(tensor, parallel)
        found.append(Serving(parallel, first, total))
    return found


def _copies(tensor: TensorSpec, parallel: Parallel) -> int:
    """By how many a tensor's bytes are divided over the ranks."""
    if tensor.role is Role.EXPERT:
        return max(parallel.tensor, parallel.expert)
    whole = tensor.role not in (Role.LINEAR, Role.EMBEDDING) and not tensor.name.endswith("lm_head.weight")
    return 1 if whole or tensor.row.parallel == "none" else parallel.tensor


def described(answers: Sequence[Serving]) -> str:
    """One line: the sizes that work, why the first other does not, and the memory of the largest that does."""
    fine = [answer for answer in answers if not answer.problem]
    wrong = next((answer for answer in answers if answer.problem), None)
    sizes = ", ".join(str(answer.parallel.tensor) for answer in fine)
    experts = f" with EP {answers[0].parallel.expert}" if answers and answers[0].parallel.expert > 1 else ""
    text = f"can be served at TP {sizes}{experts}" if fine else f"can be served at no TP of {', '.join(str(a.parallel.tensor) for a in answers)}"
    if fine:
        last = fine[-1]
        size = last.bytes_per_rank
        weight = f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
        text += f" ({weight} of weights per GPU at TP {last.parallel.tensor})"
    return text + (f"; not at TP {wrong.parallel.tensor}: {wrong.problem}" if wrong else "")
