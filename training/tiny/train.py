"""Train `tiny` from nothing: writes a 16-bit Hugging Face checkpoint with its tokenizer.

The text is made while training, so nothing is seen twice, and batch *n* depends on the seed and *n* alone. In the last
third every second step runs with weights rounded to four bits: the one set of weights that comes out answers well both
as it is and after quantize.py. The command and the result that made the shipped model are in README.md.

    python -m training.tiny.train OUTPUT_DIRECTORY [--steps N] [--batch-tokens N] [--workers N]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset

from training.tiny.data import chat_segments, document, held_out_problems
from training.tiny.model import TinyConfig, TinyModel
from training.tiny.tokenizer import END_OF_TEXT, TURN_END, save_tokenizer, train_tokenizer

# Tokens in a row, and about how many characters fit. Short rows waste little on padding, long ones teach conversations.
SHORT, LONG = (128, 280), (512, 1250)
LONG_SHARE = 0.25
IGNORE = -100
PEAK_LEARNING_RATE, WARM_UP_STEPS, WEIGHT_DECAY = 2e-3, 300, 0.1
QUANTIZED_FROM = 2 / 3  # of all steps


def encode(tokenizer: Tokenizer, documents: list[list[tuple[str, bool]]], width: int) -> tuple[torch.Tensor, ...]:
    """Token ids and labels [documents, width], padded on the right, where causal attention never looks.

    Labels are shifted (position i holds the token that follows) and IGNORE where the model need not write.
    """
    pieces = iter(tokenizer.encode_batch([text for segments in documents for text, _ in segments]))
    ids = torch.zeros(len(documents), width + 1, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for row, segments in enumerate(documents):
        start = 0
        for _, learned in segments:
            piece = torch.tensor(next(pieces).ids[: width + 1 - start], dtype=torch.long)
            ids[row, start : start + len(piece)] = piece
            if learned:
                labels[row, start : start + len(piece)] = piece
            start += len(piece)
    return ids[:, :-1], labels[:, 1:]


class Batches(Dataset):
    """Batch number → (ids, labels). Each is made anew from the seed and its number, in whatever process asks."""

    def __init__(self, tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
        self.tokenizer, self.num_batches = tokenizer, arguments.steps
        self.seed, self.batch_tokens = arguments.seed, arguments.batch_tokens

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> tuple[torch.Tensor, ...]:
        rng = Random(f"{self.seed} {number}")
        width, characters = LONG if rng.random() < LONG_SHARE else SHORT
        documents = [document(rng, characters) for _ in range(self.batch_tokens // width)]
        return encode(self.tokenizer, documents, width)


def learning_rate(step: int, num_steps: int) -> float:
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return PEAK_LEARNING_RATE * warm_up * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(1, step / num_steps))))


class HeldOut:
    """Exact match on held-out questions without generating.

    Greedy decoding writes the reference answer exactly if each of its tokens is the argmax after the ones before it,
    so one forward over question and answer tells.
    """

    def __init__(self, tokenizer: Tokenizer, device: torch.device) -> None:
        documents = [chat_segments([(problem.question, problem.answer)]) for problem in held_out_problems()]
        self.ids, self.labels = (t.to(device) for t in encode(tokenizer, documents, width=144))

    @torch.no_grad()
    def accuracy(self, model: TinyModel, *, quantized: bool) -> float:
        """Share of right answers, with weights as they are or rounded to four bits."""
        model.set_quantized(quantized)
        batches = zip(self.ids.split(256), self.labels.split(256), strict=True)
        right = [((model(ids).argmax(-1) == labels) | (labels == IGNORE)).all(1) for ids, labels in batches]
        model.set_quantized(False)
        return torch.cat(right).float().mean().item()


def save(model: TinyModel, tokenizer: Tokenizer, directory: Path) -> None:
    """A 16-bit Hugging Face checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    end_of_text, turn_end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(TURN_END)
    config = {**model.config.hugging_face(), "torch_dtype": "float16"}
    config |= {"bos_token_id": None, "eos_token_id": turn_end, "pad_token_id": end_of_text}
    generation = {"do_sample": False, "eos_token_id": [turn_end, end_of_text], "pad_token_id": end_of_text}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    save_tokenizer(tokenizer, directory, model.config.max_position_embeddings)


def make_optimizer(model: TinyModel, device: torch.device) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=device.type == "cuda")


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = train_tokenizer(seed=arguments.seed)
    model = TinyModel(TinyConfig(vocab_size=tokenizer.get_vocab_size())).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
    held_out = HeldOut(tokenizer, device)
    optimizer = make_optimizer(model, device)
    batches = Batches(tokenizer, arguments)
    loader = DataLoader(batches, batch_size=None, num_workers=arguments.workers, pin_memory=device.type == "cuda")
    start, losses = time.monotonic(), []
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps)
        model.set_quantized(step >= QUANTIZED_FROM * arguments.steps and step % 2 == 0)
        loss = loss_of(model, *(tensor.to(device, non_blocking=True) for tensor in batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if (step + 1) % arguments.report_every == 0 or step + 1 == arguments.steps:
            report(step + 1, time.monotonic() - start, torch.stack(losses).mean().item(), model, held_out)
            save(model, tokenizer, arguments.output)
            losses.clear()


def loss_of(model: TinyModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the learned tokens; products in bfloat16 on a GPU, weights always float32."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        return F.cross_entropy(model(ids).flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


def report(step: int, seconds: float, loss: float, model: TinyModel, held_out: HeldOut) -> None:
    plain, rounded = held_out.accuracy(model, quantized=False), held_out.accuracy(model, quantized=True)
    accuracies = f"held-out {plain:.3f}  rounded {rounded:.3f}"
    print(f"step {step:6d}  {seconds:5.0f} s  loss {loss:.4f}  {accuracies}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=5775)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--report-every", type=int, default=500)
    parser.add_argument("--workers", type=int, default=0, help="processes that make text")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
