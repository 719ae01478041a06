"""Runs a model over a paged cache by hand: blocks in scrambled order, contexts written out, no runner, no engine."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from nybble.layers.context import ForwardContext
from nybble.models.decoder import CausalLM


class PagedDriver:
    """Sequences are named by any hashable; each step appends tokens to some of them."""

    def __init__(self, model: CausalLM, *, num_blocks: int = 64, block_size: int = 8) -> None:
        self.model = model
        self.device = model.target.device
        self.block_size = block_size
        spec = model.kv_spec
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        # NaN: a read of something never written shows.
        self.caches = [
            tuple(torch.full(shape, torch.nan, dtype=spec.dtype, device=self.device) for _ in range(2))
            for _ in range(spec.num_layers)
        ]
        self.free = list(range(num_blocks))
        random.Random(0).shuffle(self.free)
        self.blocks: dict[object, list[int]] = {}
        self.lengths: dict[object, int] = {}

    @torch.inference_mode()
    def step(self, rows: Mapping[object, list[int]]) -> dict[object, torch.Tensor]:
        """Append tokens to sequences; the logits [new tokens, vocab] of each."""
        positions, slots, starts = [], [], [0]
        for name, tokens in rows.items():
            begin = self.lengths.setdefault(name, 0)
            end = self.lengths[name] = begin + len(tokens)
            blocks = self.blocks.setdefault(name, [])
            while len(blocks) * self.block_size < end:
                blocks.append(self.free.pop())
            positions += range(begin, end)
            slots += [blocks[p // self.block_size] * self.block_size + p % self.block_size for p in range(begin, end)]
            starts.append(starts[-1] + len(tokens))
        widest = max(len(self.blocks[name]) for name in rows)
        tables = [self.blocks[name] + [0] * (widest - len(self.blocks[name])) for name in rows]
        lengths = [self.lengths[name] for name in rows]

        def tensor(values: list, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        ctx = ForwardContext(
            positions=tensor(positions, torch.int64),
            slot_mapping=tensor(slots, torch.int64),
            block_tables=tensor(tables, torch.int32),
            seq_lens=tensor(lengths, torch.int32),
            query_start=tensor(starts, torch.int32),
            min_query_len=min(map(len, rows.values())),
            max_query_len=max(map(len, rows.values())),
            max_seq_len=max(lengths),
            kv_caches=self.caches,
        )
        token_ids = tensor([token for tokens in rows.values() for token in tokens], torch.int64)
        logits = self.model.logits(self.model(token_ids, ctx))
        return dict(zip(rows, logits.split([len(tokens) for tokens in rows.values()]), strict=True))

    def greedy(self, prompts: Mapping[object, list[int]], num_tokens: int) -> dict[object, list[int]]:
        """Prefill all prompts in one step, then decode them side by side."""
        rows, out = dict(prompts), {name: [] for name in prompts}
        for _ in range(num_tokens):
            for name, logits in self.step(rows).items():
                out[name].append(int(logits[-1].argmax()))
            rows = {name: tokens[-1:] for name, tokens in out.items()}
        return out
