"""What a contract asks of one of vLLM's symbols, and where vLLM has the symbol."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str | None]


def takes(*names: str) -> Check:
    """The callable has these parameters."""

    def check(symbol: Any) -> str | None:
        lost = [name for name in names if name not in inspect.signature(symbol).parameters]
        return f"lost the parameters {lost}" if lost else None

    return check


def members(*names: str) -> Check:
    """The class has these fields, properties, methods or enum members."""

    def check(symbol: Any) -> str | None:
        fields = {name for c in symbol.__mro__ for name in vars(c).get("__annotations__", ())}
        lost = [name for name in names if name not in fields and not hasattr(symbol, name)]
        return f"lost the members {lost}" if lost else None

    return check


def sets(*names: str, by: str = "__init__") -> Check:
    """The class's constructor sets these attributes."""

    def check(symbol: Any) -> str | None:
        source = inspect.getsource(getattr(symbol, by))
        lost = [name for name in names if f"self.{name}" not in source]
        return f"no longer sets {lost}" if lost else None

    return check


def is_(value: Any) -> Check:
    return lambda symbol: None if symbol == value else f"is {symbol!r} instead of {value!r}"


def names(*globals_: str) -> Check:
    """The function looks these names up, so that replacing them in its module takes effect."""

    def check(symbol: Any) -> str | None:
        lost = [name for name in globals_ if name not in inspect.getsource(symbol)]
        return f"no longer uses {lost}" if lost else None

    return check


def beside(*lines: str) -> Check:
    """The symbol's module has these lines."""

    def check(symbol: Any) -> str | None:
        source = inspect.getsource(inspect.getmodule(symbol))
        lost = [line for line in lines if line not in source]
        return f"no longer has {lost} beside it" if lost else None

    return check


def find(symbol: str) -> Any:
    """The symbol as vLLM has it, also where this process has patched it already."""
    module, _, path = symbol.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    if getattr(found, "__module__", "").startswith("vllm_duo.compat"):
        kept = inspect.getclosurevars(inspect.unwrap(getattr(found, "__func__", found))).nonlocals
        return kept.get("original") or kept[path.split(".")[-1]]
    return found
