"""What must hold for every architecture: the same files after a round trip, the same bytes however it was done, damage found, bad input refused."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from glmconv import Options, convert, open_checkpoint, verify
from glmconv.archs import field_of, preset_named
from glmconv.convert import plan
from glmconv.errors import Interrupted
from tests.conftest import EACH, IN_MEGATRON, ONE_OF_EACH
from tests.loading import loaded, logits
from tests.roundtrip.shards import INDEX, Stored, Surgery, contents, copied, home, load, reindexed, release

TARGETS = [(name, "torch_dist") for name in IN_MEGATRON] + [(name, "hf") for name in ONE_OF_EACH] + [(name, "fp8:8x8") for name in ONE_OF_EACH]


@pytest.fixture(scope="module")
def there(toy, tmp_path_factory):
    """`there(preset, target)`: the toy's conversion, made once. Nobody writes into it."""
    root = tmp_path_factory.mktemp("there")

    def make(preset, target):
        path = root / preset / target.replace(":", "-")
        if not path.exists():
            convert(toy(preset, EACH), {target: path})
        return path

    return make


@pytest.mark.parametrize("preset", IN_MEGATRON)
def test_every_file_comes_back_from_megatron_byte_for_byte(preset, toy, there, tmp_path):
    source = toy(preset, EACH)
    assert len(list(source.glob("*.safetensors"))) > 1
    convert(there(preset, "torch_dist"), {"hf": tmp_path / "back"})
    assert release(tmp_path / "back") == release(source)
    assert verify(source, there(preset, "torch_dist")).same


@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_transformers_loads_a_toy_whole_and_gives_the_same_logits_after_a_round_trip(preset, toy, there, tmp_path):
    source = toy(preset, EACH)
    way = "torch_dist" if preset in IN_MEGATRON else "hf"
    convert(there(preset, way), {"hf": tmp_path / "back"})
    before, after = logits(source), logits(tmp_path / "back")
    assert before.isfinite().all()
    assert before.std() > 1e-3
    assert not torch.equal(before[0], before[1])
    assert torch.equal(before, after)


@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_a_fine_tune_that_transformers_saved_is_converted(preset, toy, tmp_path):
    loaded(toy(preset, EACH), dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    way = "torch_dist" if preset in IN_MEGATRON else "hf"
    convert(tmp_path / "saved", {way: tmp_path / "there", "fp8:channel": tmp_path / "quantized"})
    convert(tmp_path / "there", {"hf": tmp_path / "back"})
    assert verify(tmp_path / "saved", tmp_path / "quantized").same
    assert torch.equal(logits(tmp_path / "saved"), logits(tmp_path / "back"))
    assert torch.equal(logits(tmp_path / "saved"), logits(toy(preset, EACH)))


@pytest.mark.parametrize(("preset", "target"), TARGETS)
def test_the_bytes_do_not_depend_on_workers_or_on_interruptions(preset, target, toy, there, tmp_path):
    source, wanted = toy(preset, EACH), contents(there(preset, target))
    size = sum(entry["bytes"] for entry in plan(source, [target]).targets)
    for number, part in enumerate((0.2, 0.7)):
        stop, written = threading.Event(), []

        def progress(done, stop=stop, written=written, part=part):
            written.append(done)
            if sum(written) > part * size:
                stop.set()

        with pytest.raises(Interrupted):
            convert(source, {target: tmp_path / str(number)}, options=Options(workers=1), progress=progress, stop=stop)
        assert not (tmp_path / str(number) / "glmconv_manifest.json").exists()
        convert(source, {target: tmp_path / str(number)}, options=Options(workers=1 + 3 * number))
        assert contents(tmp_path / str(number)) == wanted


@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_one_flipped_bit_of_any_kind_of_tensor_is_found(preset, toy, tmp_path):
    changed = copied(toy(preset, EACH), tmp_path / "changed")
    with open_checkpoint(changed) as source:
        kinds = {(tensor.row.name, tensor.scope.title): name for name, tensor in source.arch.tensors.items() if not tensor.alias}
    for name in kinds.values():
        work = Surgery.at(changed, name)
        data = work.tensors[name].data
        work.tensors[name].data = data[:-1] + bytes([data[-1] ^ 1])
        work.close()
    result = verify(toy(preset, EACH), changed)
    copies = {"embed_tokens.weight", "head.weight"}  # of the MTP layer: different from what they repeat, if that changed
    found = {d.tensor for d in result.differences}
    assert set(kinds.values()) <= found
    assert all(name.endswith(tuple(copies)) for name in found - set(kinds.values()))


def first_norm(source):
    return next(name for name in source.arch.tensors if name.endswith("layers.1.input_layernorm.weight"))


@pytest.mark.parametrize("preset", ONE_OF_EACH)
@pytest.mark.parametrize("fault", ["missing", "unknown", "reshaped", "retyped", "field"])
def test_bad_input_is_refused_by_name_and_nothing_is_written(preset, fault, toy, glmconv, tmp_path):
    changed = copied(toy(preset, EACH), tmp_path / "changed")
    with open_checkpoint(changed) as source:
        name, spec = first_norm(source), source.arch.spec
    work = Surgery.at(changed, name)
    says = name
    if fault == "missing":
        del work.tensors[name]
    elif fault == "unknown":
        says = "model.layers.0.self_attn.what.weight"
        work.tensors[says] = Stored("BF16", [2], bytes(4))
    elif fault == "reshaped":
        work.tensors[name].shape.append(1)
    elif fault == "retyped":
        work.tensors[name] = Stored("I32", work.tensors[name].shape, work.tensors[name].data * 2)
    work.close()
    reindexed(changed)
    if fault == "field":
        config = json.loads((changed / "config.json").read_bytes())
        (config[spec.text] if spec.text else config).pop("num_attention_heads")
        (changed / "config.json").write_text(json.dumps(config))
        says = "num_attention_heads is missing"
    answer = glmconv("convert", changed, tmp_path / "out", "--to", "fp8:channel")
    assert (answer.code, len(answer.errors)) == (5, 1)
    assert says in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", sorted(set(ONE_OF_EACH) - set(IN_MEGATRON)))
def test_an_architecture_that_no_trainer_has_is_exit_6(preset, toy, glmconv, tmp_path):
    answer = glmconv("convert", toy(preset, EACH), tmp_path / "out", "--to", "torch_dist")
    assert answer.code == 6
    assert "no trainer" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", [name for name in ONE_OF_EACH if preset_named(name)[1].mtp_tensors])
def test_mtp_layers_can_be_dropped_lost_and_taken_from_a_base(preset, toy, glmconv, tmp_path):
    source = toy(preset, EACH)
    spec, _ = preset_named(preset)
    assert glmconv("convert", source, tmp_path / "dropped", "--to", "hf", "--mtp", "drop", "-q").code == 0
    config = json.loads((tmp_path / "dropped" / "config.json").read_bytes())
    assert field_of(config, spec.mtp_field) == 0
    lost = copied(tmp_path / "dropped", tmp_path / "lost")  # as a fine-tune that transformers saved: the number stays
    (lost / "config.json").write_bytes((source / "config.json").read_bytes())
    answer = glmconv("convert", lost, tmp_path / "said", "--to", "hf")
    assert answer.code == 0
    assert f"config.json asks for {spec.mtp_field} 1" in answer.err
    assert release(tmp_path / "said") == release(tmp_path / "dropped")
    for base in (lost, tmp_path / "dropped"):
        out = tmp_path / f"grafted from {base.name}"
        assert glmconv("convert", base, out, "--to", "hf", "--mtp-from", source, "--verify", "full", "-q").code == 0
        assert verify(source, out).same
        assert glmconv("verify", base, out, "--mtp-from", source).code == 0
        assert glmconv("verify", base, out).code == 1
    assert glmconv("convert", lost, tmp_path / "no", "--to", "hf", "--mtp-from", tmp_path / "dropped").code == 5
    assert glmconv("convert", source, tmp_path / "no", "--to", "hf", "--mtp-from", source).code == 2
    assert glmconv("convert", lost, tmp_path / "no", "--to", "hf", "--mtp-from", source, "--mtp", "drop").code == 2
    assert not (tmp_path / "no").exists()


def test_half_an_mtp_layer_is_an_error(toy, glmconv, tmp_path):
    changed = copied(toy("glm4.5-355B-A32B", EACH), tmp_path / "changed")
    for name in [name for name in json.loads((changed / INDEX).read_bytes())["weight_map"] if "layers.4.mlp" in name]:
        file = home(changed, name)
        tensors = load_file(file)
        assert name in tensors
        work = Surgery(file, {key: stored for key, stored in load(file).items() if key != name})
        work.close()
    reindexed(changed)
    answer = glmconv("convert", changed, tmp_path / "out", "--to", "hf")
    assert answer.code == 5
    assert "--mtp drop" in answer.err


def test_mtp_layers_of_another_model_are_refused(toy, glmconv, tmp_path):
    convert(toy("glm4.5-355B-A32B", EACH), {"hf": tmp_path / "lost"}, options=Options(mtp=False))
    for base, says in (("glm4.7-flash-30B-A3B", "glm4_moe_lite"), ("glm4.5-106B-A12B", "needs")):
        answer = glmconv("convert", tmp_path / "lost", tmp_path / "out", "--to", "hf", "--mtp-from", toy(base, EACH))
        assert answer.code == 5
        assert says in answer.err
        assert not (tmp_path / "out").exists()
