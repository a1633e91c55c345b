"""The CUDA C++ extension `liveavatar_kernels._C`: is it there, why not, and its module. See csrc/README.md."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

_NAME = f"{__package__}._C"


def absent() -> str | None:
    """Why the extension is not there; None if it is, be it broken or not."""
    if importlib.util.find_spec(_NAME) is not None:
        return None
    here = Path(__file__).parent
    for_others = sorted(path.name for path in here.glob("_C.*.so"))
    if for_others:
        return f"built for another Python: {', '.join(for_others)}"
    note = here / "_C_absent.txt"  # from setup.py, where the extension was not built
    return note.read_text(encoding="utf-8").strip() if note.is_file() else "not built: make csrc builds it"


def load() -> ModuleType:
    """The extension's module. It loads without a GPU and without a driver.

    Raises:
        ImportError: it is absent, with the reason, or it is there and cannot be imported.
    """
    reason = absent()
    if reason is not None:
        raise ImportError(f"{_NAME} is absent ({reason})", name=_NAME)
    return importlib.import_module(_NAME)
