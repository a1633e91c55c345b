"""What must pass on a GPU before a release, in one command of under nine minutes: `make gpu-gate`.

python -m bench.gate                                       on a GPU: build, GPU tests, kernels, step, vae, stream
python -m bench.gate --preset tiny --device cpu            the same machinery on a CPU; nothing of it is performance
python -m bench.gate --only step --again                   one part anew

Each part runs in a process of its own, with a time limit, and leaves NAME.log and NAME.json in the folder of results;
`gate.json` there says how far things are. A part that has finished for the same code, device and arguments is not run
again. Figures go to the ledger (bench/ledger.py) only when the tests have passed; until then they stay in the folder,
marked refused. Needs no more than torch, triton, numpy, safetensors, transformers, rich and pytest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import ledger
from liveavatar_engine.bench.environment import UNKNOWN
from liveavatar_engine.bench.schema import validate
from liveavatar_engine.errors import ConfigError, InputError, LiveAvatarError, OutputError
from liveavatar_engine.files import write_atomically
from liveavatar_engine.weights.presets import PRESETS

ROOT = Path(__file__).parents[1]
SOURCES = ("liveavatar_engine", "kernels", "csrc", "bench", "tests/gpu", "tools")
TOTAL_SECONDS = 530.0
"""For everything together: what remains of it limits a part, too."""
DONE, FAILED, OUT_OF_TIME, NOT_RUN, REFUSED = "done", "failed", "out of time", "not run", "refused"
TESTS = "gpu-tests"
_NO_GPU = "no GPU"
_GRACE = 5.0
"""Seconds to end after an interrupt, before a kill."""
_BENCH = (sys.executable, "-m", "liveavatar_engine.bench")


@dataclass(frozen=True)
class Part:
    """One process of the gate.

    Attributes:
        name: also of its files.
        command: what runs.
        seconds: its limit.
        needs_gpu: whether there is nothing to do on a CPU.
        document: whether it writes NAME.json, of the benchmark's schema.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    needs_gpu: bool = False
    document: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        status: one of those above; `reason` says why it is not DONE.
        key: of code, device and arguments.
        seconds: that it took.
        limit: seconds that it had.
        recorded: whether the ledger has its figures.
    """

    status: str
    key: str
    seconds: float = 0.0
    limit: float = 0.0
    reason: str | None = None
    recorded: bool = False


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        environment: as `Environment.as_dict`, found by another process, so that this one leaves the GPU alone.
        digest: of the source files.
        commit: of the code.
    """

    environment: dict[str, Any]
    digest: str
    commit: str

    @property
    def on_gpu(self) -> bool:
        return self.environment["device_kind"] == "cuda"

    def key(self, part: Part, results: Path) -> str:
        """Changes with the code, the device, the versions or the arguments; not with the folder of results."""
        arguments = [word.replace(str(results), "RESULTS") for word in part.command]
        about = [self.commit, self.digest, self.environment["device"], self.environment["versions"], arguments]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


@dataclass
class Gate:
    """The parts in their order, and what became of them; `gate.json` in the folder of results."""

    results: Path
    subject: Subject
    parts: Sequence[Part]
    console: Console
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._keys = {part.name: self.subject.key(part, self.results) for part in self.parts}
        path = self.results / "gate.json"
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                self.outcomes = {name: Outcome(**entries) for name, entries in stored["parts"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{path}: not the state of a gate; remove it") from None

    def run(self, only: Collection[str], again: bool) -> bool:
        """Run the parts named, all if none is, but for what has finished; returns whether everything is well."""
        until = time.perf_counter() + TOTAL_SECONDS
        parts = [part for part in self.parts if not only or part.name in only]
        for number, part in enumerate(parts, start=1):
            key, before = self._keys[part.name], self.outcomes.get(part.name)
            head = f"[{number}/{len(parts)}] {part.name}"
            if before is not None and before.key == key and before.status in (DONE, REFUSED) and not again:
                self.console.print(f"{head}: done before, in {before.seconds:.0f} s", markup=False)
                self._record(part)
                continue
            if part.needs_gpu and not self.subject.on_gpu:
                outcome = Outcome(NOT_RUN, key, reason=f"skipped: {_NO_GPU}")
            else:
                limit = min(part.seconds, until - time.perf_counter())
                self.console.print(f"{head}: at most {max(limit, 0):.0f} s: {shlex.join(part.command)}", markup=False)
                outcome = self._execute(part, key, limit)
            self._keep(part.name, outcome)
            self._record(part)
            said = self.outcomes[part.name]
            reason = f": {said.reason}" if said.reason else ""
            self.console.print(f"{head}: {said.status}{reason}, {said.seconds:.0f} s", markup=False)
        return all(self.outcomes[part.name].status in (DONE, NOT_RUN) for part in parts)

    def _execute(self, part: Part, key: str, limit: float) -> Outcome:
        """Run a part's process, its output to NAME.log."""
        if limit <= 0:
            return Outcome(OUT_OF_TIME, key, reason=f"all of the {TOTAL_SECONDS:.0f} s were gone")
        started = time.perf_counter()
        (self.results / f"{part.name}.json").unlink(missing_ok=True)
        with (self.results / f"{part.name}.log").open("w", encoding="utf-8") as log:
            code = _run(part.command, log, limit)
        outcome = Outcome(DONE, key, round(time.perf_counter() - started, 1), round(limit, 1))
        if code is None:
            return replace(outcome, status=OUT_OF_TIME, reason=f"stopped after {limit:.0f} s, see {part.name}.log")
        if code != 0:
            return replace(outcome, status=FAILED, reason=f"exit code {code}, see {part.name}.log")
        return replace(outcome, status=FAILED, reason=wrong) if (wrong := self._wrong(part)) else outcome

    def _wrong(self, part: Part) -> str | None:
        """What is wrong with the document of a part that ended well."""
        if not part.document:
            return None
        document = self._document(part)
        if document is None:
            return f"wrote no {part.name}.json"
        complaints = validate(document)
        return f"{part.name}.json: {complaints[0]}" if complaints else None

    def _document(self, part: Part) -> Any:
        path = self.results / f"{part.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _record(self, part: Part) -> None:
        """Append a part's figures to the ledger, or mark them refused."""
        outcome = self.outcomes[part.name]
        if not part.document or outcome.status not in (DONE, REFUSED) or outcome.recorded:
            return
        reason = self._refusal()
        if reason is not None:
            self._keep(part.name, replace(outcome, status=REFUSED, reason=f"kept out of the ledger: {reason}"))
            return
        ledger.append(self.results, ledger.rows_of(self._document(part)))
        self._keep(part.name, replace(outcome, status=DONE, reason=None, recorded=True))

    def _refusal(self) -> str | None:
        """Why figures may not go to the ledger; a CPU's dry run has a ledger of its own."""
        if not self.subject.on_gpu:
            return None
        tests = self.outcomes.get(TESTS)
        if tests is None or tests.key != self._keys.get(TESTS):
            return "the GPU tests of this code have not run"
        if tests.status != DONE:
            return f"the GPU tests are not green: {tests.status}"
        if self.subject.commit == UNKNOWN:
            return "the commit is not known: give --commit"
        return None

    def _keep(self, name: str, outcome: Outcome) -> None:
        """Remember an outcome, on disk too."""
        self.outcomes[name] = outcome
        state = {
            "commit": self.subject.commit,
            "device": self.subject.environment["device"],
            "parts": {name: asdict(one) for name, one in self.outcomes.items()},
        }
        write_atomically(self.results / "gate.json", json.dumps(state, indent=1) + "\n")


def parts_of(options: argparse.Namespace, results: Path, on_gpu: bool) -> list[Part]:
    """The parts, and their shares of the time on an H200."""
    model = ["--preset", options.preset or ("14b" if on_gpu else "tiny"), "--device", options.device]
    amount = [] if on_gpu else ["--size", "64x64", "--blocks", "3", "--warmup", "1"]
    fast = ["--precision", "fp8"] if on_gpu else []
    commit = ["--commit", options.commit] if options.commit else []

    def bench(suite: str, seconds: float, *arguments: str, needs_gpu: bool = False) -> Part:
        files = ["--json", f"{results}/{suite}.json", "--html", f"{results}/{suite}.html"]
        return Part(suite, (*_BENCH, suite, *arguments, *files, *commit), seconds, needs_gpu)

    tests = ("-m", "pytest", "-q", "-m", "gpu", "tests/gpu", f"--junit-xml={results}/{TESTS}.xml")
    return [
        Part("build", (sys.executable, "-m", "bench.build", *(["--csrc"] if on_gpu else [])), 50, document=False),
        Part(TESTS, (sys.executable, *tests), 145, needs_gpu=True, document=False),
        bench("kernels", 130, "--quick", needs_gpu=True),
        bench(
            "step",
            90,
            *model,
            *amount,
            *fast,
            "--sweep",
            "kv_precision=bf16,fp8" if on_gpu else "kv_precision=auto,fp8",
        ),
        bench("vae", 40, *model, *amount),
        bench("stream", 75, *model, *(amount or ["--blocks", "60"]), *fast, "--kv-precision", "fp8"),
    ]


def source_digest(root: Path = ROOT) -> str:
    """Of every source file that the gate's parts run."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (root / folder).rglob("*")):
        if path.suffix in (".py", ".json", ".cu", ".cuh", ".cpp", ".h") and "results" not in path.parts:
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ledger.FOLDER, metavar="DIR", help="default bench/results")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: 14b on a GPU, tiny on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="only these parts")
    parser.add_argument("--again", action="store_true", help="also what has finished before")
    parser.add_argument("--commit", help="of this code, where it lies in no repository")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    try:
        return _gate(options, console)
    except LiveAvatarError as error:
        sys.stderr.write(f"bench.gate: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("bench.gate: interrupted; what has finished is kept\n")
        return 130


def _gate(options: argparse.Namespace, console: Console) -> int:
    results = options.results.absolute()
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {results}: {error.strerror}") from error
    environment = _environment(options.device)
    commit = options.commit or environment["commit"]
    subject = Subject(environment, source_digest(), commit)
    parts = parts_of(options, results, subject.on_gpu)
    unknown = sorted(set(options.only) - {part.name for part in parts})
    if unknown:
        raise ConfigError(f"--only: no part {unknown[0]!r}; there are {', '.join(part.name for part in parts)}")
    console.print(f"{environment['device']}, commit {commit}, results in {results}", markup=False)
    gate = Gate(results, subject, parts, console)
    well = gate.run(options.only, options.again)
    console.print(_table(gate))
    return 0 if well else 1


def _environment(device: str) -> dict[str, Any]:
    """The device and its versions, found by another process.

    Raises:
        ConfigError: there is no such device.
    """
    program = (
        "import json, sys\n"
        "from liveavatar_engine.bench.environment import describe\n"
        "from liveavatar_engine.errors import ConfigError\n"
        "from liveavatar_engine.pipeline.device import resolve_device\n"
        "try:\n    device = resolve_device(sys.argv[1] if sys.argv[1] == 'auto' else (sys.argv[1],))\n"
        "except ConfigError as error:\n    sys.exit(str(error))\n"
        "print(json.dumps(describe(device, '').as_dict()))\n"
    )
    command = [sys.executable, "-c", program, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_variables(), cwd=ROOT)
    if done.returncode:
        raise ConfigError(done.stderr.strip().splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _run(command: Sequence[str], log: Any, seconds: float) -> int | None:
    """The exit code; None where the process was stopped because its time was over."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=_variables(), start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    """Interrupt what is left of a process and its children, then kill it."""
    for how in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, how)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue


def _variables() -> dict[str, str]:
    """The environment, in which the checkout is found as it lies."""
    found = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found)}


def _table(gate: Gate) -> Table:
    table = Table("part", "", "seconds", "limit", "", title=f"gate: {gate.subject.environment['device']}")
    colours: Mapping[str, str] = {DONE: "green", NOT_RUN: "yellow"}
    for part in gate.parts:
        one = gate.outcomes.get(part.name)
        if one is None:
            continue
        status = Text(one.status, style=colours.get(one.status, "red"))
        table.add_row(part.name, status, f"{one.seconds:.0f}", f"{part.seconds:.0f}", Text(one.reason or ""))
    return table


if __name__ == "__main__":
    sys.exit(main())
