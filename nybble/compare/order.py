"""Whether targets can take turns (A B A B), or must run one after the other because memory may not hold all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from nybble.compare.recipe import TargetSpec

MOST_SHARE = 0.95
"""Of a GPU that engines may fill together; the rest is their contexts'."""
WHOLE_SHARE = "--gpu-memory-utilization"
"""The one flag whose share is of the whole GPU, so that shares of several engines can be added."""


def choose_order(specs: Sequence[TargetSpec], *, has_gpu: bool) -> tuple[Literal["interleaved", "blocks"], str]:
    """The order, and why."""
    started = [spec for spec in specs if spec.recipe is not None]
    if len(started) < 2:
        return "interleaved", "no two engines are started"
    if not has_gpu:
        return "interleaved", "no GPU is shared"
    devices = [_devices(spec) for spec in started]
    if all(devices) and len(set().union(*devices)) == sum(len(each) for each in devices):
        return "interleaved", "CUDA_VISIBLE_DEVICES gives each engine GPUs of its own"
    shares = [_share(spec) for spec in started]
    known = [share for share in shares if share is not None]
    if len(known) == len(shares) and sum(known) <= MOST_SHARE:
        return "interleaved", f"{WHOLE_SHARE} adds up to {sum(known):g}"
    return "blocks", (
        f"engines may fill the GPU they share (give each a {WHOLE_SHARE}, together at most {MOST_SHARE:g}, or a recipe "
        "with CUDA_VISIBLE_DEVICES in env)"
    )


def _devices(spec: TargetSpec) -> set[str]:
    assert spec.recipe is not None
    return {name.strip() for name in spec.recipe.env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()}


def _share(spec: TargetSpec) -> float | None:
    """What the target's flags say last."""
    assert spec.recipe is not None
    words = [*spec.recipe.command, *spec.flags]
    found = None
    for index, word in enumerate(words):
        flag, is_joined, value = word.partition("=")
        if flag == WHOLE_SHARE:
            found = value if is_joined else (words[index + 1] if index + 1 < len(words) else "")
    try:
        return None if found is None else float(found)
    except ValueError:
        return None
