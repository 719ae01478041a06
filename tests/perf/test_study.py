"""docs/study.md says what the roofline says."""

import re
from pathlib import Path

import pytest
import torch

from nybble.bench.synthetic import synthetic_config
from nybble.perf.machines import describe, find_machine
from nybble.perf.memory_model import plan_memory
from nybble.perf.model_shape import ModelShape
from nybble.perf.roofline import Roofline, by_kind
from nybble.perf.step_cost import Work

TEXT = Path(__file__).parents[2].joinpath("docs", "study.md").read_text()
TABLE = {cells[0]: cells[1:] for cells in (re.findall(r"[^|]+", line) for line in TEXT.splitlines() if line[:1] == "|")}
BATCHES = (1, 5, 16, 32)


@pytest.fixture(scope="module")
def half() -> ModelShape:
    return ModelShape.read(synthetic_config("qwen2.5-32b-awq")).split_by(2)


def row(name: str) -> list[float]:
    return [float(cell.replace(",", "")) for cell in TABLE[f" {name} "]]


def test_the_table(half: ModelShape) -> None:
    roofline = Roofline(half, find_machine("RTX 3090").sustained(), torch.float16)
    kinds = [by_kind(roofline.floors(Work.decode(batch, 1024))) for batch in BATCHES]
    for name, kind in (("weights' products", "weight GEMMs"), ("communication",) * 2, ("attention",) * 2):
        assert row(name) == pytest.approx([found[kind] * 1e3 for found in kinds], abs=0.006)  # type: ignore[index]
    assert row("the floor") == pytest.approx([sum(found.values()) * 1e3 for found in kinds], abs=0.006)
    assert row("at most, tokens/s") == pytest.approx([roofline.decode_tok_s(b, 1024) for b in BATCHES], abs=0.6)


def test_the_claims(half: ModelShape) -> None:
    roofline = Roofline(half, find_machine("RTX 3090").sustained(), torch.float16)
    found = by_kind(roofline.floors(Work.decode(1, 1024)))
    total = sum(found.values())
    assert f"{found['weight GEMMs'] / total:.0%} of the step".replace("%", " %") in TEXT
    assert f"Communication is {found['communication'] / total:.0%}".replace("%", " %") in TEXT
    alone = roofline.dequantize_seconds()
    assert alone is not None
    assert f"takes {alone * 1e3:.2f} ms of the integer lanes" in TEXT
    assert f"up to {alone / (alone + found['weight GEMMs']):.0%}".replace("%", " %") in TEXT
    assert f"From a batch of {roofline.crossover_batch()} on" in TEXT
    bridge = describe("RTX 3090", memory_gb=None, read_gb_s=None, tflops=None, link_gb_s=56).sustained()
    linked = by_kind(Roofline(half, bridge, torch.float16).floors(Work.decode(1, 1024)))
    share = linked["communication"] / sum(linked.values())
    assert f"makes it {linked['communication'] * 1e3:.1f} ms, {share * 100:.1f} %" in TEXT


def test_the_memory(half: ModelShape) -> None:
    shares = []
    for num_seqs in (8, 64, 128):
        plan = plan_memory(half, find_machine("RTX 3090"), 2, max_num_seqs=num_seqs, max_num_batched_tokens=8192)
        shares.append(plan.room_bytes / plan.free_bytes)
    assert [f"{share:.2f}" for share in shares] == ["0.90", "0.86", "0.83"]
    assert "0.90 for KV it has room with 8 sequences" in TEXT
    assert "0.86 with 64, 0.83 with 128" in TEXT
    assert f"{plan.free_bytes / 1e9:.1f} GB are free on each card" in TEXT
