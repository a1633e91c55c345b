"""`python -m liveavatar_engine.bench.compare.worker FOLDER`: one side of a comparison in a process of its own.

So each side finds an empty device, and whatever the reference's code leaves in a process ends with it. FOLDER holds
the job, and receives either the side's result or its error. The process ends when its input does: with its parent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...errors import ConfigError, LiveAvatarError
from .job import Job
from .sides import run_side

JOB, RESULT, TENSORS, ERROR, OUTPUT = "job.json", "result.json", "tensors.safetensors", "error.json", "output.txt"
"""Files of the folder; OUTPUT is what the process says."""


def main(folder: Path) -> int:
    try:
        measured, tensors = run_side(Job.from_json((folder / JOB).read_text(encoding="utf-8")))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
        (folder / RESULT).write_text(measured.to_json(), encoding="utf-8")
    except Exception as error:  # whatever the reference's code raises
        traceback.print_exc()
        (folder / ERROR).write_text(_told(error), encoding="utf-8")
        return 1
    return 0


def _told(error: Exception) -> str:
    """The error as JSON: its class among the engine's errors or null, its message, and the innermost place."""
    kind = type(error).__name__ if isinstance(error, LiveAvatarError) else None
    if isinstance(error, torch.OutOfMemoryError):
        kind = ConfigError.__name__
    message = (str(error) if kind else f"{type(error).__name__}: {error}").strip()
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{innermost.filename}, line {innermost.lineno}"
    return json.dumps({"kind": kind, "message": message.partition("\n")[0], "where": where})


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main(Path(sys.argv[1])))
