"""The canonical 4-bit form: what each bit means."""

import pytest
import torch

from nybble.kernels.int4_weight import Int4Weight, random_int4_weight


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_follows_the_formula(group_size, dtype):
    weight = random_int4_weight(10, 256, group_size, dtype, generator=torch.Generator().manual_seed(1))
    dense = weight.dequantize(dtype)
    for n in (0, 3, 9):
        for k in (0, 1, 31, 32, 100, 255):
            code = int(weight.qweight[n, k // 2]) >> (4 * (k % 2)) & 15
            scale = weight.scales[k // group_size, n]
            expected = ((code - int(weight.zeros[k // group_size, n])) * scale.double()).to(dtype)
            assert dense[n, k] == expected, (n, k)


def test_random_weights_keep_the_size_of_activations():
    weight = random_int4_weight(512, 1024, 128, torch.float32, generator=torch.Generator().manual_seed(2))
    x = torch.randn(8, 1024, generator=torch.Generator().manual_seed(3))
    assert 0.7 < (x @ weight.dequantize(torch.float32).T).std() < 1.4


def test_shapes_that_contradict_each_other_are_refused():
    good = random_int4_weight(8, 64, 32, torch.float32)
    with pytest.raises(AssertionError):
        Int4Weight(good.qweight, good.scales[:1], good.zeros[:1], 32)
