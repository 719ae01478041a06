"""A profile in words: where a step's time goes and why, what dequantization, KV memory and communication have to do
with it, and what a larger batch would bring. Each sentence carries a figure of the document, or is not written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nybble.perf.profile_document import share_of
from nybble.perf.step_cost import Kind

Document = Mapping[str, Any]
Row = Mapping[str, Any]


def explain(document: Document) -> str:
    """The analysis as Markdown, a section a cause."""
    sections = {
        "Where the time goes": _times,
        "Memory or arithmetic": _bounds,
        "Dequantization": _dequantization,
        "KV memory": _kv_memory,
        "Communication": _communication,
        "Larger batches": _larger,
    }
    found = {title: list(write(document)) for title, write in sections.items()}
    bullets = {title: "\n".join(f"- {text}" for text in texts) for title, texts in found.items() if texts}
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in bullets.items()) + "\n"


def _decode(document: Document) -> list[Row]:
    return [row for row in document["steps"] if row["step"] == "decode"]


def _by_context(document: Document) -> dict[int, list[Row]]:
    """The decode steps of each context, the smallest batch first."""
    found: dict[int, list[Row]] = {}
    for row in _decode(document):
        found.setdefault(row["context_len"], []).append(row)
    return found


def _prefill(document: Document) -> list[Row]:
    return [row for row in document["steps"] if row["step"] == "prefill"]


def _times(document: Document) -> Iterator[str]:
    for row in document["steps"]:
        shares = sorted(row["kinds"], key=lambda kind: -kind["share"])
        most = ", ".join(f"{kind['kind']} {_percent(kind['share'])}" for kind in shares if kind["share"] >= 0.01)
        what = (
            f"A decode step of {_at(row)}" if row["step"] == "decode" else f"A prefill step of {row['tokens']:,} tokens"
        )
        if row["wall_ms"] is None:
            limit = f"{row['limit_tok_s']:,.0f} tok/s at the most"
            yield f"{what} takes {_ms(row['floor_ms'])} at the least ({limit}): {most}."
        else:
            yield (
                f"{what} takes {_ms(row['wall_ms'])} ({row['tok_s']:,.0f} tok/s): {most}. The floor is "
                f"{_ms(row['floor_ms'])}: the step reaches {_percent(row['of_floor'])} of what the machine allows."
            )
    for rows in _by_context(document).values():
        first, last = rows[0], rows[-1]
        risen = max(first["kinds"], key=lambda kind: share_of(last, kind["kind"]) - kind["share"])["kind"]
        gain = share_of(last, risen) - share_of(first, risen)
        if gain > 0.01:
            yield (
                f"From batch {first['batch']} to {last['batch']} at {first['context_len']:,} tokens of context what "
                f"grows most is {risen}: from {_percent(share_of(first, risen))} to {_percent(share_of(last, risen))} "
                "of the step."
            )


def _bounds(document: Document) -> Iterator[str]:
    machine = document["machine"]
    source = f"measured: {machine['how']}" if machine["is_measured"] else "what programs reach of its data sheet"
    yield (
        f"The machine reads {machine['read_bytes_per_second'] / 1e12:.3g} TB/s and computes "
        f"{machine['flops_per_second'] / 1e12:.3g} TFLOP/s ({source})."
    )
    crossover = document["crossover_batch"]
    if crossover is None:
        yield "The weights' products stay bound by memory past a batch of 65,536."
    elif crossover == 1:
        yield (
            "The weights' products are bound by arithmetic from a batch of 1 on: each sequence adds its own time, and "
            "sharing one reading of the weights saves none."
        )
    else:
        yield (
            f"By its weights this model is bound by memory below a batch of {crossover}: up to there sequences share "
            "one reading of the weights; from there on, bound by arithmetic, each adds its own time."
        )
    for row in document["steps"]:
        rate = row["bytes"] / ((row["wall_ms"] or row["floor_ms"]) * 1e-3)
        math = row["flops"] / ((row["wall_ms"] or row["floor_ms"]) * 1e-3)
        if row["wall_ms"] is not None:
            name = _at(row).capitalize() if row["step"] == "decode" else f"Prefill of {row['tokens']:,} tokens"
            used = (
                f"it uses {_percent(rate / machine['read_bytes_per_second'])} of the read rate and "
                f"{_percent(math / machine['flops_per_second'])} of the arithmetic"
            )
            if row["bound"] == "neither":
                yield f"{name} is bound by neither memory nor arithmetic: {used}. {_overheads(row)}"
            else:
                yield f"{name} is bound by {_bound(row['bound'])}: {used}."


def _overheads(row: Row) -> str:
    """What a step takes beyond its floor, by the three kinds that take most of it."""
    over = {kind["kind"]: (kind["measured_ms"] or 0.0) - kind["floor_ms"] for kind in row["kinds"]}
    most = sorted(over, key=lambda kind: -over[kind])[:3]
    listed = ", ".join(f"{kind} {_ms(over[kind])}" for kind in most if over[kind] > 0)
    return (
        f"Of {_ms(row['wall_ms'])} {_ms(row['wall_ms'] - row['floor_ms'])} lie above the floor: overheads "
        f"(launches, the host, kernels below their rooflines), most of them in {listed}."
    )


def _dequantization(document: Document) -> Iterator[str]:
    model, ideal = document["model"], document["dequantize_ms"]
    if not model["num_quantized_weights"]:
        return
    yield f"{_percent(model['num_quantized_weights'] / model['num_weights'])} of the weights are 4-bit codes."
    decode = _decode(document)
    if ideal is not None and decode:
        floor = next(kind for kind in decode[0]["kinds"] if kind["kind"] == "weight GEMMs")["floor_ms"]
        yield (
            f"Turning each into a number once keeps the integer lanes busy for {_ms(ideal)}, {_percent(ideal / floor)} "
            f"of the {_ms(floor)} that the products need at batch {decode[0]['batch']}: a kernel that does it while it "
            f"reads hides it, one that does not spends up to {_percent(ideal / (ideal + floor))} of its time on it."
        )
    for row in decode:
        kind = next((kind for kind in row["kinds"] if kind["kind"] == "weight GEMMs"), None)
        if kind is None or kind["measured_ms"] is None:
            continue
        over = max(0.0, kind["measured_ms"] - kind["floor_ms"])
        yield (
            f"In a decode step of {_at(row)} the products take {_ms(kind['measured_ms'])} against a floor of "
            f"{_ms(kind['floor_ms'])}: what dequantization costs beyond the reading, with launches and reductions, is "
            f"at most {_ms(over)}, {_percent(over / row['wall_ms'])} of the step."
        )
    for row in _prefill(document):
        share = share_of(row, "dequantization")
        if share:
            yield f"In prefill of {row['tokens']:,} tokens a kernel of its own does it: {_percent(share)} of the step."


def _kv_memory(document: Document) -> Iterator[str]:
    per_token, capacity = document["model"]["kv_bytes_per_token_per_device"], document["capacity"]
    decode = _decode(document)
    yield (
        f"A token keeps {per_token:,} bytes of keys and values on a device; there is room for "
        f"{capacity['kv_tokens']:,} tokens ({capacity['source']})."
    )
    by_context = _by_context(document)
    for length in by_context:
        yield f"That is {capacity['kv_tokens'] // length:,} sequences of {length:,}."
    yield from (f"{warning[0].upper()}{warning[1:]}." for warning in document["warnings"])
    if decode:
        listed = "; ".join(
            f"at {length:,} tokens of context {_listed_shares(rows, 'attention')}"
            for length, rows in by_context.items()
        )
        last, narrow = decode[-1], document["eight_bit_kv"]
        spared = narrow["spared_ms"]
        gain = (
            f"take {_ms(spared)} off attention's floor, {_percent(spared / (last['wall_ms'] or last['floor_ms']))} of "
            "the step,"
            if spared > 0
            else "not make attention faster, which is bound by arithmetic,"
        )
        yield (
            f"Reading them is attention's work, which no batch shares; of the step it takes {listed}. At 8 bits the "
            f"cache would hold {narrow['times_as_many_tokens']} times as many tokens and {gain} at {_at(last)}."
        )


def _listed_shares(rows: list[Row], kind: Kind) -> str:
    return ", ".join(f"{_percent(share_of(row, kind))} at batch {row['batch']}" for row in rows)


def _communication(document: Document) -> Iterator[str]:
    rows = [row for row in document["communication"] if row["num_devices"] > 1]
    if not rows:
        return
    link = document["machine"]["link_bytes_per_second"]
    listed = "; ".join(_split_words(rows, number) for number in sorted({row["num_devices"] for row in rows}))
    yield (
        f"Over a link of {link / 1e9:.0f} GB/s, with {document['machine']['link_seconds'] * 1e6:.0f} µs for each "
        f"exchange (both assumed, not measured), tensor parallel would spend at the least, at "
        f"{rows[0]['context_len']:,} tokens of context, {listed}."
    )


def _split_words(rows: list[Row], num_devices: int) -> str:
    own = [row for row in rows if row["num_devices"] == num_devices]
    listed = ", ".join(
        f"{_percent(row['share'])} at batch {row['batch']} ({row['speed_up']:.2f}× one device)" for row in own
    )
    return f"on {num_devices} devices {listed}"


def _larger(document: Document) -> Iterator[str]:
    for row in document["larger_batches"]:
        expected = (
            ""
            if row["expected_tok_s"] is None
            else f", {row['expected_tok_s']:,.0f} at the share of it that the largest batch reached"
        )
        fits = "" if row["fits"] else "; its sequences do not fit in KV memory"
        yield (
            f"{_at(row).capitalize()}: at most {row['limit_tok_s']:,.0f} tok/s{expected} "
            f"({row['gain_over_half']:.2f}× the limit of half the batch){fits}."
        )


def _at(row: Row) -> str:
    return f"batch {row['batch']} at {row['context_len']:,} tokens of context"


def _bound(bound: str) -> str:
    return {"memory": "memory", "compute": "arithmetic", "link": "the link between devices"}[bound]


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %" if share < 0.1 else f"{share * 100:.0f} %"


def _ms(milliseconds: float) -> str:
    if milliseconds >= 100:
        return f"{milliseconds:,.0f} ms"
    return f"{milliseconds:.3g} ms" if milliseconds >= 0.01 else f"{milliseconds * 1e3:.2g} µs"
