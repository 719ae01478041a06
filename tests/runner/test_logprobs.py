import torch

from nybble.runner.logprobs import concatenate, gather_logprobs


def test_logprobs_ranks_and_order() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2)) * 4
    ids = torch.tensor([3, 17, 0, 49])
    dicts = gather_logprobs(logits, ids, 5).to_dicts([5, 5, 2, 0])
    for row, (token_id, count) in enumerate(zip(ids.tolist(), [5, 5, 2, 0], strict=True)):
        expected = logits[row].double().log_softmax(-1)
        order = expected.argsort(descending=True).tolist()
        assert next(iter(dicts[row])) == token_id
        assert set(dicts[row]) == {token_id, *order[:count]}
        for other, found in dicts[row].items():
            assert abs(found.logprob - float(expected[other])) < 1e-5
            assert found.rank == order.index(other) + 1


def test_rank_counts_only_strictly_likelier_tokens() -> None:
    dicts = gather_logprobs(torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]]), torch.tensor([3]), 0).to_dicts([0])
    assert dicts[0][3].rank == 2


def test_parts_and_failed_rows() -> None:
    logits = torch.randn(3, 9)
    ids = torch.tensor([1, -1, 2])  # −1: BAD_LOGITS
    whole = gather_logprobs(logits, ids, 2)
    parts = concatenate([gather_logprobs(logits[:2], ids[:2], 2), gather_logprobs(logits[2:], ids[2:], 2)])
    assert whole.to_dicts([2] * 3) == parts.to_dicts([2] * 3)
