"""LoRA adapters merged while rows are read: as peft merges them, whatever is read at once, and refused by name where that is not what they are."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmconv import Options, convert, open_checkpoint, verify_same
from glmconv.errors import SourceError, UnsupportedError
from glmconv.toy.build import ToyOptions

SMALL = ToyOptions(layers=3, experts=4, scale=Fraction(1, 32))
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.experts.3.down_proj"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
State = dict[str, torch.Tensor]


@pytest.fixture
def source(toy) -> Path:
    return toy("glm4.5-355B-A32B", SMALL)


@pytest.fixture
def adapter(source, tmp_path):
    """`adapter(modules, **config)` saves an adapter with random factors for modules (name -> rank) beside further tensors."""

    def save(modules: dict[str, int], tensors: State | None = None, **config: object) -> Path:
        torch.manual_seed(0)
        state: State = dict(tensors or {})
        with open_checkpoint(source) as checkpoint:
            for module, rank in modules.items():
                rows, columns = checkpoint[f"{module}.weight"].shape
                state[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns)
                state[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.01
        folder = tmp_path / "adapter"
        folder.mkdir()
        save_file(state, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}))
        return folder

    return save


def by_hand(source: Path, folder: Path, module: str, scale: float) -> torch.Tensor:
    """W + scale * B @ A in float64, rounded to bfloat16."""
    state = load_file(folder / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    with open_checkpoint(source) as checkpoint:
        return (checkpoint[f"{module}.weight"].read().double() + scale * (b @ a)).float().bfloat16()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal, but for values that float32 puts on the other side of a rounding: few, and by one step."""
    steps = (ours.contiguous().view(torch.int16).int() - theirs.contiguous().view(torch.int16).int()).abs()
    return bool(steps.max() <= 1 and (steps > 0).float().mean() < 0.005)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 8 / 4),
        ({"use_rslora": True}, 8 / 2),
        ({"alpha_pattern": {"k_proj": 1, "self_attn.q_proj": 32}}, 32 / 4),
        ({"alpha_pattern": {f"^{Q}": 12}}, 12 / 4),
        ({"r": 16, "rank_pattern": {"layers.0.self_attn.q_proj": 4, "down_proj": 4}}, 8 / 4),
    ],
)
def test_a_weight_is_its_own_and_the_scaled_product(config, scale, adapter, source):
    folder = adapter({Q: 4, DOWN: 4}, **config)
    with open_checkpoint(source, lora=folder) as ours, open_checkpoint(source) as before:
        assert close(ours[f"{Q}.weight"].read(), by_hand(source, folder, Q, scale))
        for name, tensor in ours:
            same = torch.equal(tensor.read().view(torch.uint8), before[name].read().view(torch.uint8))
            assert same == (name not in (f"{Q}.weight", f"{DOWN}.weight")), name


def test_no_bit_depends_on_how_many_rows_are_read(adapter, source):
    with open_checkpoint(source, lora=adapter({Q: 4})) as ours:
        tensor = ours[f"{Q}.weight"]
        whole = tensor.read()
        parts = [tensor.read(slice(at, at + size)) for at, size in ((0, 1), (1, 30), (31, tensor.shape[0] - 31))]
        assert torch.equal(torch.cat(parts).view(torch.int16), whole.view(torch.int16))


def test_peft_merges_the_same(source, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)  # peft rounds products of experts too
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"], rank_pattern={"o_proj": 8, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 32}, modules_to_save=["lm_head"], use_rslora=True,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    state = adapted.merge_and_unload().state_dict()
    with open_checkpoint(source, lora=tmp_path / "adapter") as ours, open_checkpoint(source) as before:
        changed = 0
        for name, tensor in ours:
            if name in state and tensor.dtype.name == "bfloat16":
                assert close(tensor.read(), state[name].bfloat16()), name
                changed += not torch.equal(tensor.read(), before[name].read())
        assert changed > 8
        assert torch.equal(ours["model.layers.3.shared_head.head.weight"].read(), ours["lm_head.weight"].read())  # a copy of what was trained


def test_a_merged_checkpoint_is_written_read_back_and_known_by_its_adapter(adapter, source, tmp_path, glmconv):
    folder = adapter({Q: 4, DOWN: 4})
    answer = glmconv("convert", source, tmp_path / "hf", "--to", "hf", "--lora", folder, "--verify", "full")
    assert answer.code == 0, answer.err
    assert "2 weights are merged" in answer.err
    assert glmconv("verify", source, tmp_path / "hf").code == 1
    assert glmconv("verify", source, tmp_path / "hf", "--lora", folder).code == 0
    assert glmconv("verify", source, tmp_path / "hf", "--lora", folder, "--exact").code == 0
    convert(source, {"torch_dist": tmp_path / "mcore"}, options=Options(lora=str(folder)))
    assert verify_same(tmp_path / "mcore", tmp_path / "hf").same
    shutil.rmtree(tmp_path / "adapter")
    assert glmconv("convert", source, tmp_path / "hf", "--to", "hf", "--lora", adapter({Q: 4})).code == 4  # another adapter, another output


def test_a_quantized_base_is_merged_in_float32_and_rounded_once(adapter, source, tmp_path):
    convert(source, {"fp8:channel": tmp_path / "fp8"})
    folder = adapter({Q: 4})
    state = {name: tensor for shard in (tmp_path / "fp8").glob("*.safetensors") for name, tensor in load_file(shard).items()}
    factors = load_file(folder / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{Q}.lora_{side}.weight"].double() for side in "AB")
    base = (state[f"{Q}.weight"].float() * state[f"{Q}.weight_scale"]).double()
    with open_checkpoint(tmp_path / "fp8", lora=folder) as ours:
        assert close(ours[f"{Q}.weight"].read(), (base + 2 * (b @ a)).float().bfloat16())


def test_blocks_of_gguf_are_merged_in_float32_too(adapter, source, tmp_path):
    convert(source, {"gguf:Q8_0": tmp_path / "base.gguf"}, options=Options(embed_source=True))
    folder = adapter({Q: 4})
    factors = load_file(folder / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{Q}.lora_{side}.weight"].double() for side in "AB")
    with open_checkpoint(tmp_path / "base.gguf") as plain, open_checkpoint(tmp_path / "base.gguf", lora=folder) as ours:
        reader = plain[f"{Q}.weight"].reader.widened()
        base = torch.empty(*reader.shape)
        reader.read_into(0, memoryview(base.numpy()).cast("B"))
        assert close(ours[f"{Q}.weight"].read(), (base.double() + 2 * (b @ a)).float().bfloat16())


@pytest.mark.parametrize("modules", [{"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, {"target_modules": ["down_proj"]},
                                     {"target_modules": ["gate_proj", "up_proj", "down_proj"]}])  # fmt: skip
def test_peft_merges_the_same_into_experts_that_transformers_fuses(modules, source, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)  # peft rounds products of experts too
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **modules}))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    state = adapted.merge_and_unload().state_dict()
    experts = "model.layers.2.mlp.experts"
    changed = 0
    with open_checkpoint(source, lora=tmp_path / "adapter") as ours, open_checkpoint(source) as before:
        for n in range(4):
            halves = state[f"{experts}.gate_up_proj"][n].chunk(2)
            for part, theirs in (("gate", halves[0]), ("up", halves[1]), ("down", state[f"{experts}.down_proj"][n])):
                name = f"{experts}.{n}.{part}_proj.weight"
                assert close(ours[name].read(), theirs.bfloat16()), name
                changed += not torch.equal(ours[name].read(), before[name].read())
    assert changed == (4 if modules.get("target_modules") == ["down_proj"] else 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_trained_whole_replaces_the_tensor_in_its_dtype(dtype, adapter, source):
    norm = torch.linspace(-1, 1, 160).to(dtype)
    with open_checkpoint(source, lora=adapter({}, {"base_model.model.model.norm.weight": norm})) as ours:
        assert torch.equal(ours["model.norm.weight"].read(), norm.bfloat16())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "its base is not the release"),
        ({"alpha_pattern": {"layers.[0-9]+.q_proj": 1}}, "regular expression"),
    ],
)
def test_an_adapter_that_is_more_than_a_product_is_refused_by_name(config, said, adapter, source):
    with pytest.raises(UnsupportedError, match=said):
        open_checkpoint(source, lora=adapter({Q: 4}, **config))


@pytest.mark.parametrize(
    ("modules", "tensors", "config", "said"),
    [
        ({Q: 4}, {}, {"r": 8}, "has rank 4"),
        ({Q: 4}, {}, {"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({}, {f"base_model.model.{Q}.lora_A.weight": torch.zeros(4, 160)}, {}, "only one of"),
        ({}, {"base_model.model.model.layers.0.mixer.lora_A.weight": torch.zeros(4, 2),
              "base_model.model.model.layers.0.mixer.lora_B.weight": torch.zeros(2, 4)}, {}, "there is no model.layers.0.mixer.weight"),
        ({}, {f"base_model.model.{Q}.lora_A.weight": torch.zeros(4, 7),
              f"base_model.model.{Q}.lora_B.weight": torch.zeros(7, 4)}, {}, "the weight is"),
        ({}, {"base_model.model.model.norm.weight": torch.zeros(3)}, {}, "is \\[3\\]"),
        ({}, {"base_model.model.model.layers.2.mlp.experts.lora_A.weight": torch.zeros(4, 7),
              "base_model.model.model.layers.2.mlp.experts.lora_B.weight": torch.zeros(7, 4)}, {}, "not of 4 experts"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model_is_refused_by_name(modules, tensors, config, said, adapter, source):
    with pytest.raises(SourceError, match=said):
        open_checkpoint(source, lora=adapter(modules, tensors, **config))


def test_other_kinds_of_factors_and_pickles_are_refused(adapter, source):
    folder = adapter({}, {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 4)})
    with pytest.raises(UnsupportedError, match="lora_embedding_A"):
        open_checkpoint(source, lora=folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="pickled"):
        open_checkpoint(source, lora=folder)
