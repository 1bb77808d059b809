"""Made checkpoints: a preset's tensors, names and files, with fewer layers and narrower, and random weights of realistic scale."""

from __future__ import annotations

from glmconv.toy.build import build

__all__ = ["build"]
