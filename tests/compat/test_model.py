"""The reference's model class: the golden files' latents in a loop like the reference's, names, and bad input."""

import random

import pytest
import torch
from compat.reference_loop import ReferenceLoop
from safetensors.torch import load_file
from support import GOLDEN, GoldenCase, golden_cases, relative_error, sqnr

from liveavatar_engine.compat import CausalWanModel_S2V, replace_linear_with_scaled_fp8
from liveavatar_engine.config.engine import REFERENCE_FP8_SKIP
from liveavatar_engine.errors import ConfigError, InputError
from liveavatar_engine.model.linear import Fp8Linear

CASES = [case for case in golden_cases("dit") if "frame_offset" not in case.values[0].parameters]
"""`frame_offset` puts a ring that is not full late in a stream, which no loop of the reference does."""


@pytest.fixture(scope="module")
def model(golden_checkpoint) -> CausalWanModel_S2V:
    return CausalWanModel_S2V.from_pretrained(golden_checkpoint)


def _small(model: CausalWanModel_S2V) -> ReferenceLoop:
    return ReferenceLoop(GoldenCase.load(GOLDEN / "cases" / "dit_single_actor.safetensors"), model)


@pytest.mark.parametrize("case", CASES)
def test_a_loop_of_ones_own_makes_the_golden_latents(case: GoldenCase, model) -> None:
    loop = ReferenceLoop(case, model)
    for block, latents in enumerate(loop.run()):
        assert relative_error(latents, case["latents"][block]) <= 1e-5, f"block {block}"
    for row, block in enumerate(case["velocity_blocks"].tolist()):
        for step, expected in enumerate(case["velocities"][row]):
            assert relative_error(loop.velocities[block, step], expected) <= 1e-5, f"block {block} step {step}"


def test_names_are_those_of_the_checkpoint(model, golden_checkpoint) -> None:
    stored = load_file(golden_checkpoint / "diffusion_pytorch_model.safetensors")
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }
    assert all(model.state_dict()[name].equal(tensor) for name, tensor in stored.items())


def test_a_sink_that_was_not_filled_is_not_seen(model) -> None:
    loop = _small(model)
    latents = loop.denoise(0)
    for ring in loop.rings:
        for layer in ring:
            layer["cond_v"].fill_(1e6)
    assert latents.equal(loop.denoise(0))


def test_caches_can_be_copied_elsewhere_and_back(model) -> None:
    moved, still = _small(model), _small(model)
    first = [loop.run(1)[0] for loop in (moved, still)]
    moved.rings = [[{name: part.clone() for name, part in layer.items()} for layer in ring] for ring in moved.rings]
    assert first[0].equal(first[1])
    assert moved.denoise(1).equal(still.denoise(1))


def test_the_random_distance_is_pythons(model) -> None:
    loop = _small(model)
    loop.prefill()
    late = {**loop.conditions(0), "t": torch.zeros(1, 3), "kv_cache": loop.rings[0], "current_start": 40 * 3 * 96}
    random.seed(7)
    drawn = random.randint(4, 30)
    made = []
    for distance in ("random", drawn, drawn - 1):
        random.seed(7)
        model.sink_distance = distance
        made += model([loop.case["noise"][:, :3]], **late)
    assert made[0].equal(made[1])
    assert not made[0].equal(made[2])


def test_a_timestep_for_each_frame(model) -> None:
    loop = _small(model)
    loop.prefill()
    inputs = {**loop.conditions(0), "kv_cache": loop.rings[0], "current_start": 0}
    noise, timesteps = [loop.case["noise"][:, :3]], torch.tensor([[900.0, 500.0, 900.0]])
    (mixed,), (same,) = model(noise, t=timesteps, **inputs), model(noise, t=timesteps[:, :1], **inputs)
    assert not torch.allclose(mixed[:, 1], same[:, 1])
    assert relative_error(mixed[:, 0], same[:, 0]) < relative_error(mixed[:, 1], same[:, 1])


def test_the_newest_motion_can_be_left_out(model) -> None:
    loop = _small(model)

    def sink(latents: torch.Tensor, **settings: int) -> torch.Tensor:
        inputs = {**loop.conditions(0), "motion_latents": latents, **settings}
        model([loop.case["noise"][:, :3]], t=torch.zeros(1, 3), **inputs, kv_cache=loop.rings[0], sink_flag=True)
        return loop.rings[0][0]["cond_k"].clone()

    motion = loop.case["motion_latents"]
    without = motion.clone()
    without[:, :, -3:] = 0
    assert sink(motion, add_last_motion=0).equal(sink(without))
    assert not sink(motion).equal(sink(without))


def test_fp8_in_place(golden_checkpoint, model) -> None:
    low = CausalWanModel_S2V.from_pretrained(golden_checkpoint, torch_dtype=torch.bfloat16)
    replace_linear_with_scaled_fp8(low, ignore_keys=list(REFERENCE_FP8_SKIP))
    assert any(isinstance(layer, Fp8Linear) for layer in low.modules())
    case = _small(model).case
    latents = ReferenceLoop(case, low)
    latents.rings = [
        [{k: v if k == "cond_end" else v.bfloat16() for k, v in d.items()} for d in r] for r in latents.rings
    ]
    assert sqnr(latents.run(1)[0], case["latents"][0]) > 15


def _call(model, **changes):
    loop = _small(model)
    inputs = {
        "x": [loop.case["noise"][:, :3]],
        "t": torch.zeros(1, 3),
        **loop.conditions(0),
        "kv_cache": loop.rings[0],
        "current_start": 0,
        **changes,
    }
    return model(**inputs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kv_cache": None}, ConfigError, "kv_cache: expected a list of dictionaries"),
        ({"kv_cache": [{}]}, InputError, "expected 3 dictionaries, not 1"),
        ({"x": [torch.zeros(16, 3, 16, 24)] * 2}, InputError, "x: expected a batch of one, not of 2"),
        ({"x": [torch.zeros(4, 3, 16, 24)]}, InputError, r"x: expected \[16, frames"),
        ({"t": torch.zeros(1, 2)}, InputError, r"t: expected \[1, 3\], not \[1, 2\]"),
        ({"motion_frames": [17, 5]}, InputError, r"motion_frames: expected \[73, 19\]"),
        ({"current_start": 7}, InputError, "current_start 7: expected the start of a block of 288 tokens"),
        ({"audio_input": torch.zeros(1, 25, 16, 5)}, InputError, r"audio_input: expected \[1, 25, 16, 12\]"),
        ({"audio_input": torch.zeros(2, 25, 16, 12)}, InputError, "of 2 actors: expected a mask"),
        ({"mask": torch.zeros(1, 3, 2, 2, 1)}, InputError, "mask: expected a tensor"),
        ({"context": [torch.zeros(13, 24)]}, InputError, r"context: expected \[at most 12, 24\]"),
        ({"sink_flag": True, "drop_motion_frames": True}, InputError, "drop_motion_frames"),
        ({"sink_flag": True, "current_start": 288}, InputError, "current_start 288: the sink"),
        ({"sink_flag": True, "add_last_motion": 3}, InputError, "add_last_motion: expected 0, 1 or 2"),
    ],
)
def test_bad_input(model, changes, error, message) -> None:
    with pytest.raises(error, match=message):
        _call(model, **changes)


def test_a_sink_without_room(model) -> None:
    loop = ReferenceLoop(GoldenCase.load(GOLDEN / "cases" / "dit_single_actor.safetensors"), model, sink_room=100)
    with pytest.raises(InputError, match="cond_k has room for 100 tokens, the sink has 240"):
        loop.prefill()
