"""What a toy that sees has beside its weights: the tokens of images, and how a picture becomes the tower's input."""

from __future__ import annotations

import json
from collections.abc import Mapping

TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>")
# A token's field in config.json
FIELDS = dict(zip(TOKENS, ("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id", "image_token_id",
                           "video_token_id"), strict=True))  # fmt: skip
# By the tower's model_type. Source: the classes of these names in transformers, whose own values they are but for the sizes.
PROCESSORS: Mapping[str, Mapping[str, object]] = {
    "glm4v_moe_vision": {
        "image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor", "size": {"shortest_edge": 12544, "longest_edge": 9633792},
    },
    "glm5_next_vision": {
        "image_processor_type": "Glm5NextImageProcessor", "processor_class": "Glm5NextProcessor", "min_image_tokens": 16, "max_image_tokens": 8000,
        "patch_expand_factor": 1,
    },
}  # fmt: skip
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
FROM_TOWER = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size"}


def preprocessor(vision: Mapping[str, object]) -> bytes:
    """preprocessor_config.json for a tower with this vision_config."""
    fields = {"do_rescale": True, **CLIP, **{field: vision[source] for field, source in FROM_TOWER.items()}}
    return (json.dumps(fields | dict(PROCESSORS[str(vision["model_type"])]), indent=2) + "\n").encode()
