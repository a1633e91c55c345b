"""The command line: `liveavatar-engine` and `python -m liveavatar_engine`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import LiveAvatarError
from . import convert, generate, inspect, make_checkpoint

EXIT_ERROR = 2
EXIT_INTERRUPTED = generate.EXIT_INTERRUPTED

_EXAMPLES = """examples:
  liveavatar-engine make-checkpoint --preset tiny build/tiny
  liveavatar-engine inspect build/tiny
  liveavatar-engine convert build/tiny build/tiny-fp8
  liveavatar-engine generate --checkpoint build/tiny --image a.jpg --audio a.wav --out a.mp4
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command's parser holds its function as `run`."""
    parser = argparse.ArgumentParser(
        prog="liveavatar-engine",
        description="Live Avatar: a portrait, speech and a prompt in, talking video out.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the engine does")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (generate, make_checkpoint, convert, inspect):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for an error (one line on stderr), 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s" if not arguments.verbose else "%(asctime)s %(name)s: %(message)s",
    )
    try:
        return arguments.run(arguments)
    except LiveAvatarError as error:
        sys.stderr.write(f"liveavatar-engine: error: {error}\n")
        return EXIT_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("liveavatar-engine: interrupted; nothing was written\n")
        return EXIT_INTERRUPTED
