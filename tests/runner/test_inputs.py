"""A batch as arrays, against a loop over tokens."""

import numpy as np
import torch
from support.runner_driver import small_config

from nybble.core.batch import Batch, Row, SequenceStart
from nybble.core.sampling import SamplingParams
from nybble.runner.graphs import StepSize
from nybble.runner.inputs import BlockTables, StagingBuffer, gather, idle_step, staging_bytes, step_arrays

CPU = torch.device("cpu")


def mixed_batch() -> Batch:
    return Batch(
        step_id=0,
        rows=[
            Row(slot=3, start=0, token_ids=[7, 8, 9, 10, 11, 12, 13, 14, 15, 16], new_block_ids=[5, 2]),
            Row(slot=0, start=17, token_ids=[-1], new_block_ids=[9], sample=True, num_output_tokens=4),
            Row(slot=6, start=6, token_ids=[1, 2, 3], new_block_ids=[], sample=True, num_output_tokens=0),
        ],
    )


def tables_with_history() -> BlockTables:
    tables = BlockTables(small_config(), CPU)
    tables.host[0, :2], tables.num_blocks[0] = [11, 12], 2
    tables.host[6, :2], tables.num_blocks[6] = [20, 4], 2
    return tables


def test_gather() -> None:
    batch, tables = mixed_batch(), tables_with_history()
    step = gather(batch, tables)
    blocks = {3: [5, 2], 0: [11, 12, 9], 6: [20, 4]}
    token_ids, positions, slot_mapping = [], [], []
    for row in batch.rows:
        for offset, token_id in enumerate(row.token_ids):
            position = row.start + offset
            token_ids.append(token_id)
            positions.append(position)
            slot_mapping.append(blocks[row.slot][position // 8] * 8 + position % 8)
    assert step.token_ids.tolist() == token_ids
    assert step.positions.tolist() == positions
    assert step.slot_mapping.tolist() == slot_mapping
    assert step.slots.tolist() == [3, 0, 6]
    assert step.seq_lens.tolist() == [10, 18, 9]
    assert step.query_start.tolist() == [0, 10, 11, 14]
    assert step.sample_rows.tolist() == [1, 2]
    assert step.num_output_tokens.tolist() == [4, 0]
    assert not step.size.is_decode
    flat = tables.device.clone().view(-1)
    flat[torch.from_numpy(step.table_positions)] = torch.from_numpy(step.table_block_ids)
    rows = flat.view(tables.device.shape)
    assert rows[3, :2].tolist() == [5, 2]
    assert rows[0, 2] == 9
    assert len(step.table_positions) == 3


def test_reset_starts_a_slots_table_anew() -> None:
    tables = tables_with_history()
    tables.reset(0)
    gather(Batch(step_id=0, rows=[Row(slot=0, start=0, token_ids=[1], new_block_ids=[30])]), tables)
    assert tables.host[0, 0] == 30
    assert tables.num_blocks[0] == 1


def test_padding_a_decode_step() -> None:
    batch = Batch(step_id=0, rows=[mixed_batch().rows[1]])
    step = gather(batch, tables_with_history())
    assert step.size.is_decode
    padded = step.padded(StepSize(3, 3, is_decode=True), idle_slot=8)
    assert padded.slots.tolist() == [0, 8, 8]
    assert padded.seq_lens.tolist() == [18, 0, 0]
    assert padded.slot_mapping.tolist() == [int(step.slot_mapping[0]), -1, -1]
    assert padded.query_start.tolist() == [0, 1, 2, 3]
    assert padded.seq_lens.dtype == padded.query_start.dtype == np.int32
    assert padded.sample_rows.tolist() == [0]


def test_a_sequence_that_starts_with_one_token_does_not_decode() -> None:
    """Its prefix may lie in blocks that the same step fills."""
    batch = Batch(step_id=0, rows=[mixed_batch().rows[1]])
    assert gather(batch, tables_with_history()).size == StepSize(1, 1, is_decode=True)
    start = SequenceStart(slot=0, params=SamplingParams(), prompt_token_ids=[1], end_token_ids=[])
    batch = Batch(step_id=0, rows=batch.rows, starts=[start])
    assert gather(batch, tables_with_history()).size == StepSize(1, 1)


def test_padding_a_step_with_prompts() -> None:
    step = gather(mixed_batch(), tables_with_history())
    num_tokens, num_rows = len(step.token_ids), len(step.slots)
    padded = step.padded(StepSize(num_tokens + 4, num_rows + 2), idle_slot=8)
    assert padded.token_ids.tolist() == [*step.token_ids.tolist(), 0, 0, 0, 0]
    assert padded.slot_mapping.tolist()[num_tokens:] == [-1] * 4
    assert padded.query_start.tolist() == [*step.query_start.tolist(), num_tokens, num_tokens]  # they have no token
    assert padded.slots.tolist()[num_rows:] == [8, 8]
    assert padded.seq_lens.tolist()[num_rows:] == [0, 0]
    assert padded.sample_rows.tolist() == step.sample_rows.tolist()


def test_upload_gives_back_every_array_and_a_fixed_place() -> None:
    config = small_config()
    staging = StagingBuffer(staging_bytes(config), CPU)
    step = gather(mixed_batch(), tables_with_history())
    extra = {
        "flags": np.array([True, False, True]),
        "numbers": np.array([0.1, 0.7]),
        "table": np.ones((2, 3), np.float32),
    }
    views = staging.upload({**step_arrays(step), **extra})
    for name, array in {**step_arrays(step), **extra}.items():
        assert np.array_equal(views[name].numpy(), array), name
    idle = step_arrays(idle_step(StepSize(6, 4), 8))
    first = {name: view.data_ptr() for name, view in staging.views(idle).items()}
    later = staging.upload({**idle, **extra})
    assert {name: later[name].data_ptr() for name in idle} == first


def test_the_largest_step_fits_the_staging_buffer() -> None:
    config = small_config(max_num_seqs=8, max_num_batched_tokens=512)
    tables = BlockTables(config, CPU)
    rows = [Row(slot=s, start=0, token_ids=[1] * 64, new_block_ids=list(range(8)), sample=True) for s in range(8)]
    step = gather(Batch(step_id=0, rows=rows), tables)
    tables_too = {"positions_of_blocks": step.table_positions, "block_ids": step.table_block_ids}
    StagingBuffer(staging_bytes(config), CPU).upload({**step_arrays(step), **tables_too})
