"""Reading an output back against its source, right after it was written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from glmconv.check.compare import Loss
from glmconv.check.verify import verify_same
from glmconv.errors import VerificationError

SAMPLE = 16  # one tensor in so many is read back by --verify sample


def read_back(
    src: str | Path, outputs: Sequence[Path], *, sample: bool, mtp: bool, origin: str | None, workers: int, dialect: str = "auto",
    mtp_from: str | None = None, mmproj: str | None = None, lora: str | None = None, strict: bool = True,
    started: Callable[[int], None] | None = None, progress: Callable[[int], None] | None = None, stop: threading.Event | None = None,
) -> dict[str, object]:  # fmt: skip
    """Compare each output with the source; counts of what was compared. VerificationError names the worst tensor."""
    tensors = elements = 0
    losses: list[Loss] = []
    for output in outputs:
        result = verify_same(
            src, output, workers=workers, every=SAMPLE if sample else 1, started=started, progress=progress, stop=stop, origin=origin, mtp=mtp,
            dialect=dialect, mtp_from=mtp_from, mmproj=mmproj, lora=lora, strict=strict,
        )  # fmt: skip
        if not result.same:
            first = result.worst[0]
            raise VerificationError(
                f"{first.what}; {len(result.differences):,} tensors differ from the source.", file=output, tensor=first.tensor,
                hint="Do not use this output; `glmconv verify` lists all. Is the disk or the memory faulty?",
            )  # fmt: skip
        tensors += result.tensors
        elements += result.elements
        losses += result.losses
    worst = max(losses, key=lambda loss: loss.rmse, default=None)
    return {"tensors": tensors, "elements": elements, "quantized": len(losses), "rmse": worst.rmse if worst else 0.0}
