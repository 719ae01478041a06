"""Training text for `tiny`: ChatML conversations made of the tasks, and the held-out questions that measure it.

Everything follows from a seed. A problem belongs to the held-out set or to the training text by a hash of its key
alone, so no held-out problem can occur in training in any wording, order of operands or number of turns.

    python -m training.tiny.data            # writes heldout.jsonl
    python -m training.tiny.data --show 5   # prints five training documents
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from training.tiny.tasks import TASKS, Problem, draw_problem
from training.tiny.vocabulary import CANNOT, NAMES, SMALL_TALK, SYSTEM_PROMPTS, TOPICS, UNKNOWN

HELD_OUT_SHARE = 20  # one problem in so many
HELD_OUT_FILE = Path(__file__).parent / "heldout.jsonl"
HELD_OUT_PER_TASK = 40

Turn = tuple[str, str]  # question, answer
Segment = tuple[str, bool]  # text, whether the model learns to write it


def is_held_out(problem: Problem) -> bool:
    if problem.key is None:
        return False
    return int.from_bytes(hashlib.sha256(problem.key.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def held_out_problems(per_task: int = HELD_OUT_PER_TASK, seed: int = 0) -> Iterator[Problem]:
    """`per_task` different questions of each task that has something to hold out, always the same."""
    for name in TASKS:
        rng = Random(f"held out {seed} {name}")
        seen: set[str] = set()
        for _ in range(20_000):
            problem = draw_problem(name, rng)
            if is_held_out(problem) and problem.question not in seen:
                seen.add(problem.question)
                yield problem
            if len(seen) == per_task:
                break


def training_problem(rng: Random) -> Problem:
    weights = [task.weight for task in TASKS.values()]
    while True:
        problem = draw_problem(rng.choices(list(TASKS), weights)[0], rng)
        if not is_held_out(problem):
            return problem


def small_talk(rng: Random) -> Turn:
    if rng.random() < 0.5:
        ways, answer = rng.choice(SMALL_TALK)
        return rng.choice(ways), answer
    return rng.choice(UNKNOWN).format(x=rng.choice(TOPICS)), CANNOT


def as_typed(question: str, rng: Random) -> str:
    """People leave out capitals and full stops, and some say please."""
    if rng.random() < 0.15:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15 and question[-1] in ".?!":
        question = question[:-1]
    elif rng.random() < 0.05 and question[-1] == ".":
        question = question[:-1] + ", please."
    return question


def turns(rng: Random) -> Iterator[Turn]:
    """An endless conversation: mostly tasks, some small talk, now and then a question about what was said before."""
    name = rng.choice(NAMES) if rng.random() < 0.1 else None
    if name:
        yield rng.choice(["My name is {}.", "I am {}.", "Hi, I am {}."]).format(name), f"Nice to meet you, {name}!"
    while True:
        kind = rng.random()
        if kind < 0.1:
            question, answer = small_talk(rng)
        elif kind < 0.12:
            question = "What is my name?"
            answer = f"Your name is {name}." if name else "You have not told me your name."
        else:
            problem = training_problem(rng)
            question, answer = problem.question, problem.answer
        yield as_typed(question, rng), answer
        if rng.random() < 0.05:
            yield rng.choice(["Say that again.", "Repeat your last answer.", "Once more, please."]), answer


def chat_segments(conversation: list[Turn], system: str | None = None) -> list[Segment]:
    """What the chat template of tokenizer.py renders, cut where the model's own words begin and end."""
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    segments: list[Segment] = []
    for question, answer in conversation:
        segments.append((f"{before}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False))
        segments.append((f"{answer}<|im_end|>", True))
        before = "\n"
    return segments


def document(rng: Random, most_characters: int) -> list[Segment]:
    """One training document of about `most_characters` at the most.

    Short ones are a single turn more often than not; one in eight is a bare question and answer without ChatML, so
    that plain completion works too.
    """
    if rng.random() < 1 / 8:
        question, answer = next(turns(rng))
        return [(question, False), (f"\n{answer}<|endoftext|>", True)]
    conversation: list[Turn] = []
    characters = 0
    want_one = rng.random() < (0.6 if most_characters < 1000 else 0.0)
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.1 else None
    for question, answer in turns(rng):
        characters += len(question) + len(answer) + 30
        if conversation and characters > most_characters:
            break
        conversation.append((question, answer))
        if want_one:
            break
    return chat_segments(conversation, system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", type=int, default=0, help="print so many training documents instead")
    arguments = parser.parse_args()
    if arguments.show:
        rng = Random(0)
        for _ in range(arguments.show):
            print("".join(text for text, _ in document(rng, 1200)), end="\n\n")
        return
    problems = list(held_out_problems())
    with HELD_OUT_FILE.open("w", encoding="utf-8") as file:
        for problem in problems:
            line = {"task": problem.task, "key": problem.key, "question": problem.question, "answer": problem.answer}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{len(problems)} held-out problems in {HELD_OUT_FILE}")


if __name__ == "__main__":
    main()
