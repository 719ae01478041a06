"""Which format a checkpoint's calls have, as its chat template shows."""

from __future__ import annotations


def detect(chat_template: str) -> str | None:
    """A guess from the template's text: the name of a format, or None where it shows none that nybble reads."""
    text = chat_template.replace("\\", "")  # templates write JSON inside of string literals
    if "<function=" in text and "<parameter=" in text:
        return "qwen3_coder"
    # GLM also has <tool_call>, with <arg_key> inside.
    if "<tool_call>" in text and "arguments" in text and "<arg_key>" not in text:
        return "hermes"
    marks = ("<|python_tag|>", "<|start_header_id|>", "<|header_start|>")
    if '"parameters": ' in text and any(mark in text for mark in marks):
        return "llama3_json"
    return None
