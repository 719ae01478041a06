"""Exact-match accuracy on the held-out questions, by task: the 16-bit checkpoint beside the int4 one.

Answers are generated greedily as one conversation of one turn, and must equal the reference letter by letter.

    python -m training.tiny.evaluate [--backend nybble|transformers] [--limit N] [CHECKPOINT ...]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from training.tiny.data import HELD_OUT_FILE, chat_segments

ROOT = Path(__file__).parents[2]
FLOAT_CHECKPOINT = ROOT / "tests/data/tiny-fp16"
INT4_CHECKPOINT = ROOT / "nybble/assets/tiny"
MOST_TOKENS = 200

Answer = Callable[[Path, list[str]], list[str]]  # checkpoint, prompts → completions


def read_held_out(limit: int | None = None) -> list[dict[str, str]]:
    """The held-out problems, or `limit` of them spread over all tasks."""
    problems = [json.loads(line) for line in HELD_OUT_FILE.read_text(encoding="utf-8").splitlines()]
    return problems[:: -(-len(problems) // limit)] if limit else problems


def answer_with_nybble(checkpoint: Path, prompts: list[str]) -> list[str]:
    from nybble import LLM, SamplingParams

    model = LLM(str(checkpoint))
    outputs = model.generate(prompts, SamplingParams(temperature=0.0, max_tokens=MOST_TOKENS))
    return [output.outputs[0].text for output in outputs]


def answer_with_transformers(checkpoint: Path, prompts: list[str]) -> list[str]:
    """Independent of nybble. Int4 weights are unpacked first, so this shows the checkpoint's own quality."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from training.tiny.awq import from_awq

    tensors = load_file(checkpoint / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        parts = {part: tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")}
        tensors[f"{module}.weight"] = from_awq(**parts)
    config = Qwen2Config.from_pretrained(checkpoint)
    config.quantization_config = None
    model = Qwen2ForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)
    assert missing in ([], ["lm_head.weight"]), missing  # tied to the embedding
    assert not unexpected, unexpected
    model.tie_weights()
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    ends = json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"]
    answers: list[str] = []
    for start in range(0, len(prompts), 256):
        batch = tokenizer(prompts[start : start + 256], return_tensors="pt", padding=True).to(model.device)
        batch.pop("token_type_ids", None)
        ids = model.generate(**batch, max_new_tokens=MOST_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=0)
        answers += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


BACKENDS: dict[str, Answer] = {"nybble": answer_with_nybble, "transformers": answer_with_transformers}


def accuracy(checkpoint: Path, problems: list[dict[str, str]], answer: Answer) -> dict[str, float]:
    """Share of right answers for each task, and under "all" over everything."""
    prompts = [chat_segments([(problem["question"], problem["answer"])])[0][0] for problem in problems]
    right: dict[str, list[bool]] = defaultdict(list)
    for problem, given in zip(problems, answer(checkpoint, prompts), strict=True):
        for group in (problem["task"], "all"):
            right[group].append(given == problem["answer"])
    return {group: sum(results) / len(results) for group, results in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="*", default=[FLOAT_CHECKPOINT, INT4_CHECKPOINT])
    parser.add_argument("--backend", choices=BACKENDS, default="nybble")
    parser.add_argument("--limit", type=int, help="ask only about so many questions")
    arguments = parser.parse_args()
    problems = read_held_out(arguments.limit)
    columns = [accuracy(path, problems, BACKENDS[arguments.backend]) for path in arguments.checkpoints]
    print(f"{'task':14}" + "".join(f"{path.name:>14}" for path in arguments.checkpoints))
    for group in sorted(columns[0], key=lambda name: (name == "all", name)):
        print(f"{group:14}" + "".join(f"{100 * column[group]:13.1f}%" for column in columns))


if __name__ == "__main__":
    main()
