"""The vision tower's file: byte for byte the real converter's, run by llama.cpp to transformers' numbers, read back to the source's bits."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from glmconv import convert, open_checkpoint
from glmconv.archs import SPECS, bind, spec_for
from glmconv.codecs.ggml import TYPES, decode
from glmconv.dtypes import BY_NAME, DType
from glmconv.engine.inputs import InputFolder
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.format import row_size
from glmconv.formats.gguf_header import GgufHeader, read_header
from glmconv.formats.gguf_mmproj import PROJECTORS, mmproj_tensors, refuse_unknown
from glmconv.formats.gguf_mmproj_source import image_settings_of, model_type_of, vision_config, vision_readers
from glmconv.formats.gguf_rows import Frame, Framed
from glmconv.toy.build import ToyOptions, toy_checkpoint
from tests.gguf.mmproj_vectors import MADE, TOY, VECTORS, described
from tests.gguf.sight import SAID, next_tokens_on_seeing
from tests.loading import loaded

SEEING = ("glm4.5v-108B-A12B", "glm5.3-flash-321B")
SMALL = ToyOptions(layers=4, experts=16, scale=Fraction(1, 16))
# llama.cpp is less exact in glm5-next's attention: without what that adds they agree within 3e-6
CLOSE = {"glm4.5v-108B-A12B": 5e-5, "glm5.3-flash-321B": 2e-3}
TARGET = {"auto": "gguf:mmproj", "f32": "gguf:mmproj-F32", "f16": "gguf:MMPROJ-f16", "bf16": "gguf:mmproj-bf16", "q8_0": "gguf:mmproj-Q8_0"}


def header(path: Path) -> GgufHeader:
    return read_header(InputFolder(path.parent).open(path.name))


@pytest.mark.parametrize(("preset", "out_type"), [(preset, out_type) for preset, types in MADE.items() for out_type in types])
def test_the_file_is_the_one_of_llama_cpps_converter_byte_for_byte(preset, out_type, toy, tmp_path):
    convert(toy(preset, TOY), {TARGET[out_type]: tmp_path / "mmproj.gguf"})
    wanted = json.loads((VECTORS / f"{preset}.json").read_bytes())[out_type]
    found = described(tmp_path / "mmproj.gguf")
    assert base64.b64decode(found["header"]) == base64.b64decode(wanted["header"])
    assert found["tensors"] == wanted["tensors"]


def patches(pixels: np.ndarray, source: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture as transformers' processor gives it to the tower, four neighbours after each other, and its grid."""
    settings = json.loads((source / "preprocessor_config.json").read_bytes())
    mean, std = (np.array(settings[field], np.float32) for field in ("image_mean", "image_std"))
    planes = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)
    rows, columns = pixels.shape[0] // 14, pixels.shape[1] // 14
    cut = np.stack([planes, planes]).reshape(1, 2, 3, rows // 2, 2, 14, columns // 2, 2, 14)
    flat = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(rows * columns, -1)
    return torch.from_numpy(np.ascontiguousarray(flat)), torch.tensor([[1, rows, columns]])


def log_probabilities(source: Path, pixels: np.ndarray) -> torch.Tensor:
    """transformers' answer to SAID and the picture, with the inputs of convolutions rounded to float16 as ggml does."""
    from transformers import AutoTokenizer

    model = loaded(source, dtype=torch.float32).eval()
    for convolution in (model.model.visual.patch_embed.proj, model.model.visual.downsample):
        convolution.register_forward_pre_hook(lambda _, given: (given[0].half().float(),))
    flat, grid = patches(pixels, source)
    picture = "<|image|>" * (int(grid.prod()) // 4)
    text = f"[gMASK]<sop><|user|>\n{SAID}<|begin_of_image|>{picture}<|end_of_image|><|assistant|>\n"
    ids = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    kinds = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        answer = model(input_ids=ids, pixel_values=flat, image_grid_thw=grid, mm_token_type_ids=kinds, use_cache=False).logits[0, -1]
    return torch.log_softmax(answer.double(), -1)


@pytest.mark.parametrize("preset", SEEING)
def test_llama_cpp_sees_a_picture_as_transformers_does(preset, toy, tmp_path):
    pytest.importorskip("xllamacpp")
    convert(toy(preset, SMALL), {"gguf:F32": tmp_path / "model.gguf", "gguf:mmproj-F32": tmp_path / "mmproj.gguf"})
    pixels = np.random.default_rng(0).integers(0, 256, (112, 140, 3), dtype=np.uint8)  # not the tower's own size: positions between its positions
    wanted = log_probabilities(toy(preset, SMALL), pixels)
    found = next_tokens_on_seeing(tmp_path / "model.gguf", tmp_path / "mmproj.gguf", pixels)
    assert max(abs(wanted[token].item() - value) for token, value in found.items()) < CLOSE[preset]
    other = next_tokens_on_seeing(tmp_path / "model.gguf", tmp_path / "mmproj.gguf", pixels[::-1].copy())
    assert max(abs(wanted[token].item() - value) for token, value in other.items()) > 20 * CLOSE[preset]  # so it looks at it


@dataclass(frozen=True)
class Decoded:
    """A tensor of a GGUF file as rows of bfloat16."""

    content: np.ndarray
    shape: tuple[int, ...]
    dtype: DType = BY_NAME["bfloat16"]
    place: tuple[int, int] = (0, 0)

    def read_into(self, start: int, out: memoryview) -> None:
        size = row_size(self.shape, self.dtype)
        out[:] = self.content.reshape(-1).view(np.uint8).data[start * size : start * size + len(out)]


def canonical(model, path):
    """The readers of a file's tensors by canonical name; values that are bfloat16's already lose nothing."""
    found, content = header(path), path.read_bytes()

    def rows(name, shape):
        tensor = found.tensors[name]
        wide = decode(TYPES[tensor.type.name], content[tensor.offset : tensor.offset + tensor.size], tensor.ne[0])
        return Decoded((np.ascontiguousarray(wide).view(np.uint32) >> 16).astype(np.uint16), shape)

    return vision_readers(model, found, rows, path)


@pytest.mark.parametrize("preset", SEEING)
def test_every_tensor_of_the_tower_comes_back_as_it_was(preset, toy, tmp_path):
    convert(toy(preset, TOY), {"gguf:mmproj": tmp_path / "mmproj.gguf"})
    with open_checkpoint(toy(preset, TOY)) as source:
        readers = canonical(source.arch, tmp_path / "mmproj.gguf")
        assert set(readers) == {name for name in source.tensors if ".visual." in name}
        for name, reader in readers.items():
            assert reader.shape == source[name].shape
            count = reader.shape[0] - 1  # all but the first row
            found, wanted = (bytearray(count * source[name].row_size) for _ in range(2))
            reader.read_into(1, memoryview(found))
            source[name].read_into(1, memoryview(wanted))
            assert found == wanted, name


@pytest.mark.parametrize("preset", SEEING)
def test_the_file_says_what_decides_the_towers_shapes_and_how_pictures_are_prepared(preset, toy, tmp_path):
    convert(toy(preset, TOY), {"gguf:mmproj": tmp_path / "mmproj.gguf"})
    found = header(tmp_path / "mmproj.gguf")
    config = json.loads((toy(preset, TOY) / "config.json").read_bytes())
    assert model_type_of(found, "x") == config["model_type"]
    said = vision_config(found, "x")
    assert said.items() <= config["vision_config"].items()
    again = bind(spec_for(config), config | {"vision_config": said})
    assert again.sizes == bind(spec_for(config), config).sizes
    settings = json.loads((toy(preset, TOY) / "preprocessor_config.json").read_bytes())
    for field, value in image_settings_of(found, "x").items():
        assert np.allclose(value, settings[field], rtol=1e-7, atol=0), field


def test_a_language_models_file_is_no_tower(toy, tmp_path):
    convert(toy("glm4.5v-108B-A12B", TOY), {"gguf:Q8_0": tmp_path / "model.gguf"})
    with pytest.raises(SourceError, match="is no mmproj file"):
        vision_config(header(tmp_path / "model.gguf"), "x")


def test_another_models_file_is_not_read_as_this_ones(toy, tmp_path):
    convert(toy("glm4.5v-108B-A12B", TOY), {"gguf:mmproj": tmp_path / "mmproj.gguf"})
    config = json.loads((toy("glm4.5v-108B-A12B", TOY) / "config.json").read_bytes())
    for changes, problem in (({"depth": 3}, "blk.2.*: is missing"), ({"depth": 1}, "no tensor of this model's tower"),
                             ({"image_size": 168}, r"position_embd.*is \[32, 36\], \[32, 144\] is needed")):  # fmt: skip
        model = bind(spec_for(config), config | {"vision_config": config["vision_config"] | changes})
        with pytest.raises(SourceError, match=problem):
            canonical(model, tmp_path / "mmproj.gguf")


@pytest.mark.parametrize("model_type", PROJECTORS)
def test_the_table_gives_every_part_of_the_tower_one_place(model_type):
    spec = SPECS[model_type]
    model = bind(spec, spec.presets[0].config)
    found = mmproj_tensors(model)
    assert len({tensor.name for tensor in found}) == len(found)
    places = [(run.tensor, run.first, tensor.frame) for tensor in found for run in tensor.runs]
    embedding = "model.visual.patch_embed.proj.weight"
    tower = [name for name in model.tensors if ".visual." in name]
    assert sorted(places) == sorted([(name, 0, 0) for name in tower] + [(embedding, 0, 1)])
    assert sum(int(np.prod(tensor.ne)) for tensor in found) == sum(model.tensors[name].elements for name in tower)


def test_a_convolutions_frames_are_cut_out_and_put_together_again():
    whole = np.random.default_rng(1).integers(0, 2**16, (700, 3, 2, 14, 14), np.uint16)  # more than is held at a time
    rows = Decoded(whole, whole.shape)
    frames = tuple(Frame(rows, number) for number in range(2))
    for number, frame in enumerate(frames):
        found = np.empty((650, 3, 14, 14), np.uint16)
        frame.read_into(50, found.reshape(-1).view(np.uint8).data)
        assert np.array_equal(found, whole[50:, :, number])
    back = np.empty((650, *whole.shape[1:]), np.uint16)
    Framed(frames).read_into(50, back.reshape(-1).view(np.uint8).data)
    assert np.array_equal(back, whole[50:])


def test_every_source_gives_the_same_file(toy, tmp_path):
    source = toy("glm4.5v-108B-A12B", TOY)
    name = source.name  # which is in the file
    convert(source, {"torch_dist": tmp_path / "torch_dist" / name, "fp8:channel": tmp_path / "fp8" / name, "gguf:mmproj": tmp_path / "mmproj.gguf"})
    for other in ("torch_dist", "fp8"):
        convert(tmp_path / other / name, {"gguf:mmproj": tmp_path / f"{other}.gguf"})
    assert (tmp_path / "torch_dist.gguf").read_bytes() == (tmp_path / "mmproj.gguf").read_bytes()
    first, second = described(tmp_path / "mmproj.gguf"), described(tmp_path / "fp8.gguf")
    assert first["tensors"] == second["tensors"]  # in another order: that of the files they are in
    assert header(tmp_path / "mmproj.gguf").kv == header(tmp_path / "fp8.gguf").kv


def edited(source: Path, path: Path, name: str, **fields: object) -> Path:
    """A copy with fields of one of its JSON files changed, or taken away where they are None; no fields: without that file."""
    shutil.copytree(source, path)
    if not fields:
        (path / name).unlink()
        return path
    content = json.loads((path / name).read_bytes()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps({field: value for field, value in (content | fields).items() if value is not None}))
    return path


def test_how_images_are_prepared_is_taken_from_where_the_release_says_it(toy, glmconv, tmp_path):
    source = toy("glm4.5v-108B-A12B", TOY)
    gone = edited(source, tmp_path / "gone", "preprocessor_config.json")
    answer = glmconv("convert", gone, tmp_path / "gone.gguf", "--to", "gguf:mmproj")
    assert answer.code == 0
    assert "llama-mtmd-cli -m MODEL.gguf --mmproj" in answer.err
    assert "image_mean and image_std are those of transformers' processor" in answer.err
    mean = header(tmp_path / "gone.gguf").kv["clip.vision.image_mean"]
    assert mean.value.values == [np.float32(value) for value in (0.48145466, 0.4578275, 0.40821073)]
    newer = edited(source, tmp_path / "newer", "processor_config.json", image_processor={"image_mean": [0.25, 0.5, 1]})
    assert "transformers' processor" not in glmconv("convert", newer, tmp_path / "newer.gguf", "--to", "gguf:mmproj").err
    assert header(tmp_path / "newer.gguf").kv["clip.vision.image_mean"].value.values == [0.25, 0.5, 1.0]
    for number, wrong in enumerate(([1, 2], "0.5", [1, 2, "x"], [1, 2, 1e99])):
        broken = edited(source, tmp_path / f"broken{number}", "preprocessor_config.json", image_std=wrong)
        answer = glmconv("convert", broken, tmp_path / "x.gguf", "--to", "gguf:mmproj")
        assert answer.code == 5
        assert "preprocessor_config.json: image_std is" in answer.err


def test_what_llama_cpp_would_not_run_as_it_is_meant_is_refused(toy, glmconv, tmp_path):
    source = toy("glm4.5v-108B-A12B", TOY)
    vision = json.loads((source / "config.json").read_bytes())["vision_config"]
    relu = edited(source, tmp_path / "relu", "config.json", vision_config=vision | {"hidden_act": "relu"})
    answer = glmconv("plan", relu, "--to", "gguf:mmproj")
    assert answer.code == 6
    assert "hidden_act relu" in answer.err
    answer = glmconv("plan", toy("glm4-9B-0414", TOY), "--to", "gguf:mmproj")
    assert answer.code == 6
    assert "has no vision tower" in answer.err
    opened = toy_checkpoint("glm4.5v-108B-A12B", TOY).opened
    for field in ("temporal_patch_size", "spatial_merge_size", "in_channels"):
        config = {**opened.config, "vision_config": vision | {field: 4}}
        with pytest.raises(UnsupportedError, match=f"{field} 4; llama.cpp runs towers with"):
            refuse_unknown(replace(opened, model=bind(spec_for(config), config)))
    towerless = {name: rows for name, rows in opened.tensors.items() if ".visual." not in name}
    with pytest.raises(SourceError, match=r"patch_embed\.proj\.weight: is missing, one of 27 tensors of the vision tower"):
        refuse_unknown(replace(opened, tensors=towerless))
    answer = glmconv("plan", source, "--to", "gguf:mmproj-Q4_K_M")
    assert answer.code == 2
    assert "mmproj-F32, mmproj-F16, mmproj-BF16, mmproj-Q8_0" in answer.err


def test_one_run_writes_both_files_and_both_are_checked(toy, glmconv, tmp_path):
    source, text, tower = toy("glm4.5v-108B-A12B", TOY), tmp_path / "a.gguf", tmp_path / "b.gguf"
    answer = glmconv("convert", source, "--to", f"gguf:Q8_0={text}", "--to", f"gguf:mmproj={tower}")
    assert answer.code == 0
    assert "the vision tower: 14 BF16, 14 F32" in answer.err
    assert "--to gguf:mmproj writes them" in answer.err
    assert not any(name.startswith(("v.", "mm.")) for name in header(text).tensors)
    assert glmconv("verify", tower).code == glmconv("verify", source, tower, "--exact").code == 0
    content = bytearray(tower.read_bytes())
    content[-200] ^= 1
    tower.write_bytes(content)
    assert glmconv("verify", tower).code == glmconv("verify", source, tower, "--exact").code == 1


def test_a_float32_tower_becomes_float16_unless_said_otherwise(toy, tmp_path):
    from safetensors.torch import load_file, save_file

    source = edited(toy("glm4.5v-108B-A12B", TOY), tmp_path / "wide", "config.json", dtype="float32")
    text = json.loads((source / "config.json").read_bytes())["text_config"]
    source = edited(source, tmp_path / "wider", "config.json", text_config=text | {"dtype": "float32"})
    for file in source.glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    convert(source, {"gguf:mmproj": tmp_path / "mmproj.gguf"})
    found = header(tmp_path / "mmproj.gguf")
    assert found.kv["general.file_type"].value == 1
    assert {found.tensors[name].type.name for name in ("v.patch_embd.weight.1", "mm.patch_merger.weight", "v.blk.0.attn_qkv.weight")} == {"F16"}
    assert found.tensors["v.position_embd.weight"].type.name == "F32"


def test_the_plan_lists_the_towers_tensors_with_types_and_reasons(toy, glmconv):
    answer = glmconv("plan", toy("glm4.5v-108B-A12B", TOY), "--to", "gguf:mmproj-Q8_0", "--json")
    listed = {each["name"]: (each["type"], each["why"]) for each in json.loads(answer.out)["targets"][0]["tensors"]}
    assert len(listed) == 28
    assert listed["v.patch_embd.weight.1"] == ("F32", "convolution")
    assert listed["v.blk.0.ln1.weight"] == ("F32", "kept")
    assert listed["v.blk.0.attn_qkv.weight"] == ("Q8_0", "base")
    assert listed["mm.down.weight"] == ("F16", "fallback from Q8_0")
