"""GGUF files of every architecture: llama.cpp runs them to transformers' numbers, the gguf package reads what the source holds."""

from __future__ import annotations

import json
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from glmconv import Options, convert, open_checkpoint
from glmconv.codecs.ggml import TYPES, decode
from glmconv.convert import plan
from glmconv.engine.inputs import InputFolder
from glmconv.errors import Interrupted
from glmconv.formats.gguf_header import read_header
from glmconv.toy.build import ToyOptions
from tests.conftest import EACH, ONE_OF_EACH
from tests.gguf.llama import TOKENS, next_tokens
from tests.loading import loaded
from tests.roundtrip.shards import contents

gguf = pytest.importorskip("gguf")

SMALL = ToyOptions(layers=4, experts=16, scale=Fraction(1, 16))
WIDE = ToyOptions(layers=2, experts=2, scale=Fraction(1, 8))  # rows of whole super-blocks of 256
PROMPT = [5, 70, 99, 260, 33, 12, 300, 41]
# llama.cpp is less exact in glm5-next's attention: without what that adds they agree within 3e-6
CLOSE = {"glm5.3-flash-321B": 2e-3}
GOLDEN = Path(__file__).parents[1] / "vectors/gguf_header"
DESCRIPTIVE = ("general.name", "general.size_label", "general.basename", "general.version", "general.finetune", "general.file_type")


def header(path):
    return read_header(InputFolder(path.parent).open(path.name))


def data(path, name):
    """A tensor's values by our own decoder, [rows, columns]."""
    tensor = header(path).tensors[name]
    raw = path.read_bytes()[tensor.offset : tensor.offset + tensor.size]
    return decode(TYPES[tensor.type.name], raw, tensor.ne[0])


@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_llama_cpp_gives_the_logits_of_transformers(preset, toy, tmp_path):
    pytest.importorskip("xllamacpp")
    convert(toy(preset, SMALL), {"gguf:F32": tmp_path / "model.gguf"})
    with torch.no_grad():
        answer = loaded(toy(preset, SMALL), dtype=torch.float32).eval()(torch.tensor([PROMPT]), use_cache=False).logits[0, -1]
    wanted = torch.log_softmax(answer.double(), -1)
    found = next_tokens(tmp_path / "model.gguf", PROMPT)
    assert len(found) == TOKENS
    assert max(found, key=found.__getitem__) == wanted.argmax().item()
    assert max(abs(wanted[token].item() - value) for token, value in found.items()) < CLOSE.get(preset, 1e-4)


@pytest.mark.parametrize("file_type", ["BF16", "Q8_0", "Q4_K_M", "IQ4_XS", "IQ3_M"])
def test_llama_cpp_runs_quantized_files(file_type, toy, tmp_path):
    pytest.importorskip("xllamacpp")
    convert(toy("glm4.7-flash-30B-A3B", SMALL), {f"gguf:{file_type}": tmp_path / "model.gguf"})
    assert len(next_tokens(tmp_path / "model.gguf", PROMPT)) == TOKENS


@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_the_gguf_package_reads_every_tensor_as_the_source_holds_it(preset, toy, tmp_path):
    convert(toy(preset, EACH), {"gguf:BF16": tmp_path / "model.gguf"})
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    with open_checkpoint(toy(preset, EACH)) as source:

        def values(name):
            return source[name].read().float().numpy()

        prefix = source.arch.spec.scopes[0].rows[0].name.removesuffix("embed_tokens.weight")
        layer = f"{prefix}layers.3."
        pairs = {"token_embd.weight": values(f"{prefix}embed_tokens.weight"), "output_norm.weight": values(f"{prefix}norm.weight"),
                 "output.weight": values("lm_head.weight"), "blk.3.attn_norm.weight": values(f"{layer}input_layernorm.weight")}  # fmt: skip
        s = source.arch.sizes
        if "experts" in s:
            pairs["blk.3.ffn_up_exps.weight"] = np.stack([values(f"{layer}mlp.experts.{e}.up_proj.weight") for e in range(s["experts"])])
            pairs["blk.3.ffn_gate_inp.weight"] = values(f"{layer}mlp.gate.weight")
            pairs["blk.3.exp_probs_b.bias"] = values(f"{layer}mlp.gate.e_score_correction_bias")
        if "kv_rank" in s:
            split = values(f"{layer}self_attn.kv_b_proj.weight").reshape(s["heads"], s["nope"] + s["v_dim"], s["kv_rank"])
            pairs["blk.3.attn_k_b.weight"] = split[:, : s["nope"]].transpose(0, 2, 1)
            pairs["blk.3.attn_v_b.weight"] = split[:, s["nope"] :]
        if "linear_heads" in s:
            pairs["blk.0.ssm_a"] = -np.exp(values(f"{prefix}layers.0.self_attn.A_log"))
        for name, wanted in pairs.items():
            tensor = read.pop(name)
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert found.reshape(wanted.shape).tobytes() == wanted.astype(np.float32).tobytes(), name
    assert len(read) > 20


@pytest.mark.parametrize("model", ["glm4_moe", "glm_moe_dsa"])
def test_the_header_is_llama_quantizes_own(model, tmp_path):
    folder = GOLDEN / model
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).write_bytes((folder / name).read_bytes())
    zeros(source, json.loads((folder / "hf_tensors.json").read_bytes()))
    convert(source, {"gguf:Q4_K_M": tmp_path / "model.gguf"})
    golden, found = json.loads((folder / "quantize-Q4_K_M.json").read_bytes()), header(tmp_path / "model.gguf")
    assert [[name, tensor.type.name, list(tensor.ne)] for name, tensor in found.tensors.items()] == golden["tensors"]
    keys = [row[0] for row in golden["kv"]]
    assert [key for key in found.kv if key not in DESCRIPTIVE] == [key for key in keys if key not in DESCRIPTIVE]


def zeros(folder, listed):
    """Files of zeros with these tensors: (file, name, dtype, shape)."""
    from safetensors.torch import save_file

    kinds = {"BF16": torch.bfloat16, "F32": torch.float32}
    files: dict[str, dict[str, torch.Tensor]] = {}
    for file, name, dtype, shape in listed:
        files.setdefault(file, {})[name] = torch.zeros(shape, dtype=kinds[dtype])
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    if len(files) > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_mix_has_the_types_of_its_table_and_small_errors(toy, tmp_path):
    convert(toy("glm4.7-flash-30B-A3B", WIDE), {"gguf:Q4_K_M": tmp_path / "model.gguf"})
    types = {name: tensor.type.name for name, tensor in header(tmp_path / "model.gguf").tensors.items()}
    assert (types["output.weight"], types["blk.0.ffn_up.weight"], types["blk.0.attn_norm.weight"]) == ("Q6_K", "Q4_K", "F32")
    with open_checkpoint(toy("glm4.7-flash-30B-A3B", WIDE)) as source:
        for name, canonical, bound in (("output.weight", "lm_head.weight", 0.03), ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight", 0.1)):
            wanted = source[canonical].read().float().numpy()
            off = data(tmp_path / "model.gguf", name) - wanted
            assert np.sqrt((off**2).mean() / (wanted**2).mean()) < bound


def test_an_fp8_source_goes_through_bf16_as_in_llama_cpp(toy, tmp_path):
    source = toy("glm4.5-355B-A32B", EACH)
    convert(source, {"fp8:channel": tmp_path / "fp8"})
    convert(tmp_path / "fp8", {"hf": tmp_path / "plain", "gguf:Q8_0": tmp_path / "a.gguf"})
    convert(tmp_path / "plain", {"gguf:Q8_0": tmp_path / "b.gguf"})
    first, second = header(tmp_path / "a.gguf"), header(tmp_path / "b.gguf")
    assert list(first.tensors) == list(second.tensors)
    a, b = (tmp_path / "a.gguf").read_bytes(), (tmp_path / "b.gguf").read_bytes()
    assert a[first.data_start :] == b[second.data_start :]


@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_the_bytes_do_not_depend_on_workers_or_on_interruptions(preset, toy, tmp_path):
    source, target = toy(preset, EACH), "gguf:Q4_0"
    convert(source, {target: tmp_path / "whole" / "model.gguf"})
    size, stop, written = plan(source, [target]).bytes_written, threading.Event(), []

    def progress(done):
        written.append(done)
        if sum(written) > size // 2:
            stop.set()

    with pytest.raises(Interrupted):
        convert(source, {target: tmp_path / "again" / "model.gguf"}, options=Options(workers=1), progress=progress, stop=stop)
    assert not (tmp_path / "again" / "model.gguf").exists()
    convert(source, {target: tmp_path / "again" / "model.gguf"}, options=Options(workers=4))
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_the_command_line_writes_checks_and_guards_a_file(toy, glmconv, tmp_path):
    source, out = toy("glm4-9B-0414", EACH), tmp_path / "GLM-Q5_K_M.gguf"
    answer = glmconv("convert", source, out, "--to", "gguf:q5_k_m")
    assert answer.code == 0
    assert f"{out}: gguf:Q5_K_M" in answer.out
    assert "bits per weight" in answer.err
    assert glmconv("convert", source, out, "--to", "gguf:Q5_K_M").out.count("nothing was written") == 1
    assert glmconv("verify", out).code == glmconv("verify", source, out, "--exact").code == 0
    assert glmconv("verify", source, out).code == glmconv("inspect", out).code == 0
    content = bytearray(out.read_bytes())
    content[-100] ^= 1
    out.write_bytes(content)
    assert glmconv("verify", out).code == glmconv("verify", source, out, "--exact").code == 1
    (tmp_path / "mine.gguf").write_bytes(b"mine")
    assert glmconv("convert", source, tmp_path / "mine.gguf", "--to", "gguf:F16").code == 4
    assert (tmp_path / "mine.gguf").read_bytes() == b"mine"
    assert glmconv("convert", source, tmp_path / "folder", "--to", "gguf:F16").code == 2
    for unknown in ("gguf", "gguf:Q9_9", "gguf:Q4_K_M:x"):
        answer = glmconv("convert", source, tmp_path / "x.gguf", "--to", unknown)
        assert answer.code == 2
        assert "Q4_K_M" in answer.err
    answer = glmconv("convert", toy("glm4.7-flash-30B-A3B", WIDE), tmp_path / "x.gguf", "--to", "gguf:IQ2_XXS")
    assert answer.code == 6
    assert "importance matrix" in answer.err
    assert not (tmp_path / "x.gguf").exists()


def test_nan_is_refused_before_it_hides_in_a_block(toy, glmconv, tmp_path):
    from tests.roundtrip.shards import Surgery, copied

    changed = copied(toy("glm4-9B-0414", EACH), tmp_path / "changed")
    name = "model.layers.1.self_attn.o_proj.weight"
    work = Surgery.at(changed, name)
    work.tensors[name].data = b"\xc0\x7f" + work.tensors[name].data[2:]
    work.close()
    answer = glmconv("convert", changed, tmp_path / "x.gguf", "--to", "gguf:Q8_0")
    assert answer.code == 5
    assert f"{name}: is NaN or Inf in row 0, column 0" in answer.err
    assert not (tmp_path / "x.gguf").exists()
