"""What the suite `tpp` is asked for."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError
from ...pipeline.tpp.plan import Plan, make_plan
from ...pipeline.tpp.simulated_lane import Network
from ..layout import KnownCosts, add_cost_arguments, device_names, known_costs

SUITE = "tpp"
SIMULATED, SLEEPING, STREAMED, ONE_DEVICE = "simulated", "sleeping stages", "measured", "stages in turn"
"""Ways to answer."""
_WEIGHTS = ("preset", "checkpoint", "lora", "vae")
_COSTS = ("step_ms", "vae_ms", "costs")
_OPTIONS = (
    *("simulate", "sleep", "devices", "step_ms", "vae_ms", "transfer_ms", "node_transfer_ms", "costs", "sessions"),
    *("sequence_parallel", "sink_update_after", "devices_per_node", "nodes", "paced", "trace"),
)
_ONLY_SIMULATED = ("node_transfer_ms", "devices_per_node", "nodes", "paced")


@dataclass(frozen=True)
class TppOptions:
    """What the suite asks for.

    Attributes:
        mode: how it is answered.
        devices: names; a rank is an index.
        known: what the stages cost, by which work is spread, and how that is known; where they are simulated or sleep,
            that is all that they do.
        steps, sequence_parallel, sessions, sink_update_after: as of `EngineConfig`; sessions are opened at once.
        blocks: of each session that is simulated.
        paced: whether audio comes as it is spoken.
        network: which devices share a machine.
        trace: file for a timeline, or None.
    """

    mode: str
    devices: tuple[str, ...]
    known: KnownCosts
    steps: int
    blocks: int
    sequence_parallel: int = 1
    sessions: int = 1
    sink_update_after: int | None = 4
    paced: bool = False
    network: Network = field(default_factory=Network)
    trace: Path | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> TppOptions:
        """What `add_arguments` has read.

        Raises:
            ConfigError: something is missing, contradicts another thing or is out of range.
            InputError: the file with costs cannot be used.
        """
        names = chosen_devices(arguments)
        mode = _mode(arguments, names)
        _check_mode(arguments, mode)
        between = arguments.node_transfer_ms
        return cls(
            mode,
            names,
            known_costs(arguments),
            arguments.steps,
            arguments.blocks,
            1 if arguments.sequence_parallel is None else arguments.sequence_parallel,
            1 if arguments.sessions is None else arguments.sessions,
            _update_after(arguments.sink_update_after),
            bool(arguments.paced),
            Network(_devices_per_node(arguments, len(names)), None if between is None else between / 1e3),
            arguments.trace,
        )

    def as_dict(self) -> dict[str, Any]:
        """For a document."""
        return {
            "simulated": self.mode == SIMULATED,
            "mode": self.mode,
            "devices": len(self.devices),
            "device_names": list(self.devices),
            "steps": self.steps,
            "blocks": self.blocks,
            "sequence_parallel": self.sequence_parallel,
            "sessions": self.sessions,
            "sink_update_after": self.sink_update_after,
            "paced": self.paced,
            **{f"{name}_seconds": seconds for name, seconds in asdict(self.known.costs).items()},
            **asdict(self.network),
        }

    def plan(self) -> Plan:
        """The layout.

        Raises:
            ConfigError: there is none.
        """
        return make_plan(
            self.devices,
            self.steps,
            self.known.costs,
            sequence_parallel=self.sequence_parallel,
            max_sessions=self.sessions,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's arguments."""
    group = parser.add_argument_group("suite tpp")
    group.add_argument("--simulate", action="store_true", default=None, help="predict from costs; needs no device")
    group.add_argument("--sleep", action="store_true", default=None, help="real worker processes whose stages sleep")
    group.add_argument("--devices", metavar="N|A,B...", help="how many GPUs, or which (default: all)")
    add_cost_arguments(group)
    group.add_argument("--node-transfer-ms", type=float, metavar="X", help="latents to another machine")
    group.add_argument("--nodes", type=int, metavar="N", help="machines that share the devices evenly")
    group.add_argument("--devices-per-node", type=int, metavar="N", help="the same, by devices of a machine")
    group.add_argument("--sessions", type=int, metavar="N", help="opened at once (default 1)")
    group.add_argument("--sequence-parallel", type=int, metavar="K", help="devices that share a step (default 1)")
    group.add_argument("--sink-update-after", metavar="N", help="blocks, or never (default 4)")
    group.add_argument("--paced", action="store_true", default=None, help="audio comes as it is spoken")
    group.add_argument("--trace", type=Path, metavar="F", help="timeline for ui.perfetto.dev")


def check_unused(arguments: argparse.Namespace) -> None:
    """Refuse the suite's arguments where another one runs.

    Raises:
        ConfigError: one is given.
    """
    for name in _OPTIONS:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} belongs to the suite tpp, not to {arguments.suite}")


def chosen_devices(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The devices of a command of this suite: those that it names, or all GPUs, or the CPU.

    Raises:
        ConfigError: it names none where there must be some, or names them twice.
    """
    asked = "--simulate" if arguments.simulate else "--sleep" if arguments.sleep else None
    if arguments.devices is not None and asked is None and arguments.device != "auto":
        raise ConfigError("--device: the suite tpp takes --devices")
    if arguments.devices is not None:
        names = device_names(arguments.devices)
        if not arguments.sleep or all(name.startswith("cpu") for name in names):
            return names
        if not arguments.devices.strip().isdigit():
            raise ConfigError("--sleep uses no GPU: say how many processes there are, such as --devices 5")
        return tuple(f"cpu:{index}" for index in range(len(names)))
    if asked is not None:
        raise ConfigError(f"tpp {asked} needs --devices, such as --devices 5")
    if arguments.device != "auto":
        return (arguments.device,)
    return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count())) or ("cpu",)


def _mode(arguments: argparse.Namespace, names: tuple[str, ...]) -> str:
    if arguments.simulate and arguments.sleep:
        raise ConfigError("--simulate and --sleep: give one of them; --sleep shows the simulation, too")
    if arguments.simulate:
        return SIMULATED
    if arguments.sleep:
        return SLEEPING
    return STREAMED if len(names) > 1 else ONE_DEVICE


def _check_mode(arguments: argparse.Namespace, mode: str) -> None:
    """Refuse what would mean nothing."""
    word = "--simulate" if mode == SIMULATED else "--sleep"
    if mode in (SIMULATED, SLEEPING):
        for name in _WEIGHTS:
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name}: {word} opens no model; it needs --step-ms and --vae-ms, or --costs")
    if mode != SIMULATED:
        for name in _ONLY_SIMULATED:
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} needs --simulate")
    if mode == ONE_DEVICE:
        for name in _COSTS:
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: on one device stages are measured; --simulate takes it")
    if mode in (SLEEPING, STREAMED) and arguments.transfer_ms is not None:
        raise ConfigError("--transfer-ms: transfers are measured; --simulate takes it")


def _update_after(text: str | None) -> int | None:
    if text is None:
        return 4
    if text == "never":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--sink-update-after: expected blocks, at least 1, or never, not {text!r}")
    return int(text)


def _devices_per_node(arguments: argparse.Namespace, devices: int) -> int | None:
    if arguments.nodes is None:
        return arguments.devices_per_node
    if arguments.devices_per_node is not None:
        raise ConfigError("--nodes and --devices-per-node say the same; give one of them")
    if arguments.nodes < 1 or devices % arguments.nodes:
        raise ConfigError(
            f"--nodes {arguments.nodes}: {devices} devices cannot be shared evenly; --devices-per-node can"
        )
    return devices // arguments.nodes
