"""glmconv: GLM checkpoints between Hugging Face, Megatron torch_dist, FP8, AWQ and GGUF, on CPUs, streaming, resumable, exact.

The same verbs as on the command line, as functions: `open_checkpoint`, `plan`, `convert`, `verify`, `run_pipeline` ... Importing this package is
quick; what a verb needs is imported when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glmconv.check.launch import disagreements
    from glmconv.check.verify import verify, verify_output, verify_same
    from glmconv.checkpoint import Checkpoint, LazyTensor, open_checkpoint
    from glmconv.cli.pipelines import load_pipeline
    from glmconv.convert import Options, convert, plan
    from glmconv.errors import GlmconvError
    from glmconv.fleet.doctor import doctor
    from glmconv.fleet.pipeline import Pipeline
    from glmconv.fleet.serving import preset_serving_plan, serving_plan
    from glmconv.fleet.steps import run_pipeline, survey
    from glmconv.fleet.sync import sync
    from glmconv.formats.megatron_flags import megatron_flags, read_flags

VERBS = {
    "Checkpoint": "glmconv.checkpoint", "LazyTensor": "glmconv.checkpoint", "open_checkpoint": "glmconv.checkpoint",
    "Options": "glmconv.convert", "convert": "glmconv.convert", "plan": "glmconv.convert", "verify": "glmconv.check.verify",
    "Pipeline": "glmconv.fleet.pipeline", "load_pipeline": "glmconv.cli.pipelines", "run_pipeline": "glmconv.fleet.steps",
    "survey": "glmconv.fleet.steps", "doctor": "glmconv.fleet.doctor", "preset_serving_plan": "glmconv.fleet.serving",
    "serving_plan": "glmconv.fleet.serving", "sync": "glmconv.fleet.sync",
    "verify_output": "glmconv.check.verify", "verify_same": "glmconv.check.verify", "GlmconvError": "glmconv.errors",
    "disagreements": "glmconv.check.launch", "megatron_flags": "glmconv.formats.megatron_flags", "read_flags": "glmconv.formats.megatron_flags",
}  # fmt: skip
__all__ = [
    "Checkpoint", "GlmconvError", "LazyTensor", "Options", "Pipeline", "convert", "disagreements", "doctor", "load_pipeline", "megatron_flags",
    "open_checkpoint", "plan", "preset_serving_plan", "read_flags", "run_pipeline", "serving_plan", "survey", "sync", "verify", "verify_output",
    "verify_same",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in VERBS:
        return getattr(import_module(VERBS[name]), name)
    raise AttributeError(f"module 'glmconv' has no attribute {name!r}")


class _Package(ModuleType):
    """Importing a submodule makes it an attribute of its package, which would hide the verb `convert` behind the module `convert`."""

    def __setattr__(self, name: str, value: object) -> None:
        hidden = isinstance(value, ModuleType) and VERBS.get(name) == value.__name__
        super().__setattr__(name, getattr(value, name) if hidden else value)


sys.modules[__name__].__class__ = _Package
