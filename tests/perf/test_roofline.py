"""Costs of a step, against figures worked out by hand for Qwen2.5-32B and against models that are really built."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.bench.synthetic import AWQ, LLAMA3, QWEN2, synthetic_config
from nybble.core.errors import ConfigError
from nybble.layers.linear import Linear
from nybble.models.checkpoint import TINY, Checkpoint
from nybble.models.load import load_model
from nybble.perf.machines import Machine, find_machine
from nybble.perf.memory_model import plan_memory
from nybble.perf.model_shape import ModelShape, read_checkpoint, read_model
from nybble.perf.roofline import Roofline, by_kind
from nybble.perf.step_cost import KINDS, Work, parts_of

HALF = torch.float16
H200 = replace(
    find_machine("H200"), read_bytes_per_second=4.63e12, flops_per_second=788e12, is_measured=True
)  # as measured


@pytest.fixture(scope="module")
def qwen() -> ModelShape:
    return ModelShape.read(synthetic_config("qwen2.5-32b-awq"))


def small(common: dict[str, Any], **changes: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 128,
    }
    return common | sizes | changes


def test_weights_of_qwen_32b(qwen: ModelShape) -> None:
    """Per layer K × N: qkv 5120 × 7168, o 5120 × 5120, gate_up 5120 × 55296, down 27648 × 5120."""
    assert qwen.num_quantized_weights == 64 * 487_587_840
    assert qwen.num_weights - qwen.num_quantized_weights == 5120 * 152064
    layers = sum(linear.num_bytes(2) * count for linear, count in qwen.linears)
    biases = 64 * 7168 * 2
    assert layers - biases == 64 * 487_587_840 * (64 + 2 + 0.5) / 128  # codes, a scale and half a byte a group of 128
    assert qwen.kv_bytes_per_token(2) == 262_144


def test_an_output_layer_of_4_bits_counts(qwen: ModelShape) -> None:
    """It is dequantized in each step, but not written as 16 bits in prefill, where only last tokens go through it."""
    head = replace(qwen.lm_head, group_size=128)
    shape = replace(qwen, lm_head=head)
    assert shape.num_quantized_weights == shape.num_weights == qwen.num_weights
    assert shape.num_quantized_layer_weights == qwen.num_quantized_weights


def test_floor_of_qwen_32b_on_an_h200(qwen: ModelShape) -> None:
    """16.2 GB of layers and 1.56 of the output layer at 4.63 TB/s: 3.84 ms, and a little for a short context."""
    roofline = Roofline(qwen, H200, HALF)
    assert roofline.seconds(Work.decode(1, 1)) * 1e3 == pytest.approx(3.84, abs=0.02)
    assert roofline.crossover_batch() == 49
    by_batch = [roofline.decode_tok_s(batch, 1024) for batch in (4, 8, 16, 32, 64)]
    assert by_batch == sorted(by_batch)
    assert roofline.decode_tok_s(128, 1024) < 1.03 * roofline.decode_tok_s(64, 1024), "compute-bound"
    # 62.4 GFLOP a token in the layers' products.
    products = [part for part in parts_of(qwen, Work.decode(1, 1), HALF) if part.kind == "weight GEMMs"]
    assert sum(part.flops for part in products if part.name != "lm_head") == pytest.approx(62.4e9, rel=0.002)


def test_more_work_never_takes_less(qwen: ModelShape) -> None:
    roofline = Roofline(qwen, H200, HALF)
    for one, more in [
        (Work.decode(1, 1024), Work.decode(2, 1024)),
        (Work.decode(4, 1024), Work.decode(4, 2048)),
        (Work.prefill(512), Work.prefill(513)),
        (Work.prefill(512), Work.prefill(512) + Work.decode(8, 100)),
    ]:
        assert roofline.seconds(one) < roofline.seconds(more)


def test_a_small_kv_element_halves_what_attention_reads(qwen: ModelShape) -> None:
    work = Work.decode(16, 4096)
    wide = by_kind(Roofline(qwen, H200, HALF).floors(work))
    narrow = by_kind(Roofline(qwen, H200, HALF, kv_itemsize=1).floors(work))
    assert narrow["attention"] == pytest.approx(wide["attention"] / 2, rel=0.01)
    assert narrow["weight GEMMs"] == wide["weight GEMMs"]


def test_tensor_parallel_divides_the_work_and_adds_communication(qwen: ModelShape) -> None:
    machine = find_machine("RTX 3090")
    whole, half = Roofline(qwen, machine, HALF), Roofline(qwen.split_by(2), machine, HALF)
    work = Work.decode(4, 1024)
    one, two = by_kind(whole.floors(work)), by_kind(half.floors(work))
    assert two["weight GEMMs"] == pytest.approx(one["weight GEMMs"] / 2, rel=0.01)
    assert two["attention"] == pytest.approx(one["attention"] / 2, rel=0.01)
    assert "communication" not in one
    assert machine.link_bytes_per_second is not None
    exchanges = 2 * 64 * (25e-6 + 4 * 5120 * 2 / machine.link_bytes_per_second)
    logits = 25e-6 + 4 * 152064 * 2 / 2 / machine.link_bytes_per_second
    assert two["communication"] == pytest.approx(exchanges + logits)
    assert half.shape.num_kv_heads == 4
    assert half.kv_bytes_per_token() == 131_072


def test_what_cannot_be_divided_is_refused(qwen: ModelShape) -> None:
    with pytest.raises(ConfigError, match="--num-devices 3: the model's 40 attention heads are no multiple"):
        qwen.split_by(3)
    odd = ModelShape.read(small(QWEN2, intermediate_size=256 + 128))
    with pytest.raises(ConfigError, match="down has 384 input features in groups of 128"):
        odd.split_by(2)


def test_one_group_a_column_divides_with_its_column() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False, "sym": False}
    whole = ModelShape.read(small(QWEN2, quantization_config=gptq))
    half = {linear.name: linear for linear, _ in whole.split_by(2).linears}
    assert (half["down"].in_features, half["down"].group_size) == (192, 192)
    assert (half["o"].in_features, half["o"].group_size) == (128, 128)
    assert (half["qkv"].in_features, half["qkv"].group_size) == (256, 256)


@pytest.mark.parametrize(
    "hf",
    [
        small(QWEN2),
        small(QWEN2, tie_word_embeddings=True),
        small(QWEN2, quantization_config=AWQ | {"group_size": 32, "modules_to_not_convert": ["layers.1.mlp"]}),
        small(LLAMA3, attention_bias=True, mlp_bias=True),
        small(LLAMA3, quantization_config=None),
        small(QWEN2, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=64),
    ],
    ids=["awq", "tied", "partly-dense", "biases", "dense", "qwen3"],
)
def test_a_shape_has_the_bytes_of_the_model_that_is_built(hf: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf))
    checkpoint = Checkpoint.open(tmp_path)
    model = load_model(checkpoint, dtype=torch.float32, device=torch.device("cpu"), load_format="dummy")
    shape = ModelShape.read(checkpoint.hf)
    # The model counts a byte for each zero point as it is loaded; kernels pack two.
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    zeros = sum(
        linear.in_features * linear.out_features // linear.group_size * count
        for linear, count in shape.linears
        if linear.group_size is not None
    )
    assert len(linears) == sum(count for _, count in shape.linears) + (not shape.config.tie_word_embeddings)
    assert shape.weight_bytes(4) == model.weight_bytes - zeros // 2


def test_stored_names_tell_how_linears_are_stored() -> None:
    """`tiny` says nothing of its output layer in config.json; the file does."""
    shape = read_model("tiny")
    assert shape == read_checkpoint(Checkpoint.open(TINY))
    assert all(linear.group_size for linear, _ in shape.linears)
    assert shape.lm_head.group_size is None


def test_a_sliding_window_bounds_attention() -> None:
    hf = small(QWEN2, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    shape = ModelShape.read(hf)
    found = {part.name: part for part in parts_of(shape, Work.decode(3, 100), HALF) if part.kind == "attention"}
    assert found["attention"].count == found["attention (window 16)"].count == 1
    assert found["attention (window 16)"].flops * 100 == found["attention"].flops * 16


def test_kinds_are_all_known(qwen: ModelShape) -> None:
    parts = parts_of(qwen.split_by(2), Work.prefill(64), HALF)
    assert {part.kind for part in parts} <= set(KINDS)
    assert all(part.count >= 1 for part in parts)


def test_memory_plan_against_a_real_start(qwen: ModelShape) -> None:
    """The start that is in bench/results: an H100 at gpu_memory_utilization 0.9."""
    measured = json.loads(
        Path(__file__).parents[2].joinpath("bench/results/latency-qwen2.5-32b-awq-h100-fp16.json").read_text()
    )["startup"]
    plan = plan_memory(qwen, find_machine("H100"), 2, max_num_seqs=128, max_num_batched_tokens=8192)
    assert plan.kv_tokens(0.9) == pytest.approx(measured["num_kv_tokens"], rel=0.01)
    assert plan.utilization_for(plan.kv_tokens(0.9)) == pytest.approx(0.9, abs=1e-4)
    assert plan.most_kv_tokens > plan.kv_tokens(0.95) > plan.kv_tokens(0.9)


def test_a_model_too_large_leaves_no_tokens() -> None:
    shape = ModelShape.read(synthetic_config("qwen2.5-72b-awq"))
    plan = plan_memory(shape, find_machine("RTX 3090"), 2, max_num_seqs=1, max_num_batched_tokens=2048)
    assert plan.room_bytes < 0
    assert plan.most_kv_tokens == 0


def test_dequantization_alone(qwen: ModelShape) -> None:
    assert Roofline(qwen, H200, HALF).dequantize_seconds() == pytest.approx(2.1e-3, rel=0.01)
    unknown = Machine(name="x", memory_bytes=1, read_bytes_per_second=1, flops_per_second=1)
    assert Roofline(qwen, unknown, HALF).dequantize_seconds() is None
    dense = ModelShape.read(small(LLAMA3, quantization_config=None))
    assert Roofline(dense, H200, HALF).dequantize_seconds() is None
