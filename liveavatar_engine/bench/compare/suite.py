"""The suite `compare` of the benchmark: its options, and a comparison as a run."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..bench import Bench
from ..results import Run
from ..settings import Settings
from .run import COMPILE, REFERENCE_PRECISIONS, run_compare


@dataclass(frozen=True)
class CompareOptions:
    """What the suite asks for besides an engine's settings; see `run_compare`."""

    reference: Path
    precision: str = "auto"
    compile: str = "auto"

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> CompareOptions | None:
        """What `add_arguments` has read; None without `--reference`."""
        if arguments.reference is None:
            return None
        return cls(arguments.reference, arguments.reference_precision, arguments.reference_compile)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's arguments."""
    group = parser.add_argument_group("suite compare")
    group.add_argument(
        "--reference", type=Path, metavar="DIR", help="checkout of the reference, Live Avatar's own code"
    )
    group.add_argument(
        "--reference-precision",
        choices=REFERENCE_PRECISIONS,
        default="auto",
        help="default auto: the engine's; fp8 is the reference's own, one scale per tensor",
    )
    group.add_argument(
        "--reference-compile",
        choices=COMPILE,
        default="auto",
        help="torch.compile as the reference's scripts use it (default auto: on a GPU)",
    )


def measure(options: CompareOptions, settings: Settings, bench: Bench) -> Run:
    """Compare at one point.

    Raises:
        InputError, ConfigError, CheckpointError: as `run_compare`.
    """
    bench.forget()
    return run_compare(
        options.reference,
        settings,
        reference_precision=options.precision,
        reference_compile=options.compile,
        say=bench.say,
    ).as_run()
