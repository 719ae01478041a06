"""Runs a parser over an answer cut into pieces, and checks what every list of deltas must hold."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from nybble.text.tool_calls import Arguments, CallBegin, Content, Delta, Tool, parser_for


class Answer(NamedTuple):
    content: str
    calls: list[tuple[str, str]]  # name, arguments


def tool(name: str, properties: dict[str, Any] | None = None, **more: Any) -> Tool:
    schema = {"type": "object", "properties": properties or {}, **more}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def joined(deltas: Iterable[Delta]) -> Answer:
    content: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for delta in deltas:
        if isinstance(delta, Content):
            assert delta.text
            content.append(delta.text)
        elif isinstance(delta, CallBegin):
            assert delta.index == len(calls)
            assert delta.id == f"id-{delta.index}"
            calls.append((delta.name, []))
        else:
            assert isinstance(delta, Arguments)
            assert delta.text
            assert delta.index == len(calls) - 1
            calls[-1][1].append(delta.text)
    return Answer("".join(content), [(name, "".join(arguments)) for name, arguments in calls])


def parse_deltas(form: str, pieces: Iterable[str], tools: Sequence[Tool], parallel: bool = True) -> list[list[Delta]]:
    """The deltas of each piece, and those at the end."""
    ids = itertools.count()
    parser = parser_for(form)(tools, parallel=parallel, new_id=lambda: f"id-{next(ids)}")
    deltas = [parser.push(piece) for piece in pieces]
    deltas.append(parser.finish())
    assert parser.num_calls == len(joined(itertools.chain(*deltas)).calls)
    for some in deltas:
        for delta, following in itertools.pairwise([*some, None]):
            if isinstance(delta, CallBegin):
                assert isinstance(following, Arguments)
    return deltas


def parse(form: str, pieces: Iterable[str], tools: Sequence[Tool] = (), parallel: bool = True) -> Answer:
    return joined(itertools.chain(*parse_deltas(form, pieces, tools, parallel)))


def parse_every_way(form: str, text: str, tools: Sequence[Tool] = (), parallel: bool = True) -> Answer:
    """The answer, which must be the same whole, by characters, and cut in two anywhere."""
    answer = parse(form, [text], tools, parallel)
    assert parse(form, text, tools, parallel) == answer
    for cut in range(len(text) + 1):
        assert parse(form, [text[:cut], text[cut:]], tools, parallel) == answer
    return answer


@st.composite
def cut_anywhere(draw: st.DrawFn, text: str) -> list[str]:
    """Pieces of a text, empty ones too."""
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


# Text that is likely to be mistaken for the formats' own.
tricky_text = st.lists(
    st.sampled_from(
        [
            "</tool_call>",
            "<tool_call>",
            "}",
            "{",
            '"',
            "\\",
            "\\u",
            ";",
            "</parameter>",
            "<|python_tag|>",
            "\n",
            "é",
            "🙂",
            "\x01",
        ]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    max_size=6,
).map("".join)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | tricky_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(tricky_text, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(tricky_text, json_values, max_size=4)
