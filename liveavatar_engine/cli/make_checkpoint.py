"""`make-checkpoint`: a complete checkpoint with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from .progress import bytes_in, writing_progress

PRESET_NAMES = ("tiny", "small", "14b")

_EXAMPLES = """examples:
  liveavatar-engine make-checkpoint --preset tiny build/tiny      a few MB, for trying things
  liveavatar-engine make-checkpoint --preset 14b /data/random     the real sizes, about 46 GB

The layout is the reference's: config.json, sharded safetensors, VAE, text encoder with tokenizer, wav2vec2.
Weights are random: the video is moving patterns. The folder appears when it is complete.
"""


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "make-checkpoint",
        help="make a checkpoint with random weights",
        description="Make a complete checkpoint with random weights in the reference's layout.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to make; must not exist or be empty")
    parser.add_argument("--preset", choices=PRESET_NAMES, required=True, help="sizes of the model")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (default 0)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from ..denoise.noise import check_seed
    from ..weights.create import create_checkpoint
    from ..weights.presets import PRESETS

    console = Console(stderr=True)
    with writing_progress(console) as progress:
        create_checkpoint(
            arguments.folder,
            PRESETS[arguments.preset],
            seed=check_seed(arguments.seed),
            progress=progress,
        )
    console.print(f"made {arguments.folder}: preset {arguments.preset}, {decimal(bytes_in(arguments.folder))}")
    return 0
