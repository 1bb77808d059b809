"""Runs llama.cpp on a GGUF file in a process of its own: `python -m tests.gguf.llama FILE TOKENS` prints the likeliest next tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "next tokens: "
TOKENS = 40


def next_tokens(path: Path, prompt: Sequence[int]) -> dict[int, float]:
    """Token -> log probability of the likeliest after the prompt, computed in float32."""
    command = [sys.executable, "-m", "tests.gguf.llama", str(path), json.dumps(list(prompt))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert said, (done.stdout + done.stderr)[-3000:]
    return {int(token): value for token, value in json.loads(said[0]).items()}


def main(path: str, prompt: str) -> None:
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = path
    wanted.warmup = False
    wanted.n_ctx = 256
    wanted.cpuparams.n_threads = 1
    wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(wanted)
    answer = server.handle_completions({"prompt": json.loads(prompt), "max_tokens": 1, "temperature": 0, "n_probs": TOKENS, "logprobs": TOKENS})
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    sys.stdout.write(MARK + json.dumps({entry["id"]: entry["logprob"] for entry in found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
