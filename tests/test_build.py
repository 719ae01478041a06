"""`build`: from a directory to tokens, and what it refuses. Dummy weights of a two-layer AWQ model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.build import build, build_engine, find_hardware
from nybble.core.config import EngineConfig
from nybble.core.errors import ConfigError, MemoryBudgetError
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.engine.engine import Engine
from nybble.kernels.check import OPS
from nybble.kernels.op import OPERATIONS

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "quantization_config": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    },
}
BYTES_PER_TOKEN = 2 * 2 * 2 * 32 * 4  # K and V, layers, heads, head size, fp32
PROMPTS = [[7] * 30, list(range(100, 190)), [5]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    (path / "config.json").write_text(json.dumps(QWEN))
    return path


def config_of(directory: Path, **settings: Any) -> EngineConfig:
    defaults = {"device": "cpu", "dtype": "float32", "load_format": "dummy", "kv_cache_memory_bytes": 4 << 20}
    return EngineConfig(model=str(directory), **{**defaults, **settings})


def generate(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    outputs: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params))
        outputs[str(index)] = []
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None
            outputs[delta.request_id] += delta.token_ids
    return list(outputs.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_the_same_alone_batched_and_in_chunks(directory: Path, temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature, top_p=0.9, seed=5, max_tokens=10, ignore_eos=True, detokenize=False
    )
    whole = build_engine(config_of(directory))
    chunked = build_engine(config_of(directory, max_num_batched_tokens=16, max_num_seqs=2))
    alone = [generate(whole, [prompt], params)[0] for prompt in PROMPTS]
    assert generate(whole, PROMPTS, params) == alone  # two engines in one process, side by side
    assert generate(chunked, PROMPTS, params) == alone
    assert [len(output) for output in alone] == [10] * 3
    whole.close()
    chunked.close()


def test_the_report_tells_what_was_found(directory: Path) -> None:
    built = build(config_of(directory))
    report = built.report
    assert list(report.phase_seconds) == ["locate", "load weights", "measure memory", "warm up"]
    assert report.num_kv_blocks == (4 << 20) // (BYTES_PER_TOKEN * 16)
    assert report.num_kv_tokens == report.num_kv_blocks * 16
    assert report.kv_bytes == report.num_kv_tokens * BYTES_PER_TOKEN
    assert report.weights_bytes > 512 * 128 * 4
    assert set(report.kernels) >= {"attention", "int4_linear"}
    assert any(f"{report.num_kv_tokens} tokens" in line for line in report.lines())
    assert built.tokenizer is None
    assert built.config.max_model_len == 256


def test_a_small_cache_shortens_a_context_that_was_left_open(directory: Path) -> None:
    built = build(config_of(directory, kv_cache_memory_bytes=96 * BYTES_PER_TOKEN))
    assert built.config.max_model_len == 96
    output = generate(built.engine, [[3] * 90], SamplingParams(temperature=0, max_tokens=None, detokenize=False))
    assert len(output[0]) <= 6


def test_a_small_cache_refuses_a_context_that_was_asked_for(directory: Path) -> None:
    settings = {"kv_cache_memory_bytes": 96 * BYTES_PER_TOKEN, "max_model_len": 200}
    with pytest.raises(MemoryBudgetError, match=r"200 tokens.*kv_cache_memory_bytes from"):
        build(config_of(directory, **settings))


def test_the_device_is_a_gpu_where_there_is_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_hardware(config_of(directory, device="auto")).device == "cpu"
    with pytest.raises(ConfigError, match="doctor"):
        find_hardware(config_of(directory, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    found = find_hardware(config_of(directory, device="auto"))
    assert (found.device, found.supports_bfloat16) == ("cuda", False)
    assert find_hardware(config_of(directory, device="cpu")).device == "cpu"


def test_a_forced_kernel_of_no_operation_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="'atention' is no operation; there are attention, dense_linear"):
        build(config_of(directory, kernels={"atention": "reference"}))
    assert set(OPERATIONS) == set(OPS), "nybble/kernels/op.py names them all"
    build(config_of(directory, kernels={"attention": "reference"})).engine.close()


def test_ranges_that_the_device_counts_in_hold_from_end_to_end() -> None:
    """Neighbours do not notice a request at the ends of its ranges."""
    engine = build_engine(EngineConfig(model="tiny", device="cpu", kv_cache_memory_bytes=4 << 20))
    plain = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = generate(engine, [[5, 6, 7]], plain)
    extreme = SamplingParams(
        min_tokens=2**63 - 1, max_tokens=2**63 - 1, top_k=2**63 - 1, seed=-(2**63), temperature=1e4, stop_token_ids=[3]
    )
    engine.add(Request(request_id="extreme", prompt_token_ids=[5, 6], params=extreme))
    engine.step()
    engine.add(Request(request_id="0", prompt_token_ids=[5, 6, 7], params=plain))
    tokens: list[int] = []
    for _ in range(10):
        for delta in engine.step():
            assert delta.error is None
            tokens += delta.token_ids if delta.request_id == "0" else []
    assert [tokens] == expected
    engine.close()


def test_masks_that_leave_nothing_are_told_as_such() -> None:
    engine = build_engine(EngineConfig(model="tiny", device="cpu", kv_cache_memory_bytes=4 << 20))
    eos = sorted(engine._eos_token_ids)
    params = SamplingParams(allowed_token_ids=eos, min_tokens=2)
    engine.add(Request(request_id="r", prompt_token_ids=[5, 6, 7], params=params))
    (delta,) = engine.step()
    assert delta.finish_reason == "error"
    assert "leave no token to generate" in str(delta.error)
    engine.close()


@pytest.mark.gpu
def test_on_a_gpu_graphs_and_eager_steps_agree_and_repeat(directory: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
    outputs = []
    for eager in (False, False, True):
        settings = {"device": "cuda", "dtype": "float16", "kv_cache_memory_bytes": 64 << 20, "enforce_eager": eager}
        engine = build_engine(config_of(directory, **settings))
        outputs.append(generate(engine, PROMPTS, params))
        engine.close()
    assert outputs[0] == outputs[1], "the same tokens from run to run"
    assert outputs[0] == outputs[2]


@pytest.mark.gpu
def test_on_a_gpu_no_request_waits_for_a_kernel(directory: Path) -> None:
    """All that prompts need, alone, together and beside sequences that decode, is compiled at the start."""
    engine = build_engine(config_of(directory, device="cuda", dtype="float16", kv_cache_memory_bytes=64 << 20))
    before = compiled_kernels()
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False)
    for length in (1, 3, 7, 9, 16, 17, 31, 33, 63, 65, 100, 129, 200, 250):
        generate(engine, [[3] * length], params)
    generate(engine, [[3] * (20 + 31 * row) for row in range(7)], params)
    engine.close()
    assert compiled_kernels() == before


def compiled_kernels() -> dict[str, int]:
    from triton.runtime.jit import JITFunction

    from nybble.kernels.cuda import nvrtc
    from nybble.kernels.triton import attention, kv_write, rms_norm, rotary, silu_mul

    counts = {"cuda": nvrtc.kernel.cache_info().currsize}
    for module in (attention, kv_write, rms_norm, rotary, silu_mul):
        for name, function in vars(module).items():
            if isinstance(function, JITFunction):
                counts[name] = sum(len(cache[0]) for cache in function.device_caches.values())
    return counts
