"""The embedded model: its files, the text that trained it, its rounding, and whether it answers right."""

import json
import re
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # `training` is no part of the installed package

from training.tiny import awq, evaluate
from training.tiny.data import chat_segments, document, held_out_problems, is_held_out, training_problem
from training.tiny.model import TinyConfig, TinyModel
from training.tiny.quantize import quantize_tensors
from training.tiny.tasks import TASKS, draw_problem

INT4, FLOAT = evaluate.INT4_CHECKPOINT, evaluate.FLOAT_CHECKPOINT


def test_the_asset_folder_is_small_and_complete() -> None:
    files = {file.name: file.stat().st_size for file in INT4.iterdir()}
    assert sum(files.values()) <= 8_000_000
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_every_linear_is_a_multiple_of_128_both_ways() -> None:
    shapes = {name: tensor.shape for name, tensor in load_file(FLOAT / "model.safetensors").items()}
    linears = [shape for name, shape in shapes.items() if name.endswith("_proj.weight")]
    assert len(linears) == 7 * json.loads((INT4 / "config.json").read_text())["num_hidden_layers"]
    assert all(size % 128 == 0 for shape in linears for size in shape)


def test_training_text_follows_from_the_seed() -> None:
    def text(seed: int) -> str:
        rng = Random(seed)
        return "".join(segment for _ in range(20) for segment, _ in document(rng, 1200))

    assert text(1) == text(1) != text(2)


def test_the_held_out_file_is_what_the_generator_writes() -> None:
    written = evaluate.read_held_out()
    assert [line["question"] for line in written] == [problem.question for problem in held_out_problems()]
    assert len(written) > 800


def test_no_held_out_problem_is_trained_on() -> None:
    held_out = {line["key"] for line in evaluate.read_held_out()}
    rng = Random(3)
    trained = {training_problem(rng).key for _ in range(5000)}
    assert not held_out & trained
    # The split must bite: drawn without it, these problems do come up.
    assert held_out & {draw_problem("weekday", rng).key for _ in range(5000)}


def test_the_order_of_operands_does_not_change_the_side_of_the_split() -> None:
    rng = Random(0)
    sides: dict[frozenset[str], set[bool]] = {}
    for _ in range(20_000):
        problem = draw_problem("add", rng)
        operands = re.findall(r"\d+", problem.question)
        sides.setdefault(frozenset(operands), set()).add(is_held_out(problem))
    assert all(len(side) == 1 for side in sides.values())


@pytest.mark.parametrize("name", TASKS)
def test_questions_and_answers_are_whole(name: str) -> None:
    rng = Random(name)
    for _ in range(200):
        problem = draw_problem(name, rng)
        assert problem.question
        assert problem.answer
        assert not {"{", "}"} & set(problem.question + problem.answer), problem


def test_answers_are_right() -> None:
    """Worked out again here from the text alone."""
    rng = Random(7)
    for _ in range(300):
        added = draw_problem("add", rng)
        assert int(re.findall(r"\d+", added.answer)[-1]) == sum(map(int, re.findall(r"\d+", added.question)))
        product = draw_problem("multiply", rng)
        a, b = map(int, re.findall(r"\d+", product.question))
        assert all(eval(side) == a * b for side in product.answer.replace("×", "*").split(" = "))
        ordered = draw_problem("sort_numbers", rng)
        values = sorted(map(int, re.findall(r"\d+", ordered.question)))
        assert ordered.answer in (", ".join(map(str, values)), ", ".join(map(str, values[::-1])))


def test_nibbles_lie_in_gemm_order() -> None:
    assert awq.pack(torch.arange(8.0)[None]).item() == 0x75316420


def test_packing_round_trip() -> None:
    values = torch.randint(0, 16, (32, 64), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(awq.unpack(awq.pack(values)), values)


def test_rounding_errs_by_half_a_step_at_most() -> None:
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    restored = awq.from_awq(**awq.to_awq(weight))
    scales = awq.quantize(weight)[2].repeat_interleave(awq.GROUP_SIZE, 1)
    # The zero point is rounded too, so the outermost values may lie another half step off the grid.
    assert ((restored - weight).abs() <= scales * 1.01).all()
    assert ((restored - weight).abs() <= scales * 0.51).float().mean() > 0.99
    assert torch.equal(awq.fake_quantize(weight), restored)


def test_the_shipped_int4_is_the_rounded_16_bit_copy() -> None:
    expected = quantize_tensors(load_file(FLOAT / "model.safetensors"))
    shipped = load_file(INT4 / "model.safetensors")
    assert shipped.keys() == expected.keys()
    assert all(torch.equal(shipped[name], expected[name]) for name in expected)


def test_nybble_reads_the_same_weights() -> None:
    from nybble.formats.awq import Awq

    tensors = load_file(INT4 / "model.safetensors")
    raw = {name: tensors[f"model.layers.0.mlp.down_proj.{name}"] for name in ("qweight", "qzeros", "scales")}
    weight = Awq(awq.GROUP_SIZE).repack(raw, torch.float32)
    assert torch.equal(weight.dequantize(torch.float32), awq.from_awq(**raw))


def test_the_chat_template_renders_what_was_trained() -> None:
    from nybble.text.tokenizer import Tokenizer

    turns = [("Hi", "Hello! How can I help you?"), ("2 + 3", "")]
    segments = chat_segments(turns, system="Be brief.")[:-1]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help you?"},
        {"role": "user", "content": "2 + 3"},
    ]
    tokenizer = Tokenizer.load(INT4)
    rendered = tokenizer.render_chat(messages)
    assert rendered == "".join(text for text, _ in segments)
    # Training encodes piece by piece, the engine the whole: both must cut alike.
    assert tokenizer.encode(rendered) == [token for text, _ in segments for token in tokenizer.encode(text)]


def test_the_model_that_was_trained_is_qwen2() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = TinyConfig(vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
    ours = TinyModel(config).eval()
    theirs = Qwen2ForCausalLM(Qwen2Config(**config.hugging_face())).eval()
    theirs.load_state_dict(ours.state_dict() | {"lm_head.weight": ours.state_dict()["model.embed_tokens.weight"]})
    ids = torch.randint(0, 64, (2, 40))
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-5)


@pytest.mark.slow
def test_it_answers_right_in_16_and_in_4_bits() -> None:
    problems = evaluate.read_held_out(limit=200)
    float_share, int4_share = (
        evaluate.accuracy(path, problems, evaluate.answer_with_nybble)["all"] for path in (FLOAT, INT4)
    )
    assert float_share >= 0.92
    assert int4_share >= 0.92
    assert int4_share >= float_share - 0.03
