"""Streams for one rank alone or for several that share each step; as a script, one of these: rank, size, folder."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from golden_stream import GoldenStream
from streams import Streams
from support import CPU, OWN_GOLDEN, GoldenCase, poison
from torch import Tensor

from liveavatar_engine.config import ModelConfig
from liveavatar_engine.model import Network
from liveavatar_engine.model.quantize import use_fp8
from liveavatar_engine.runtime.group import BackendGroup, Group
from liveavatar_engine.weights.network import empty_network, load_network

HEADS, HEAD_DIM, LAYERS = 4, 32, 2
E4M3 = torch.float8_e4m3fn
ODD_SINK = (96, 96)
"""Pixels, of which a sink has 85 tokens."""


def random_network(dtype: torch.dtype = torch.float32, heads: int = HEADS) -> Network:
    """A network of more heads than the golden set's, the same wherever it is made."""
    dim = heads * HEAD_DIM
    config = ModelConfig(dim, 2 * dim, heads, LAYERS, 16, (0, 1), freq_dim=32, text_dim=24, text_len=12)
    network = empty_network(config, dtype).to_empty(device=CPU)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        offset = 1 if "norm" in name and name.endswith("weight") else 0
        wide = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 100
        parameter.data = (offset + drawn / math.sqrt(wide)).to(parameter.dtype)
    return network


def _fp8() -> Network:
    network = random_network(torch.bfloat16)
    exact = {name: layer for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name, place in use_fp8(network, ("embedding",)).items():
        network.get_submodule(place.layer).quantize(place.first, exact[name].weight)
        network.get_parameter(f"{place.layer}.bias")[place.rows] = exact[name].bias
    return network


def _two_sessions(group: Group | None) -> list[Tensor]:
    """In turn, with a new prompt and a new image for the first one, prefilled between steps of both."""
    streams = Streams(random_network(), sessions=2, group=group)
    both = [streams.open(session, seed=session, update_after=3) for session in range(2)]
    made = []
    for block in range(4):
        if block == 1:
            both[0].change_prompt(streams.context(7))
        made += [latents for session, stream in enumerate(both) for latents in streams.push(stream, session)]
    return made


def _random(
    group: Group | None,
    *,
    blocks: int = 3,
    make: Callable[[], Network] = random_network,
    run: dict[str, Any] | None = None,
    **settings: Any,
) -> list[Tensor]:
    return Streams(make(), group=group, **settings).run(blocks, **(run or {}))


def _golden(case: GoldenCase, group: Group | None) -> list[Tensor]:
    """A few blocks, up to the first that sees another sink."""
    network = load_network(OWN_GOLDEN / "checkpoint", None, torch.float32, CPU)
    blocks = min(case.parameters["num_blocks"], case.parameters.get("aas_after", 0) + 1)
    return GoldenStream(case, network, blocks=blocks, group=group).latents


RANDOM: dict[str, Callable[[Group | None], list[Tensor]]] = {
    "updated sink": _random,
    "pose and two actors": partial(_random, run={"actors": 2, "pose": True}),
    "odd sink": partial(_random, size=ODD_SINK, run={"update_after": 1}),
    "two sessions": _two_sessions,
    "clean ring": partial(_random, clean=True),
    "diagonal": partial(_random, diagonal=True),
    "float64": partial(_random, make=lambda: random_network().double()),
    "bf16": partial(_random, make=partial(random_network, torch.bfloat16)),
    "e4m3 caches": partial(_random, cache_dtype=E4M3),
    "e4m3": partial(_random, make=_fp8, cache_dtype=E4M3),
}
GOLDEN_CASES = [GoldenCase.load(path) for path in sorted((OWN_GOLDEN / "cases").glob("dit_*.safetensors"))]
FOR_TWO = ("clean ring", "bf16")
"""Of these, what is much the same on four ranks."""


def scenarios(size: int) -> dict[str, Callable[[Group | None], list[Tensor]]]:
    """Streams that so many ranks can share; the golden set's network has two heads."""
    if size == 2:
        return RANDOM | {case.name: partial(_golden, case) for case in GOLDEN_CASES}
    return {name: run for name, run in RANDOM.items() if name not in FOR_TWO}


def main(rank: int, size: int, folder: Path) -> None:
    """Run all of them and save their latents."""
    torch.set_num_threads(1)
    with torch.device("meta"):  # as in conftest
        torch.empty(0)
    poison()
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=60)
    store = dist.PrefixStore("steps", dist.FileStore(str(folder / "store"), size))
    backend = dist.ProcessGroupGloo(store, rank, size, options)
    group = BackendGroup(backend)
    torch.save({name: run(group) for name, run in scenarios(size).items()}, folder / f"{rank}.pt")
    backend.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
