"""`generate`: an image and speech to an mp4."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ..config import EngineConfig
from ..config.engine import DEFAULT_SEED, PRECISIONS, VAE_PRECISIONS
from ..config.geometry import FRAMES_PER_SECOND
from ..errors import ConfigError, InputError
from ..files import check_writable
from .settings import FP8_SKIP_HELP, OFFLOAD_HELP, devices, fp8_skip, offload, stage_ms

if TYPE_CHECKING:
    from ..pipeline.engine import Engine
    from ..pipeline.session import Session

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143

_EXAMPLES = """examples:
  liveavatar-engine generate --checkpoint ckpt/Wan2.2-S2V-14B --lora ckpt/LiveAvatar/liveavatar.safetensors \\
      --image face.jpg --audio speech.wav --prompt "A man talks to the camera" --out face.mp4
  liveavatar-engine generate --checkpoint build/tiny --image two.png --audio left.wav+right.wav \\
      --actor-mask left.png+right.png --size 512x512 --max-blocks 10 --out two.mp4

  liveavatar-engine generate --checkpoint ckpt/Wan2.2-S2V-14B --image face.jpg --audio speech.wav --out face.mp4 \\
      --devices cuda:0,cuda:1,cuda:2,cuda:3,cuda:4 --trace timeline.json
  torchrun --nproc-per-node 5 -m liveavatar_engine generate --checkpoint ckpt/Wan2.2-S2V-14B --image face.jpg \\
      --audio speech.wav --out face.mp4

--devices spreads the denoise steps and the decoder over several devices; `inspect --devices` shows how. In a torchrun
job these are the job's own, and its first process writes the video.
--size W*H is an area: the video keeps the image's aspect ratio, with sides that are multiples of 64.
--size WxH is exact: both sides multiples of 16. The image's shorter side becomes the shorter of both; what is too
long is cropped, what is too short gets black bars.
Ctrl-C ends the video where it is and leaves a playable file (exit code 130). SIGTERM lets what is under way be
finished first (143).
"""


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="make a talking video from an image and speech",
        description="Make a talking video from an image and speech.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="checkpoint in the reference's layout"
    )
    files.add_argument(
        "--vae", type=Path, metavar="FILE", help="decode with this light decoder's weights (docs/light-decoder.md)"
    )
    files.add_argument("--lora", type=Path, metavar="FILE", help="LoRA adapter to merge (safetensors or PyTorch)")
    files.add_argument("--image", type=Path, required=True, metavar="F", help="portrait: png, jpeg, webp")
    files.add_argument(
        "--audio", required=True, metavar="F[+F...]", help="speech: any audio or video file; one per actor, joined by +"
    )
    files.add_argument("--actor-mask", metavar="F[+F...]", help="where each actor is: one mask image per audio file")
    files.add_argument("--pose-video", type=Path, metavar="F", help="video whose frames steer the pose")
    files.add_argument("--out", type=Path, required=True, metavar="F.mp4", help="the video to write")
    files.add_argument("--trace", type=Path, metavar="F", help="timeline of several devices, for ui.perfetto.dev")
    scene = parser.add_argument_group("scene")
    scene.add_argument("--prompt", default="", metavar="T", help="what the scene shows (default: nothing said)")
    scene.add_argument("--size", default=EngineConfig.size, metavar="W*H|WxH", help="default %(default)s")
    scene.add_argument("--seed", type=int, default=DEFAULT_SEED, metavar="N", help="default %(default)s")
    scene.add_argument("--max-blocks", type=int, metavar="N", help="stop after N blocks of 0.48 s")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--steps", type=int, default=EngineConfig.steps, metavar="N", help="denoise steps (default 4)")
    engine.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto", help="default: bf16 on a GPU, fp32 on a CPU"
    )
    engine.add_argument(
        "--kv-precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of ring and sink (default: fp32 with fp32, else bf16)",
    )
    engine.add_argument(
        "--vae-precision",
        choices=("auto", *VAE_PRECISIONS),
        default="auto",
        help="of the VAE's decoder (default: fp32 with fp32, else bf16)",
    )
    engine.add_argument("--fp8-skip", metavar="NAME[,NAME...]", help=FP8_SKIP_HELP)
    engine.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default auto)")
    engine.add_argument("--devices", metavar="N|A,B...", help="several devices: how many GPUs, or which")
    engine.add_argument(
        "--sequence-parallel", type=int, default=1, metavar="K", help="devices that share a step (default 1)"
    )
    engine.add_argument(
        "--stage-ms", metavar="STEP,DECODE", help="measured ms of a step and of a block's decode, to spread work by"
    )
    engine.add_argument("--offload", metavar="PART[,PART...]", help=OFFLOAD_HELP)
    engine.add_argument(
        "--features", choices=("global", "windowed"), default="global", help="how audio is encoded (default global)"
    )
    engine.add_argument(
        "--sink-distance",
        default="random",
        metavar="random|4..30",
        help="distance of the reference image (default random)",
    )
    engine.add_argument(
        "--sink-update-after",
        default="4",
        metavar="N|never",
        help="blocks after which the first generated frame becomes the reference (default 4; the paper: 1)",
    )
    engine.add_argument(
        "--schedule",
        choices=("sequential", "diagonal"),
        default="sequential",
        help="diagonal: more frames per second, each block later (default sequential)",
    )
    engine.add_argument(
        "--kv-mode",
        choices=("timestep", "clean"),
        default="timestep",
        help="a ring per denoise step, or one of clean keys at the price of one more evaluation (default timestep)",
    )
    engine.add_argument("--no-graphs", action="store_true", help="don't capture CUDA graphs")
    engine.add_argument("--no-motion-tokens", action="store_true", help="leave the packed motion tokens out")
    engine.add_argument(
        "--watermark", metavar="MODULE:FUNCTION", help="function(frames, first_index) -> frames, applied before writing"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from ..media import Mp4Writer, Soundtrack, load_image, probe_audio
    from ..media.part_file import PartFile

    config = _engine_config(arguments)
    if not _leads():
        _load(arguments, config, Console(quiet=True)).close()
        return 0
    audio = _paths(arguments.audio)
    masks = _paths(arguments.actor_mask) if arguments.actor_mask is not None else None
    watermark = _watermark(arguments.watermark)
    PartFile(arguments.out).discard()
    if arguments.trace is not None:
        check_writable(arguments.trace)
    load_image(arguments.image)
    for path in audio:
        probe_audio(path)

    console = Console(stderr=True)
    with _load(arguments, config, console) as engine:
        with console.status("preparing the portrait"):
            session = engine.generate(
                arguments.image,
                audio,
                arguments.prompt,
                seed=arguments.seed,
                pose_video=arguments.pose_video,
                actor_masks=masks,
                max_blocks=arguments.max_blocks,
            )
        with (
            session,
            _Termination(engine.drain) as termination,
            Soundtrack(audio) as soundtrack,
            Mp4Writer(
                arguments.out, session.width, session.height, soundtrack=soundtrack, watermark=watermark
            ) as writer,
        ):
            interrupted = _write_blocks(session, writer.write, console)
    done = f"{writer.frames_written} frames, {writer.frames_written / FRAMES_PER_SECOND:.2f} s"
    if interrupted or termination.came:
        kept = f"kept what was made in {arguments.out}: {done}" if writer.frames_written else "nothing was written"
        console.print(f"{'interrupted' if interrupted else 'terminated'}; {kept}")
        return EXIT_INTERRUPTED if interrupted else EXIT_TERMINATED
    console.print(f"wrote {arguments.out}: {session.width}x{session.height}, {done}")
    return 0


def _leads() -> bool:
    """Whether this process makes the video; in a torchrun job, the first one does, and the others work for it."""
    from ..pipeline.tpp.job import Job

    job = Job.current()
    return job is None or job.rank == 0


def _load(arguments: argparse.Namespace, config: EngineConfig, console: Console) -> Engine:
    """Load the checkpoint, showing progress."""
    with Progress(
        TextColumn("loading the checkpoint"), BarColumn(), TimeRemainingColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("", total=None)
        from ..pipeline.engine import Engine

        return Engine.from_pretrained(
            arguments.checkpoint,
            arguments.lora,
            config,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            vae=arguments.vae,
            trace=arguments.trace,
        )


def _write_blocks(session: Session, write: Callable[..., None], console: Console) -> bool:
    """Write chunks as they come, showing progress; True when interrupted."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("block {task.completed:.0f}/{task.fields[blocks]}"),
        BarColumn(),
        TextColumn("{task.fields[fps]:.1f} fps"),
        TimeRemainingColumn(),
        console=console,
    )
    frames = 0
    with bar:
        task = bar.add_task("", total=session.total_blocks, fps=0.0, blocks=session.total_blocks or "?")
        try:
            for chunk in session:
                write(chunk.frames, chunk.start_column)
                frames += len(chunk.frames)
                elapsed = bar.tasks[task].elapsed or 0.0
                total = session.total_blocks
                bar.update(task, advance=1, total=total, blocks=total or "?", fps=frames / max(elapsed, 1e-9))
        except KeyboardInterrupt:
            return True
    return False


class _Termination:
    """Lets SIGTERM end the video when what is under way is finished.

    Attributes:
        came: whether it has.
    """

    def __init__(self, drain: Callable[[], None]) -> None:
        self.came = False
        self._drain = drain
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._end)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _end(self, number: int, frame: object) -> None:
        self.came = True
        self._drain()


def _engine_config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        size=arguments.size,
        precision=arguments.precision,
        kv_precision=arguments.kv_precision,
        vae_precision=arguments.vae_precision,
        fp8_skip=fp8_skip(arguments.fp8_skip),
        devices=devices(arguments.devices, arguments.device),
        sequence_parallel=arguments.sequence_parallel,
        stage_ms=stage_ms(arguments.stage_ms),
        steps=arguments.steps,
        features=arguments.features,
        sink_distance=_integer_or("random", arguments.sink_distance, "--sink-distance"),
        sink_update_after=_update_after(arguments.sink_update_after),
        motion_tokens=not arguments.no_motion_tokens,
        graphs=not arguments.no_graphs,
        schedule=arguments.schedule,
        kv_mode=arguments.kv_mode,
        offload=offload(arguments.offload),
    )


def _update_after(text: str) -> int | None:
    value = _integer_or("never", text, "--sink-update-after")
    return value if isinstance(value, int) else None


def _integer_or(word: str, text: str, option: str) -> int | str:
    if text == word:
        return word
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option} must be {word!r} or an integer, not {text!r}") from None


def _paths(text: str) -> list[Path]:
    """Files joined by "+"; a file whose own name holds a + is taken as it is."""
    if os.path.exists(text):
        return [Path(text)]
    parts = text.split("+")
    if not all(parts):
        raise InputError(f"{text!r}: expected file names joined by +")
    return [Path(part) for part in parts]


def _watermark(name: str | None) -> Callable[..., Any] | None:
    """The function that MODULE:FUNCTION names."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--watermark {name!r}: expected MODULE:FUNCTION that can be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"--watermark {name!r}: not a function")
    return found
