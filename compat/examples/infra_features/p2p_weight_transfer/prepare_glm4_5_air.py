"""miles' prepare-glm4.5-air.sh: GLM-4.5-Air from the Hub, and as a Megatron torch_dist checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from dropin import Parser, finish, note, run

FOLDERS = {"MODEL_DIR": "/root/models", "CKPT_SAVE_DIR": "/root"}
DATA_DIR = "/root/datasets"
DATA_SETS = ("zhuzilin/dapo-math-17k", "zhuzilin/aime-2024")


def parser() -> Parser:
    made = Parser(
        "miles' prepare-glm4.5-air.sh",
        "Download zai-org/GLM-4.5-Air into MODEL_DIR/GLM-4.5-Air and write CKPT_SAVE_DIR/GLM-4.5-Air_torch_dist.",
        epilog=f"Environment: {', '.join(f'{name} (default {folder})' for name, folder in FOLDERS.items())}. One process converts, without Ray; the\n"
        "same command again goes on where it stopped. Data sets are not downloaded: the lines that do it are printed.",
    )
    made.add_argument("--download-only", action="store_true", help="leave the conversion out, for nodes that do not train")
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    for name in DATA_SETS:
        note(f"note: a data set is left to you: hf download --repo-type dataset {name} --local-dir {DATA_DIR}/{name.rpartition('/')[2]}")
    folders = [word for name, default in FOLDERS.items() for word in ("--set", f"{name}={os.environ.get(name) or default}")]
    return run("run", Path(__file__).with_name("prepare-glm4.5-air.yaml"), *folders, *(("--only", "download") if args.download_only else ()))


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
