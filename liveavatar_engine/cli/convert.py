"""`convert`: a checkpoint that loads with no more work on its network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from .progress import bytes_in, writing_progress
from .settings import FP8_SKIP_HELP, byte_count, fp8_skip

_EXAMPLES = """examples:
  liveavatar-engine convert ckpt/Wan2.2-S2V-14B ckpt/liveavatar-fp8 --lora ckpt/LiveAvatar/liveavatar.safetensors
  liveavatar-engine convert ckpt/Wan2.2-S2V-14B ckpt/liveavatar-bf16 --lora lora.safetensors --precision bf16 --link

The result is a complete checkpoint, about half as large in fp8. Its network holds the same bits that the engine makes
of the original while loading it with these settings, and needs no --lora, --precision or --fp8-skip any more.
The folder appears when it is complete; Ctrl-C leaves nothing behind.
"""


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="merge a LoRA and quantise a checkpoint once, so that it loads faster",
        description="Write a checkpoint with a LoRA merged and linear layers in FP8, which loads without more work.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint in the reference's layout")
    parser.add_argument("target", type=Path, metavar="DST", help="folder to make; must not exist or be empty")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="LoRA adapter to merge (safetensors or PyTorch)")
    parser.add_argument("--precision", choices=("fp8", "bf16"), default="fp8", help="default %(default)s")
    parser.add_argument("--fp8-skip", metavar="NAME[,NAME...]", help=FP8_SKIP_HELP)
    parser.add_argument("--shard-size", default="5GB", metavar="N", help="of a file, e.g. 900MB (default %(default)s)")
    parser.add_argument("--link", action="store_true", help="hard-link the other parts instead of copying them")
    parser.add_argument("--device", default="auto", metavar="D", help="that quantises: auto, cpu, cuda or cuda:N")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from ..config import EngineConfig
    from ..pipeline.device import resolve_device
    from ..weights.convert import convert_checkpoint

    shard_bytes = byte_count(arguments.shard_size, "--shard-size")
    device = resolve_device(EngineConfig(devices=arguments.device).devices)
    console = Console(stderr=True)
    with writing_progress(console) as progress:
        convert_checkpoint(
            arguments.source,
            arguments.target,
            lora=arguments.lora,
            precision=arguments.precision,
            fp8_skip=None if arguments.fp8_skip is None else fp8_skip(arguments.fp8_skip),
            shard_bytes=shard_bytes,
            link=arguments.link,
            device=device,
            progress=progress,
        )
    console.print(f"wrote {arguments.target}: {arguments.precision}, {decimal(bytes_in(arguments.target))}")
    return 0
