"""Shows llama.cpp a picture, in a process of its own: `python -m tests.gguf.sight MODEL MMPROJ < PNG` prints the likeliest next tokens."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

from tests.gguf.llama import MARK, ROOT, TOKENS

SAID = "the"  # in front of the picture


def png(pixels: np.ndarray) -> bytes:
    """[height, width, 3] uint8 as a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def next_tokens_on_seeing(model: Path, mmproj: Path, pixels: np.ndarray) -> dict[int, float]:
    """Token -> log probability of the likeliest answers to SAID and the picture, computed in float32 but for ggml's convolutions."""
    command = [sys.executable, "-m", "tests.gguf.sight", str(model), str(mmproj)]
    done = subprocess.run(command, cwd=ROOT, input=png(pixels), capture_output=True, timeout=120)
    said = [line.removeprefix(MARK) for line in done.stdout.decode().splitlines() if line.startswith(MARK)]
    assert said, (done.stdout + done.stderr).decode(errors="replace")[-3000:]
    return {int(token): value for token, value in json.loads(said[0]).items()}


def main(model: str, mmproj: str) -> None:
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.mmproj.path = model, mmproj
    wanted.warmup = False
    wanted.n_ctx = 256
    wanted.cpuparams.n_threads = 1
    wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    picture = "data:image/png;base64," + base64.b64encode(sys.stdin.buffer.read()).decode()
    content = [{"type": "text", "text": SAID}, {"type": "image_url", "image_url": {"url": picture}}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOKENS}
    answer = xllamacpp.Server(wanted).handle_chat_completions(asked)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    sys.stdout.write(MARK + json.dumps({entry["id"]: entry["logprob"] for entry in found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
