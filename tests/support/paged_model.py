"""A two-layer attention model in plain torch over the paged cache: small, and sensitive to every input a runner gives.

Positions are added to the embeddings, every operation can be captured in a CUDA graph, and `dense_logits` computes the
same from the token ids alone, without cache, batch or context.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import nn

from nybble.layers.context import ForwardContext, KVSpec

HEADS, HEAD_DIM, LAYERS = 2, 8, 2


class PagedModel(nn.Module):
    def __init__(self, vocab_size: int = 61, *, device: str = "cpu", seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        size = HEADS * HEAD_DIM

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator).to(device), requires_grad=False)

        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.embedding = random(vocab_size, size)
        self.qkv = nn.ParameterList(random(size, 3 * size) for _ in range(LAYERS))
        self.head = random(size, vocab_size)

    @property
    def kv_spec(self) -> KVSpec:
        return KVSpec(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float32)

    def _embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        frequencies = torch.arange(1, self.embedding.shape[1] + 1, device=token_ids.device)
        return self.embedding[token_ids] + torch.sin(positions[:, None] / frequencies)

    def forward(self, token_ids: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        x = self._embed(token_ids, ctx.positions)
        tokens = torch.arange(len(token_ids), device=x.device)
        row = torch.searchsorted(ctx.query_start[1:], tokens, right=True).clamp(max=len(ctx.seq_lens) - 1)
        for weight, (key_cache, value_cache) in zip(self.qkv, ctx.kv_caches, strict=True):
            q, k, v = (x @ weight / 4).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
            for cache, new in ((key_cache, k), (value_cache, v)):
                _write(cache, new, ctx.slot_mapping)
            keys, values = (
                cache[ctx.block_tables.long()].transpose(2, 3).flatten(1, 2)[row] for cache in (key_cache, value_cache)
            )
            scores = torch.einsum("thd,tlhd->thl", q, keys) / math.sqrt(HEAD_DIM)
            visible = torch.arange(keys.shape[1], device=x.device) <= ctx.positions[:, None]
            visible &= ctx.positions[:, None] < ctx.seq_lens[row][:, None]
            weights = scores.masked_fill(~visible[:, None], -1e30).softmax(-1)
            x = x + torch.einsum("thl,tlhd->thd", weights, values).flatten(1)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.head

    def dense_logits(self, token_ids: list[int]) -> torch.Tensor:
        """[len(token_ids), V]: what a correct runner sees at each position of this sequence."""
        ids = torch.tensor(token_ids, device=self.embedding.device)
        x = self._embed(ids, torch.arange(len(ids), device=ids.device))
        for weight in self.qkv:
            q, k, v = (x @ weight / 4).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
            scores = torch.einsum("thd,lhd->htl", q, k) / math.sqrt(HEAD_DIM)
            causal = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).tril()
            weights = scores.masked_fill(~causal, -1e30).softmax(-1)
            x = x + torch.einsum("htl,lhd->thd", weights, v).flatten(1)
        return self.logits(x)

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The tokens that greedy decoding appends to the prompt."""
        token_ids = list(prompt)
        for _ in range(num_tokens):
            token_ids.append(int(self.dense_logits(token_ids)[-1].argmax()))
        return token_ids[len(prompt) :]


def _write(cache: torch.Tensor, new: torch.Tensor, slots: torch.Tensor) -> None:
    """Write [T, heads, dim] to cache slots. Rows of −1 repeat the write of the highest slot instead."""
    last = slots.argmax(keepdim=True)  # not 0-d: indexing with that would wait for the device
    valid = slots >= 0
    source = torch.where(valid[:, None, None], new, new[last])
    index = torch.where(valid, slots, slots[last]).clamp(min=0)
    block, offset = index // cache.shape[2], index % cache.shape[2]
    cache[block, :, offset] = torch.where(valid.any(), source, cache[block, :, offset])
