"""`import_xgrammar`: xgrammar without torch and transformers, which its package imports for parts not used here.

For the compiling process alone: so it starts in 0.3 s instead of 2 s and takes 60 MB instead of 260, and it is replaced
whenever a form was too much for it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

_LEFT_OUT = ("torch", "transformers")


class _Anything:
    """Stands for whatever is taken from a module that is left out."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


class _LeftOut(ModuleType):
    def __getattr__(self, name: str) -> type[_Anything]:
        return _Anything


def import_xgrammar() -> None:
    """Import it, so that later imports find it. Must come before any import of torch."""
    assert not any(name in sys.modules for name in _LEFT_OUT)
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # tvm_ffi, the library between, can do without
    import tvm_ffi  # noqa: F401

    for name in _LEFT_OUT:
        modules[name] = _LeftOut(name)
    import xgrammar  # noqa: F401

    for name in _LEFT_OUT:
        modules[name] = None
