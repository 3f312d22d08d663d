"""Run a patch when a module is loaded, so that ``vllm --help`` does not pay for the scheduler."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_Patch = Callable[[ModuleType], None]
_waiting: dict[str, _Patch] = {}
_done: set[str] = set()
_searching: set[str] = set()


def after_import(name: str, patch: _Patch) -> None:
    """Call ``patch(module)`` once: now if the module is loaded, else right after it has been.

    Args:
        name: full module name.
        patch: what to do with the module.

    Raises:
        RuntimeError: the module is just being imported, so it can be patched neither now nor later.
    """
    if name in _done or name in _waiting:
        return
    module = sys.modules.get(name)
    if module is not None:
        if getattr(module.__spec__, "_initializing", False):
            raise RuntimeError(
                f"vllm-duo was to patch {name} while it is being imported: register the plugin "
                "before or after that import"
            )
        _done.add(name)
        patch(module)
        return
    _waiting[name] = patch
    if not any(isinstance(finder, _PatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PatchingFinder())


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Finds the waiting modules by the ordinary way and wraps their loaders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch = _waiting.get(fullname)
        if patch is None or fullname in _searching:
            return None
        _searching.add(fullname)  # the search below asks this finder once more
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            _searching.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        loader = spec.loader
        execute = loader.exec_module

        def exec_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)
            # Only now: a search without an import, or an import that failed, may be followed by
            # another.
            _waiting.pop(fullname, None)
            _done.add(fullname)

        loader.exec_module = exec_and_patch  # type: ignore[method-assign]
        return spec
