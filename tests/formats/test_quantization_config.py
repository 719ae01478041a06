"""`quantization_config`: which linear is stored how, and what is refused, by field and with what is accepted."""

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nybble.core.errors import ModelError, UnsupportedError
from nybble.formats import ACCEPTED, Quantization, from_hf

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
Q, DOWN, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"


def read(settings: Any) -> Quantization:
    return from_hf({"quantization_config": settings})


def formats(settings: dict[str, Any], stored: list[str] | None = None) -> list[str]:
    quantization = read(settings)
    return [quantization.format_of(name, 256, stored).name for name in (Q, DOWN, HEAD)]


def test_dense() -> None:
    assert from_hf({}) == read(None) == read({}) == Quantization()
    assert formats({}) == ["dense"] * 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (AWQ, ["awq", "awq", "dense"]),
        (AWQ | {"modules_to_not_convert": ["down_proj"]}, ["awq", "dense", "dense"]),
        (AWQ | {"modules_to_not_convert": ["layers.0."]}, ["dense", "awq", "dense"]),
        (AWQ | {"modules_to_not_convert": ["q.proj"]}, ["awq", "awq", "dense"]),  # a name, no pattern
        (AWQ | {"modules_to_not_convert": None}, ["awq", "awq", "dense"]),
        (GPTQ, ["gptq", "gptq", "dense"]),
        (GPTQ | {"lm_head": True}, ["gptq", "gptq", "gptq"]),
        (GPTQ | {"dynamic": {r"-:.*\.down_.*": {}}}, ["gptq", "dense", "dense"]),
        (GPTQ | {"dynamic": {r"-:down_proj": {}}}, ["gptq", "gptq", "dense"]),  # matched from the name's start
        (GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]}, ["gptq", "dense", "dense"]),
        (GPTQ | {"modules_in_block_to_quantize": ["mlp.down_proj"]}, ["dense", "gptq", "dense"]),
    ],
)
def test_without_files_the_configuration_decides(settings: dict[str, Any], expected: list[str]) -> None:
    assert formats(settings) == expected


@pytest.mark.parametrize("settings", [AWQ, GPTQ])
def test_with_files_the_stored_tensors_decide(settings: dict[str, Any]) -> None:
    method = settings["quant_method"]
    everything = settings | {"modules_to_not_convert": ["q_proj"], "dynamic": {"-:.*q_proj": {}}}
    assert formats(everything, [f"{Q}.qweight", f"{DOWN}.weight", f"{HEAD}.weight"]) == [method, "dense", "dense"]
    assert formats(settings, [f"{Q}.weight", f"{DOWN}.scales", f"{HEAD}.qweight"]) == ["dense", method, method]


def test_older_spellings() -> None:
    older = {"quant_method": "AWQ", "w_bit": 4, "q_group_size": 64, "zero_point": False, "version": "GEMM"}
    assert read(older) == read(AWQ | {"group_size": 64, "zero_point": False})
    assert read({"quant_method": "gptq"}) == read(GPTQ)
    assert read(GPTQ | {"checkpoint_format": "gptq_v2"}) != read(GPTQ)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "fp8"}, re.escape(f"quant_method is 'fp8'; {ACCEPTED}")),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quant_method is 'bitsandbytes'; accepted are"),
        ({"quant_method": "compressed-tensors"}, r"quant_method is 'compressed-tensors'; accepted are"),
        ({"bits": 4}, r"quant_method is ''; accepted are"),
        (AWQ | {"bits": 8}, r"bits is 8; 4 is accepted"),
        (AWQ | {"bits": "4"}, r"bits is '4'; 4 is accepted"),
        (AWQ | {"group_size": 16}, r"group_size is 16; accepted are 32, 64, 128, -1"),
        (AWQ | {"group_size": "128"}, r"group_size is '128'; accepted are"),
        (AWQ | {"version": "gemv"}, r"version is 'gemv'; .*'gemm'"),
        (AWQ | {"backend": "llm-awq"}, r"backend is 'llm-awq'.*gemm"),
        (GPTQ | {"bits": 3}, r"bits is 3; 4 is accepted"),
        (GPTQ | {"group_size": 1024}, r"group_size is 1024; accepted are"),
        (GPTQ | {"desc_act": True}, r"desc_act is true.*desc_act = false"),
        (GPTQ | {"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin'; .*'gptq' or 'gptq_v2'"),
        (GPTQ | {"is_marlin_format": True}, r"is_marlin_format is true; .*'gptq' or 'gptq_v2'"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, r"dynamic gives '\+:\.\*down\.\*' its own settings; only"),
    ],
)
def test_other_kinds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        read(settings)
    assert str(caught.value).startswith("quantization_config.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("awq", r"quantization_config must be an object, got 'awq'; accepted are"),
        ([AWQ], r"quantization_config must be an object"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, r"modules_to_not_convert must be a list of names, got 'lm_head'"),
        (AWQ | {"modules_to_not_convert": [1]}, r"modules_to_not_convert must be a list of names, got \[1\]"),
        (GPTQ | {"modules_in_block_to_quantize": 3}, r"modules_in_block_to_quantize must be a list of names, got 3"),
        (GPTQ | {"dynamic": ["-:x"]}, r"dynamic must be an object, got \['-:x'\]"),
        (GPTQ | {"dynamic": {"-:(": {}}}, r"dynamic: '-:\(' is no regular expression"),
    ],
)
def test_nonsense_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(settings)


TEXT = st.text("-:a(*\\", max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
FIELDS = sorted({*AWQ, *GPTQ, "format", "backend", "dynamic", "modules_to_not_convert", "modules_in_block_to_quantize"})


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([AWQ, GPTQ]), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_any_json_is_read_or_refused(sound: dict[str, Any], changes: dict[str, Any]) -> None:
    try:
        quantization = read(sound | changes)
    except ModelError:
        return
    assert quantization.format_of(Q, 256, None).name in ("dense", "awq", "gptq")
