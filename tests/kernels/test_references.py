"""The definitions themselves, against the formulas written out element by element."""

import math

import pytest
import torch

from nybble.kernels import attention, dense_linear, int4_gated, int4_linear, kv_write, rms_norm, rotary, silu_mul

CPU = torch.device("cpu")


def arguments(case, dtype=torch.float32):
    return case.arguments(CPU, dtype, torch.Generator().manual_seed(7))


def close(a, b, tolerance=2e-6):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance, check_stride=False)


@pytest.mark.parametrize("case", list(attention.cases()), ids=str)
def test_attention(case, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 8)
    a = arguments(case)
    output = attention.reference(**a)
    group, token = case.query_heads // case.kv_heads, 0
    for row, (queries, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        for position in range(length - queries, length):
            if length == 0:
                assert not output[token].any()
            else:
                first = max(0, position - (case.sliding_window or math.inf) + 1)
                at = [divmod(j, case.block_size) for j in range(int(first), position + 1)]
                blocks = a["block_tables"][row, [block for block, _ in at]]
                offsets = [offset for _, offset in at]
                for head in range(case.query_heads):
                    keys, values = (
                        cache[blocks, head // group, offsets].double() for cache in (a["key_cache"], a["value_cache"])
                    )
                    weights = (keys @ a["q"][token, head].double() * a["scale"]).softmax(0)
                    close(output[token, head], weights @ values)
            token += 1


def test_attention_does_not_depend_on_how_a_prompt_is_cut(monkeypatch):
    """One prefill of 50 tokens equals three chunks of it, the last with a second sequence beside it."""
    whole = arguments(attention.Case((50,), (50,), 4, 2, 64))
    output = attention.reference(**whole)
    for begin, end in ((0, 20), (20, 49), (49, 50)):
        part = whole | {
            "q": whole["q"][begin:end],
            "seq_lens": torch.tensor([end], dtype=torch.int32),
            "query_start": torch.tensor([0, end - begin], dtype=torch.int32),
        }
        close(attention.reference(**part), output[begin:end])


def test_rotary_is_a_rotation_of_complex_numbers():
    a = arguments(rotary.Case(5, 3, 2, 96, 48))
    before = {name: a[name].clone() for name in ("q", "k")}
    rotary.reference(**a)
    angles = a["positions"].unsqueeze(1) * 10000.0 ** (-torch.arange(24) * 2 / 48).double()
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    for name, x in before.items():
        turned = torch.complex(x[..., :24].double(), x[..., 24:48].double()) * turn
        close(a[name], torch.cat((turned.real, turned.imag, x[..., 48:].double()), -1), 1e-4)


def test_rms_norm():
    a = arguments(rms_norm.Case(4, 33))
    y, total = rms_norm.reference(**a)
    r = a["x"].double() + a["residual"].double()
    close(total, r)
    close(y, r / (r.square().mean(-1, keepdim=True) + a["eps"]).sqrt() * a["weight"].double(), 1e-5)
    assert rms_norm.reference(a["x"], a["weight"], 1e-6, None)[1] is a["x"]


def test_kv_write_touches_the_named_slots_only():
    case = kv_write.Case(13, 2, 8, 16)
    a = arguments(case)
    expected = {name: a[name].clone() for name in ("key_cache", "value_cache")}
    for token, slot in enumerate(a["slot_mapping"].tolist()):
        if slot >= 0:
            expected["key_cache"][slot // 16, :, slot % 16] = a["k"][token]
            expected["value_cache"][slot // 16, :, slot % 16] = a["v"][token]
    assert -1 in a["slot_mapping"]
    kv_write.reference(**a)
    for name, cache in expected.items():
        assert torch.equal(a[name], cache)


def test_kv_write_of_padding_alone_writes_nothing():
    a = arguments(kv_write.Case(3, 1, 8, 16))
    before = a["key_cache"].clone()
    kv_write.reference(a["k"], a["v"], a["key_cache"], a["value_cache"], torch.full((3,), -1))
    assert torch.equal(a["key_cache"], before)


def test_silu_mul():
    gate_up = arguments(silu_mul.Case(3, 50))["gate_up"]
    gate, up = gate_up[:, :50].double(), gate_up[:, 50:].double()
    close(silu_mul.reference(gate_up), gate / (1 + (-gate).exp()) * up, 1e-5)


def test_linears_are_products():
    a = arguments(int4_linear.Case(3, 128, 24, 32, has_bias=True))
    dense = a["weight"].dequantize(torch.float64)
    expected = torch.einsum("mk,nk->mn", a["x"].double(), dense) + a["bias"].double()
    close(int4_linear.reference(**a), expected)
    close(dense_linear.reference(a["x"], dense.float(), a["bias"]), expected)


def test_int4_gated():
    a = arguments(int4_gated.Case(3, 128, 24, 32))
    dense = a["weight"].dequantize(torch.float64)
    gate, up = (a["x"].double() @ part.T for part in dense.split(24))
    close(int4_gated.reference(**a), gate / (1 + (-gate).exp()) * up, 1e-5)


@pytest.mark.parametrize(
    "module", [attention, dense_linear, int4_gated, int4_linear, kv_write, rms_norm, rotary, silu_mul]
)
def test_cost_counts_the_tensors(module):
    """No operation moves less than its cost says: the arguments are at least that large, results aside."""
    for case in module.cases():
        cost = module.OP.cost(case, torch.bfloat16)
        assert cost.bytes > 0
        assert cost.flops >= 0
    small, large = (int4_linear.cost(int4_linear.Case(m, 1024, 512, 128), torch.float16) for m in (1, 2))
    assert large.flops == 2 * small.flops
    assert large.bytes - small.bytes == 2 * (1024 + 512)
