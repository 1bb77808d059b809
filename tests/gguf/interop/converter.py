"""Runs llama.cpp's convert_hf_to_gguf.py on several models, in a process of its own, with the gguf package that lies beside it.

`python converter.py LLAMA_CPP JOBS.json`; the jobs are lists of the converter's arguments. The converter knows a tokenizer's pre-tokenizer by a
hash of what it makes of a text, and refuses those that it does not know, as the tests' are: that one method answers "glm4" here, and is all that
is changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(llama: str, jobs: str) -> None:
    sys.path[:1] = [str(Path(llama) / "gguf-py"), llama]  # not this folder
    import conversion
    import convert_hf_to_gguf

    def glm4(model: object, tokenizer: object) -> str:
        return "glm4"

    conversion.ModelBase.get_vocab_base_pre = conversion.TextModel.get_vocab_base_pre = glm4
    for arguments in json.loads(Path(jobs).read_text(encoding="utf-8")):
        for kept in ("no_mtp", "mtp_only"):  # the converter leaves them in its classes
            for model in list(classes(conversion.ModelBase)):
                if kept in vars(model):
                    setattr(model, kept, False)
        sys.argv = ["convert_hf_to_gguf.py", *arguments]
        convert_hf_to_gguf.main()


def classes(of: type) -> list[type]:
    return [of, *(found for inner in of.__subclasses__() for found in classes(inner))]


if __name__ == "__main__":
    main(*sys.argv[1:])
