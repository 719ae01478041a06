"""`Sandbox`: where chat templates run. They come with a checkpoint, so they may be hostile: besides jinja's own walls
there are limits on how long one computes and how large what it makes gets.

Nothing can stop a single operation of Python once it runs, so those that multiply (`*`, `**`, `%`, `~`, `+`, some
filters and methods) are sized first; calls, operators and each turn of a loop look at the clock.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from math import inf
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0
"""Of this thread's CPU time: a busy machine is not the template's fault."""

MAX_SIZE = 1 << 24
"""Characters of a text, or elements of a list: several times the longest context there is."""

MAX_BITS = 10_000
"""Of an integer; Python itself refuses to print longer ones."""

PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d*)(?:\.(\*|\d*))?")  # "%99s", "%(name)s", "%*.9f"
WIDE_FIELD = re.compile(r":[^{}]*(?:\{|\d{5,})")  # "{:99999}", "{:{}}"

_deadline: ContextVar[float] = ContextVar("deadline", default=inf)


class LimitError(jinja2.TemplateRuntimeError):
    """A template takes too long or makes something too large."""


@contextmanager
def time_limit() -> Iterator[None]:
    """What is rendered inside may compute for MAX_SECONDS."""
    token = _deadline.set(time.thread_time() + MAX_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(token)


class Sandbox(ImmutableSandboxedEnvironment):
    """The dialect of the Hugging Face ecosystem, within limits."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})  # these are not computed while compiling either

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols], finalize=_printable
        )
        self.filters["tojson"] = _to_json
        for name, size in GROWING_FILTERS.items():
            self.filters[name] = _sized(self.filters[name], size)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        size = GROWING_METHODS.get(getattr(__obj, "__name__", ""))
        owner = getattr(__obj, "__self__", None)
        if size is not None and isinstance(owner, str | bytes | int):
            args = tuple(list(item) if isinstance(item, Iterator) else item for item in args)  # sizing uses it up
            _check_size(size(owner, *args, **kwargs))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_time()
        _check_size(_result_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        if function is None:
            return None
        form = value.__self__

        @wraps(function)
        def sized(*args: Any, **kwargs: Any) -> str:
            num_fields = form.count("{")
            _check_size(inf if WIDE_FIELD.search(form) else num_fields * (9999 + _text_size([args, kwargs])))
            return function(*args, **kwargs)

        return sized

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Joins the whole text, and that of each block and macro."""
        total, kept = 0, []
        for piece in pieces:
            total += len(piece)
            _check_size(total)
            _check_time()
            kept.append(piece)
        return "".join(kept)

    @staticmethod
    def join_texts(*values: Any) -> str:
        """The operator `~`."""
        _check_size(sum(map(_text_size, values)))
        return "".join(map(str, values))

    @staticmethod
    def tick() -> None:
        """Called in every turn of a loop, for `call` looks at the clock."""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Watched().visit(super()._parse(source, name, filename))
        assert isinstance(tree, nodes.Template)
        tree.set_environment(self)
        return tree


class _Watched(NodeTransformer):
    """Watches what jinja does not let a sandbox intercept: loops get a `tick`, what is compared is sized, and
    `join_texts` takes the place of `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("join_texts", node.nodes, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        sides: list[nodes.Compare | nodes.Operand] = [node, *node.ops]
        for side in sides:
            if not isinstance(side.expr, nodes.Const):
                side.expr = _call("finalize", [side.expr], node.lineno)
        return node


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method, lineno=line), arguments, [], None, None, lineno=line)


class _GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}` marks the model's own words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja's interface)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without jinja's HTML escapes: models were trained on plain JSON."""
    _check_size(_text_size(value) * (1 + _width(options.get("indent"))))
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _printable(value: Any) -> Any:
    """What `{{ … }}` is about to write, or what is compared. A list may be small and yet endless as text, for it can
    hold one list many times."""
    if not isinstance(value, str):
        _check_size(_text_size(value))
    return value


def _check_time() -> None:
    if time.thread_time() > _deadline.get():
        raise LimitError(f"it computes for more than {MAX_SECONDS:g} s")


def _check_size(size: float) -> None:
    if size > MAX_SIZE:
        raise LimitError(f"it makes more than {MAX_SIZE:,} characters or elements")


def _text_size(value: Any) -> int:
    """About how long `value` is as text; not much more than MAX_SIZE is counted, so that this is quick."""
    total, pending = 0, [value]
    while pending and total <= MAX_SIZE:
        item = pending.pop()
        if isinstance(item, Namespace):
            raise LimitError("it uses a namespace as text")  # whose size nobody can see
        total += 16 + _length(item)
        if isinstance(item, Collection) and not isinstance(item, str | bytes | range) and total <= MAX_SIZE:
            pending.extend(item)
            if isinstance(item, Mapping):
                pending.extend(item.values())
    return total


def _length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 0


def _width(value: Any) -> int:
    return value if isinstance(value, int) else _length(value)


def _result_size(operator: str, left: Any, right: Any) -> float:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        return inf if bits > MAX_BITS else 0
    match operator:
        case "+":
            return _length(left) + _length(right)
        case "*":
            return max(_length(left) * _width(right), _width(left) * _length(right))
        case "%" if isinstance(left, str | bytes):
            return _formatted_size(left, right)
    return 0


def _formatted_size(form: Any, values: Any) -> float:
    fields = PERCENT_FIELD.findall(form if isinstance(form, str) else str(form))
    width = sum(inf if "*" in field else sum(int(number or 0) for number in field) for field in fields)
    return _length(form) + width + _text_size(values) * (len(fields) if isinstance(values, Mapping) else 1)


def _replaced_size(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> float:
    text, old, new = (item if isinstance(item, str | bytes) else str(item) for item in (text, old, new))
    return len(text) + (text.count(old) if type(text) is type(old) else 0) * len(new)


def _joined_size(values: Any, joint: Any) -> float:
    return _text_size(values) + _length(values) * _length(joint)


def _number(value: Any) -> float:
    return value if isinstance(value, int) else 0


GROWING_METHODS: dict[str, Callable[..., float]] = {
    "center": lambda text, width=0, *_: _number(width),
    "ljust": lambda text, width=0, *_: _number(width),
    "rjust": lambda text, width=0, *_: _number(width),
    "zfill": lambda text, width=0: _number(width),
    "expandtabs": lambda text, tabsize=8: text.count("\t") * _number(tabsize),
    "replace": _replaced_size,
    "join": lambda joint, values=(): _joined_size(values, joint),
    "to_bytes": lambda number, length=1, *_, **__: _number(length),
}
"""Methods of texts and numbers → how large their result gets."""

GROWING_FILTERS: dict[str, Callable[..., float]] = {
    "batch": lambda value, linecount, fill_with=None: _number(linecount),
    "center": lambda value, width=80: _number(width),
    "format": lambda value, *args, **kwargs: _formatted_size(value, kwargs or args),
    "indent": lambda text, width=4, *_, **__: (str(text).count("\n") + 1) * _width(width),
    "join": lambda values, d="", attribute=None: _joined_size(values, d),
    "pprint": lambda value: _text_size(value),
    "replace": _replaced_size,
    "round": lambda value, precision=0, method="common": inf if abs(_number(precision)) > 1000 else 0,
    "slice": lambda value, slices, fill_with=None: _number(slices),
    "string": lambda value: _text_size(value),
    "sum": lambda values, attribute=None, start=0: 0 if isinstance(start, int | float) else inf,
    "wordwrap": lambda text, width=79, break_long_words=True, wrapstring=None, *_: len(text) * _length(wrapstring),
}


def _sized(function: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
    """The filter, refusing what gets too large. Some of jinja's take the context first, which `wraps` keeps so."""
    num_own = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def sized(*args: Any, **kwargs: Any) -> Any:
        _check_time()
        own, given = args[:num_own], list(args[num_own:])
        if isinstance(given[0], Iterator):  # counting would use it up
            given[0] = list(given[0])
        _check_size(size(*given, **kwargs))
        return function(*own, *given, **kwargs)

    return sized
