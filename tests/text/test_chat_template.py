"""Chat templates: the same text as transformers renders, and clear errors."""

import re
from pathlib import Path
from typing import Any

import pytest
from support.small_tokenizers import CHATML, byte_level_tokenizer_json, write_tokenizer

from nybble.core.errors import ModelError, RequestError
from nybble.text.tokenizer import Tokenizer

# In the manner of Qwen2.5: a default system prompt, tools as JSON, tool results inside user turns.
QWEN_LIKE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nBe brief & kind.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{% continue %}{% endif %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

# In the manner of Llama 3: bos_token, trimmed contents, indented blocks that lstrip_blocks must swallow.
LLAMA_LIKE = """\
{{ bos_token }}
{% for message in messages %}
    {% if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message['role']) }}
    {% endif %}
    {% generation %}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {% endgeneration %}
    {% if loop.index > 50 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>

{% endif %}
"""

TOOL = {"type": "function", "function": {"name": "weather", "description": "Now & <here>", "parameters": {"ü": []}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": {"a": 1}}}]}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <b>&amp;</b> 'there'"}],
    [{"role": "system", "content": "Be terse."}, {"role": "user", "content": " padded "}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b  "}, {"role": "user", "content": "c\n"}],
]


def load(path: Path, template: object, **settings: object) -> Tokenizer:
    settings = {
        "bos_token": "<|endoftext|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        **settings,
    }
    return Tokenizer.load(write_tokenizer(path, byte_level_tokenizer_json(), chat_template=template, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("template", [CHATML, QWEN_LIKE, LLAMA_LIKE], ids=["chatml", "qwen", "llama"])
def test_same_text_as_transformers(tmp_path: Path, template: str) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = load(tmp_path, template)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    cases: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []
    for messages in CONVERSATIONS:
        cases += [(messages, {"add_generation_prompt": flag}) for flag in (True, False)]
    for messages in CONVERSATIONS[2:]:
        cases += [(messages[:2], {"add_generation_prompt": False, "continue_final_message": True})]
    if template == QWEN_LIKE:
        cases += [([*CONVERSATIONS[1], CALL, {"role": "tool", "content": "{}"}], {"tools": [TOOL]})]
        cases += [(CONVERSATIONS[0], {"enable_thinking": False})]
    for messages, options in cases:
        options = {"add_generation_prompt": True, **options}
        assert tokenizer.render_chat(messages, **options) == theirs.apply_chat_template(
            messages, tokenize=False, **options
        ), (messages, options)


def test_chatml(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, CHATML)
    assert (
        tokenizer.render_chat([{"role": "user", "content": "1 < 2"}])
        == "<|im_start|>user\n1 < 2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_parts_are_joined(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, CHATML)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb<" in tokenizer.render_chat([{"role": "user", "content": parts}])
    with pytest.raises(RequestError, match=r"messages\[0\].content: parts must be .* got 'image_url'"):
        tokenizer.render_chat([{"role": "user", "content": [{"type": "image_url"}]}])


def test_where_templates_come_from(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "x"}]
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    tokenizer = load(tmp_path, named)
    assert tokenizer.render_chat(user) == "plain"
    assert tokenizer.render_chat(user, tools=[TOOL]) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools from the file")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.render_chat(user) == "from the file"
    assert tokenizer.render_chat(user, tools=[TOOL]) == "tools from the file"


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        load(tmp_path, None).render_chat([{"role": "user", "content": "x"}])
    with pytest.raises(RequestError, match="no default chat template, only rag"):
        load(tmp_path, [{"name": "rag", "template": ""}]).render_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [("{% if %}", "line 1"), (5, "must be a string or a list"), ([{"name": "default"}], "must be a string or a list")],
)
def test_broken_templates(tmp_path: Path, template: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(tmp_path, template)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must not be empty"),
        ("hello", "must be a list of dicts, got str"),
        ([5], r"messages\[0\] must be a dict"),
        ([{"content": "x"}], r"messages\[0\] needs a role"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be text"),
        ([{"role": "user", "content": object()}], r"messages\[0\] must be plain JSON data"),
        ([{"role": "wizard", "content": "x"}], "unknown role wizard"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: Any, message: str) -> None:
    tokenizer = load(tmp_path, LLAMA_LIKE)
    with pytest.raises(RequestError, match=message) as raised:
        tokenizer.render_chat(messages)
    assert raised.value.parameter == "messages"


def test_continuing_needs_an_open_text(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, CHATML)
    user = [{"role": "user", "content": "x"}]
    with pytest.raises(RequestError, match="set one"):
        tokenizer.render_chat(user, continue_final_message=True)
    with pytest.raises(RequestError, match="needs a last message with text"):
        tokenizer.render_chat([{"role": "assistant"}], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(RequestError, match="left the last message out"):
        load(tmp_path, "nothing").render_chat(user, add_generation_prompt=False, continue_final_message=True)


def test_a_template_that_falls_over_says_so(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"refused these messages: .*content"):
        load(tmp_path, CHATML).render_chat([{"role": "user"}])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
    ],
)
def test_the_sandbox_holds(tmp_path: Path, attack: str) -> None:
    with pytest.raises(RequestError, match="refused these messages"):
        load(tmp_path, attack).render_chat([{"role": "user", "content": "x"}])


RANGE = "range(99999)"
ENDLESS = {
    "a product": '{{ "x" * 10**10 }}',
    "a product the other way": '{{ 10000000000 * "x" }}',
    "a power": "{{ 9 ** 999999999 }}",
    "growing integers": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "loops that write nothing": f"{{% for a in {RANGE} %}}{{% for b in {RANGE} %}}{{% endfor %}}{{% endfor %}}",
    "loops over one list": f"{{% set r = {RANGE} | list %}}{{% for a in r %}}{{% for b in r %}}{{% endfor %}}"
    "{% endfor %}",
    "loops that write": f"{{% for a in {RANGE} %}}{{% for b in {RANGE} %}}xxxxxxxxxx{{% endfor %}}{{% endfor %}}",
    "doubling by +": "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by set": "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set y %}{{ n.x }}{{ n.x }}"
    "{% endset %}{% set n.x = y %}{% endfor %}",
    "doubling by join": "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] | join %}"
    "{% endfor %}",
    "a list of lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "comparing lists of lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "a namespace": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n }}",
    "JSON of a list of lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x | tojson | length }}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "percent": "{{ '%9999999999d' % 5 }}",
    "a format filter": "{{ '%*d' | format(9999999999, 5) }}",
    "a format": "{{ '{:>9999999999}'.format(5) }}",
    "a nested format": "{{ '{:>{}}'.format(5, 9999999999) }}",
    "padding": "{{ 'x'.ljust(9999999999) }}",
    "bytes": "{{ (1).to_bytes(9999999999) | length }}",
    "a center filter": "{{ 'x' | center(9999999999) }}",
    "an indent filter": "{{ 'x' | indent(9999999999, true) }}",
    "a replacement": "{% set x = 'x' * 9999999 %}{{ x.replace('x', x) }}",
    "a replace filter": "{% set x = 'x' * 9999999 %}{{ x | replace('x', x) }}",
    "a join": "{% set x = 'x' * 9999 %}{{ x.join(range(9999) | map('string')) }}",
    "rounding": "{{ 1.5 | round(9999999999, 'ceil') }}",
    "a slice filter": "{{ [1] | slice(9999999999) | list }}",
}


@pytest.mark.parametrize("what", ENDLESS)
@pytest.mark.timeout(60)
def test_no_template_computes_for_ever(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.text.template_sandbox.MAX_SECONDS", 0.2)
    with pytest.raises(
        RequestError, match=r"refused these messages: (it (computes|makes) .*more than|it uses a name|Range too)"
    ):
        load(tmp_path, ENDLESS[what]).render_chat([{"role": "user", "content": "x"}])


def test_what_the_limits_watch_still_works(tmp_path: Path) -> None:
    template = (
        "{{ '=' * 3 }}{{ 'a' ~ 1 ~ none }}{{ '%s-%03d' % ('x', 7) }}{{ '{} {:>3}'.format(1, 2) }}"
        "{{ ', '.join(['b', 'c'] | map('upper')) }}{{ ['d', 'e'] | map('upper') | join('+') }}{{ 'x\ny' | indent(2) }}"
        "{{ 'aXbX' | replace('X', '__') }}{{ 2 ** 5 }}{{ [1] + [2] }}{{ 'k'.center(3) }}{{ 7 % 4 }}"
        "{{ 2.345 | round(1) }}"
        "{% for x in [1, 2] recursive %}{{ loop.index }}/{{ loop.length }}{% if x == 2 %}{{ loop([5]) }}{% endif %}"
        "{% else %}none{% endfor %}{% for x in [] %}{% else %}none{% endfor %}{{ [1, 2] | sum }}"
        "{{ {'a': [1]} | tojson }}"
    )
    shown = load(tmp_path, template).render_chat([{"role": "user", "content": "x"}])
    assert shown == ("===a1Nonex-0071   2B, CD+Ex\n  ya__b__32[1, 2] k 32.3" + '1/22/21/1none3{"a": [1]}')


def test_endless_recursion_and_damaged_files_name_the_template(tmp_path: Path) -> None:
    recursion = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    load(tmp_path, None)
    file = tmp_path / "chat_template.jinja"
    file.write_text(recursion)
    with pytest.raises(RequestError, match=rf"it recurses too deeply \({re.escape(str(file))}\)"):
        Tokenizer.load(tmp_path).render_chat([{"role": "user", "content": "x"}])
    file.write_text("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")
    with pytest.raises(ModelError, match=rf"{re.escape(str(file))}: nested too deeply"):
        Tokenizer.load(tmp_path)
    file.write_bytes(b"\xff")
    with pytest.raises(ModelError, match=rf"{re.escape(str(file))} cannot be read as UTF-8"):
        Tokenizer.load(tmp_path)
