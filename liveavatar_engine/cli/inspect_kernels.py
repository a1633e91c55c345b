"""`inspect --kernels`: what can compute each op on this machine, and why the rest cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from liveavatar_kernels import Entry


def show_kernels(console: Console) -> None:
    """Print a table of ops and implementations, and the versions that they run on."""
    import torch
    from liveavatar_kernels import catalog, extension

    from ..pipeline.device import preferred_kernels

    preferred = preferred_kernels()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    what = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    table = Table(title=f"kernels on this machine ({what})", title_justify="left")
    for heading in ("op", "implementation", "state"):
        table.add_column(heading)
    for entry in catalog(device):
        for row, (name, reason) in enumerate(entry.implementations.items()):
            state = _state(entry, name)
            table.add_row(entry.name if row == 0 else "", name, state, style="dim" if reason is not None else None)
        table.add_section()
    console.print(table)
    reason = extension.absent()
    console.print(f"liveavatar_kernels._C: {'there' if reason is None else reason}", markup=False, soft_wrap=True)
    console.print(f"LIVEAVATAR_KERNELS: {preferred or 'not set'}; torch {torch.__version__}, {_triton()}", markup=False)


def _state(entry: Entry, name: str) -> str:
    reason = entry.implementations[name]
    if reason is not None:
        return f"absent: {reason}"
    if name == entry.automatic[0]:
        return "picked by itself"
    return "picked where those above refuse a call" if name in entry.automatic else "there"


def _triton() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return "no Triton"
    return f"Triton {triton.__version__}"
