"""`nybble chat`: a conversation in the terminal."""

from __future__ import annotations

import importlib
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.commands.imports import import_llm
from nybble.commands.options import ModelArgument, with_flags
from nybble.core.errors import RequestError

if TYPE_CHECKING:
    from nybble.core.sampling import SamplingParams
    from nybble.llm import LLM

HELP = """\
/reset          forget the conversation
/system TEXT    set the system message (without TEXT: remove it) and start anew
/save FILE      write the conversation as JSON
/help           show this
/exit           leave; Ctrl-D does the same
Ctrl-C          stop the answer; what came so far stays in the conversation
//TEXT          send a message that begins with /
A line that ends with \\ goes on in the next one."""


@with_flags(without={"n", "logprobs", "prompt_logprobs"})
def chat(
    model: ModelArgument,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Chat with a model. Inside, /help shows the commands."""
    from nybble.core.sampling import SamplingParams

    SamplingParams(**sampling)  # nonsense shows before a large model is loaded
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _edit_lines()
        print(f"Loading {model} …", flush=True)
    with import_llm()(model, **engine) as llm:
        if llm.tokenizer is None or llm.tokenizer.chat_template is None:
            raise RequestError(f"{model} has no chat template; use `nybble generate {model} --raw`")
        if is_terminal:
            print("Ready. /help shows the commands, Ctrl-D leaves.\n")
        Chat(llm, llm.requests.default_params(**{"max_tokens": None, **sampling}), system).talk(is_terminal)


class Chat:
    """One conversation. Owns the messages."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def talk(self, is_terminal: bool) -> None:
        """Read and answer until the input ends."""
        while True:
            try:
                line = _read("> " if is_terminal else "")
            except EOFError:
                if is_terminal:
                    print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /exit leaves)")
                continue
            if line.startswith("/") and not line.startswith("//"):
                if not self.command(line):
                    return
            elif line.strip():
                self.answer(line[1:] if line.startswith("//") else line)

    def command(self, line: str) -> bool:
        """Carry out a /command. False: leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        match name:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self.reset()
                print("(a new conversation)")
            case "/system":
                self._system = argument or None
                self.reset()
                print("(system message set; a new conversation)" if argument else "(no system message any more)")
            case "/save":
                self._save(argument)
            case "/help":
                print(HELP)
            case _:
                print(f"(no command {name}; /help shows them, and /{name} sends it as a message)")
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to a message, and keep both. What is refused is not kept."""
        messages = [*self.messages, {"role": "user", "content": text}]
        parts: list[str] = []
        num_tokens = 0
        begin = time.perf_counter()
        error = finish_reason = None
        try:
            request = self._llm.requests.from_chat(messages, self._params)
            for deltas in self._llm.run([request]):
                for delta in deltas:
                    num_tokens += len(delta.token_ids)
                    parts.append(delta.text)
                    error = delta.error or error
                    finish_reason = delta.finish_reason or finish_reason
                    print(delta.text, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" (stopped)")
        except RequestError as refused:
            print(f"(not sent: {refused}; /reset starts anew)")
            return
        if error:
            print(f"(error: {error})")
            return
        if finish_reason == "length":
            print("(cut: the context or max_tokens is used up)")
        self.messages = [*messages, {"role": "assistant", "content": "".join(parts)}]
        if sys.stdout.isatty():
            rate = num_tokens / (time.perf_counter() - begin)
            print(f"\033[2m{num_tokens} tokens, {rate:,.0f} tokens/s\033[0m\n")

    def _save(self, file: str) -> None:
        if not file:
            print("(say where: /save FILE)")
            return
        text = json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n"
        try:
            Path(file).expanduser().write_text(text, encoding="utf-8", errors="replace")
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~nosuchuser; ValueError: a null byte
            print(f"(not saved: {getattr(error, 'strerror', None) or error})")
        else:
            print(f"(saved {len(self.messages)} messages to {file})")


def _read(prompt: str) -> str:
    """A message: one line, or several joined by a trailing backslash."""
    lines = []
    while True:
        line = input(prompt)
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
        prompt = "  " if prompt else ""


def _edit_lines() -> None:
    """Arrow keys and the history of this session, where Python was built with readline."""
    with suppress(ImportError):
        importlib.import_module("readline")  # this is what changes `input`
