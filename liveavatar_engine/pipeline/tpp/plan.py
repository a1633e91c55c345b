"""Which device does which denoise steps, and which one decodes: chosen from what each costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import ConfigError


@dataclass(frozen=True)
class StageCosts:
    """What a block costs on one device, in seconds.

    Attributes:
        step: one denoise step of the block.
        decode: of the block's latents.
        first_decode: of the first latent alone, where its frames are delivered early.
        prefill: of the sink, when its reference changes.
        transfer: of a block's latents from one stage to the next.
    """

    step: float
    decode: float
    first_decode: float
    prefill: float
    transfer: float = 0.0

    def __post_init__(self) -> None:
        for name in ("step", "decode", "first_decode", "prefill", "transfer"):
            value = getattr(self, name)
            least = "more than" if name in ("step", "decode") else "at least"
            if not math.isfinite(value) or value < 0 or (value == 0 and least == "more than"):
                raise ConfigError(f"cost of {name}: expected {least} 0 seconds, not {value!r}")

    @classmethod
    def of(cls, step_ms: float, vae_ms: float, transfer_ms: float = 0.0) -> StageCosts:
        """Costs of which only two or three are known, in milliseconds.

        The first latent is taken to cost a third of a block's decode (it is one of three latents), and a prefill one
        step: it goes through the same layers, with other tokens.
        """
        step, decode = step_ms / 1e3, vae_ms / 1e3
        return cls(step, decode, decode / 3, step, transfer_ms / 1e3)


@dataclass(frozen=True)
class RankPlan:
    """What one worker process does.

    Attributes:
        rank: its number; the index of `device` among the devices that the plan was made for.
        device: its name.
        lane: which lane it belongs to.
        steps: denoise steps that it does, one after another; empty where it only decodes.
        mate: its place among the ranks that share these steps (sequence parallel).
        decoder: which of the lane's decoders it is; None: it is none.
        mates: how many ranks share these steps.
    """

    rank: int
    device: str
    lane: int
    steps: range
    mate: int = 0
    decoder: int | None = None
    mates: int = 1

    @property
    def stage(self) -> str:
        """What it does, for people: "steps 0-1", "step 2 (1 of 2)", "step 3 + decode"."""
        done = []
        if self.steps:
            first, last = self.steps[0], self.steps[-1]
            done.append(f"step {first}" if first == last else f"steps {first}-{last}")
        if self.decoder is not None:
            done.append("decode")
        shared = f" ({self.mate + 1} of {self.mates})" if self.mates > 1 else ""
        return " + ".join(done) + shared


@dataclass(frozen=True)
class Lane:
    """Stages that a session's blocks go through; several lanes serve different sessions.

    Attributes:
        stages: denoise stages in order, each with the ranks that share it.
        decoders: each serves its own sessions; the only one may also be the first mate of the last denoise stage.
    """

    stages: tuple[tuple[RankPlan, ...], ...]
    decoders: tuple[RankPlan, ...]

    @property
    def ranks(self) -> tuple[RankPlan, ...]:
        """Of this lane, each once, in rank order."""
        found = {rank.rank: rank for rank in (*(rank for stage in self.stages for rank in stage), *self.decoders)}
        return tuple(found[rank] for rank in sorted(found))

    @property
    def decodes_apart(self) -> bool:
        """Whether decoding has devices of its own."""
        return not self.decoders[0].steps

    @property
    def depth(self) -> int:
        """Stages that a block goes through: denoise stages, and the decoder where it is a stage of its own."""
        return len(self.stages) + self.decodes_apart


@dataclass(frozen=True)
class Plan:
    """Who does what.

    Attributes:
        lanes: at least one.
    """

    lanes: tuple[Lane, ...]

    @property
    def ranks(self) -> tuple[RankPlan, ...]:
        """Of all lanes, in rank order."""
        return tuple(sorted((rank for lane in self.lanes for rank in lane.ranks), key=lambda rank: rank.rank))

    def __iter__(self) -> Iterator[RankPlan]:
        return iter(self.ranks)

    def __len__(self) -> int:
        return len(self.ranks)
