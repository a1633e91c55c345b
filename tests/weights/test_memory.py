"""Memory predicted from sizes, against what is really allocated, and the refusal of what will not fit."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from liveavatar_kernels.e4m3 import E4M3
from peak_memory import PeakMemory
from support import CPU
from transformers import UMT5EncoderModel, Wav2Vec2Model

from liveavatar_engine import Engine, EngineConfig
from liveavatar_engine.conditions.audio_features import GLOBAL_SECONDS
from liveavatar_engine.conditions.text import _encoder_config
from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.denoise.executor import Denoiser, StepExecutor
from liveavatar_engine.denoise.schedule import flow_match_schedule
from liveavatar_engine.errors import CheckpointError, DeviceMemoryError
from liveavatar_engine.model.quantize import use_fp8
from liveavatar_engine.pipeline import source as source_module
from liveavatar_engine.runtime.graphs import PlainCalls
from liveavatar_engine.vae.block_decoder import BlockDecoder
from liveavatar_engine.vae.layers import History
from liveavatar_engine.vae.vae import Vae, load_vae
from liveavatar_engine.weights import budget
from liveavatar_engine.weights.budget import available_memory, part_sizes, require_memory
from liveavatar_engine.weights.create import audio_config, checkpoint_tensors
from liveavatar_engine.weights.layout import AUDIO_ENCODER, TEXT_ENCODER, VAE, Checkpoint
from liveavatar_engine.weights.memory import (
    MemoryEstimate,
    MemoryRow,
    PartSizes,
    Share,
    predict_memory,
    stream_geometry,
)
from liveavatar_engine.weights.network import empty_network, load_network
from liveavatar_engine.weights.presets import PRESETS, Preset

META, GPU = torch.device("meta"), torch.device("cuda")
GB = 10**9
TINY_AREA = "64*64"


def _parts(preset: Preset) -> PartSizes:
    files = checkpoint_tensors(preset)
    names = (VAE, TEXT_ENCODER, f"{AUDIO_ENCODER}/model.safetensors")
    return PartSizes.of(*({name: spec.shape for name, spec in files[file].items()} for file in names))


def _predict(preset: str, device: torch.device = GPU, share: Share | None = None, **settings) -> MemoryEstimate:
    config = EngineConfig(**settings)
    geometry = stream_geometry(PRESETS[preset].model, config)
    return predict_memory(geometry, _parts(PRESETS[preset]), config, device, share)


# --- exact rows


@pytest.mark.parametrize(
    ("precision", "kv_precision", "dtype"),
    [
        ("fp32", "auto", torch.float32),
        ("bf16", "auto", torch.bfloat16),
        ("fp8", "auto", torch.bfloat16),
        ("bf16", "fp8", torch.bfloat16),
    ],
)
def test_weights_and_caches_are_predicted_to_the_byte(
    checkpoint: Path, precision: str, kv_precision: str, dtype: torch.dtype
) -> None:
    config = EngineConfig(size="64x64", precision=precision, kv_precision=kv_precision, steps=3, max_sessions=2)
    skip = config.fp8_skip if precision == "fp8" else None
    network = load_network(checkpoint, None, dtype, CPU, fp8_skip=skip)
    parts = part_sizes(Checkpoint(checkpoint))
    geometry = StreamGeometry(network.config, 64, 64)
    memory = predict_memory(geometry, parts, config, CPU)
    cache = E4M3 if kv_precision == "fp8" else dtype
    executor = StepExecutor(Denoiser(network, flow_match_schedule(3)), geometry, sessions=2, cache_dtype=cache)
    layers = executor.arena.layers
    for row, kind in (("rings", "ring"), ("sinks", "sink"), ("text keys", "text")):
        caches = [getattr(layer, kind) for layer in layers]
        tensors = [getattr(cache, name, None) for cache in caches for name in ("k", "v", "k_scale", "v_scale")]
        assert memory[row] == sum(tensor.nbytes for tensor in tensors if tensor is not None), row
    times = executor.denoiser.time, executor.denoiser.sink_time
    assert memory["time modulation"] == sum(time.blocks.nbytes + time.head.nbytes for time in times)
    assert memory["network"] == sum(parameter.nbytes for parameter in network.parameters())
    vae = load_vae(checkpoint / VAE, dtype, CPU)
    assert memory["VAE"] == sum(parameter.nbytes for parameter in vae.parameters())
    assert memory["text encoder"] == parts.text_parameters * dtype.itemsize
    assert memory["audio encoder"] == parts.audio_parameters * 4
    assert memory.total == sum(row.bytes for row in memory.rows)


def _meta_executor(preset: str, config: EngineConfig) -> StepExecutor:
    model = PRESETS[preset].model
    network = empty_network(model, torch.float32 if config.precision == "fp32" else torch.bfloat16)
    if config.precision == "fp8":
        use_fp8(network, config.fp8_skip)
    schedule = flow_match_schedule(config.steps)
    return StepExecutor(
        Denoiser(network, schedule, clean_pass=config.kv_mode == "clean"),
        stream_geometry(model, config),
        cache_dtype=E4M3 if config.kv_precision == "fp8" else None,
        diagonal=config.schedule == "diagonal",
        group=MetaGroup(config.sequence_parallel),
    )


class MetaGroup:
    """The first of some ranks, without the others: what they would send has a shape and no more."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_to_all(self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        assert sum(sent) == len(rows)
        return rows.contiguous().new_empty(sum(received), *rows.shape[1:])

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_empty(self.size * len(rows), *rows.shape[1:])


STEPS = {
    "tiny": ("tiny", {"size": "256x256", "precision": "fp32"}),
    "small": ("small", {"precision": "bf16", "motion_tokens": True}),
    "14b": ("14b", {"precision": "bf16"}),
    "14b fp8": ("14b", {"precision": "fp8", "kv_precision": "fp8"}),
    "clean": ("small", {"precision": "bf16", "kv_mode": "clean"}),
    "diagonal": ("14b", {"precision": "bf16", "schedule": "diagonal"}),
    "shared": ("14b", {"precision": "bf16", "sequence_parallel": 2}),
    "fp8, shared": ("14b", {"precision": "fp8", "kv_precision": "fp8", "sequence_parallel": 4}),
    "fp32, shared": ("small", {"precision": "fp32", "sequence_parallel": 4}),
}


@pytest.mark.parametrize(("preset", "settings"), STEPS.values(), ids=STEPS)
def test_buffers_and_working_memory_of_steps_are_near_the_truth(
    preset: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(features="windowed", **settings)
    with torch.inference_mode():
        with PeakMemory("meta") as memory:
            executor = _meta_executor(preset, config)
            cast = executor.cast(actors=1, masked=False, session=0)
        arena = executor.arena
        time = sum(t.blocks.nbytes + t.head.nbytes for t in (executor.denoiser.time, executor.denoiser.sink_time))
        network = sum(parameter.nbytes for parameter in executor.denoiser.network.parameters())
        caches = arena.ring_bytes + arena.sink_bytes + arena.text_bytes
        static = memory.live - caches - time - network
        peak = 0
        for work in cast.steps.values():
            with PeakMemory("meta") as memory:
                work()
            peak = max(peak, memory.peak)
    predicted = _predict(preset, features="windowed", **settings)
    assert predicted["rings"] == arena.ring_bytes
    assert predicted["sinks"] == arena.sink_bytes
    assert 0.99 < predicted["static inputs"] / static < 1.01
    without_audio = dataclasses.replace(_parts(PRESETS[preset]), audio_channels=0, vae=None)
    geometry = stream_geometry(PRESETS[preset].model, config)
    graphs = predict_memory(geometry, without_audio, config, GPU)["graphs"]
    assert 0.95 < graphs / peak < (1.35 if config.precision == "fp8" else 1.25)


def _meta_vae(preset: Preset, dtype: torch.dtype) -> Vae:
    with META:
        vae = Vae(preset.vae).eval().requires_grad_(False)
    for part in (vae.decoder, vae.conv2):
        part.to(dtype)
    return vae


@pytest.mark.parametrize(("preset", "precision"), [("tiny", "fp32"), ("14b", "bf16")])
def test_history_of_an_offloaded_vae_is_predicted_to_the_byte(preset: str, precision: str) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    stream = _meta_vae(PRESETS[preset], dtype).decoder_stream()
    for _ in range(2):
        stream.decode(torch.zeros(16, 1, 8, 12, device=META))
    frames = stream._history._frames.values()
    predicted = _predict(preset, size="96x64", precision=precision, offload=("vae",))
    assert predicted["VAE buffers"] == sum(frame.nbytes for frame in frames)


@torch.inference_mode()
@pytest.mark.parametrize("preset", ["small", "14b"])
def test_buffers_and_working_memory_of_the_decoder_are_near_the_truth(preset: str) -> None:
    vae = _meta_vae(PRESETS[preset], torch.bfloat16)
    with PeakMemory("meta") as memory:
        decoder = BlockDecoder(vae, 48, 88, 3, PlainCalls())
        static = memory.live
    with PeakMemory("meta") as memory:
        decoder.work_of(3, False)()
    settings = {"size": "704x384", "precision": "bf16", "features": "windowed"}
    buffers = [_predict(preset, **settings, max_sessions=sessions)["VAE buffers"] for sessions in (1, 2)]
    assert buffers[0] == decoder.bytes
    assert 0.99 < decoder.bytes / static < 1.01
    assert buffers[1] - buffers[0] == sum(part.nbytes for part in decoder.history)
    graphs = [_predict(preset, **settings, offload=offload)["graphs"] for offload in ((), ("vae",))]
    assert 0.95 < (graphs[0] - graphs[1]) / memory.peak < 1.2


# --- estimated rows


@pytest.mark.parametrize(("preset", "size"), [("small", (256, 256)), ("14b", (384, 704))])
def test_working_memory_of_encoding_an_image_is_near_the_truth(
    preset: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(History, "equals", lambda *_: False)  # there is nothing to compare on the meta device
    vae = _meta_vae(PRESETS[preset], torch.bfloat16)
    with PeakMemory() as memory:
        vae.encode_still(torch.zeros(3, *size, device=META), 3)
    predicted = _predict(preset, size=f"{size[1]}x{size[0]}", precision="bf16")
    assert 0.95 < predicted["working memory"] / memory.peak < 1.2


@torch.inference_mode()
def test_working_memory_of_a_prompt_is_near_the_truth() -> None:
    preset = PRESETS["14b"]
    shapes = {name: spec.shape for name, spec in checkpoint_tensors(preset)[TEXT_ENCODER].items()}
    with META:
        encoder = UMT5EncoderModel(_encoder_config(Path(), shapes)).eval().bfloat16()
        embedded = torch.zeros(1, preset.model.text_len, preset.model.text_dim, dtype=torch.bfloat16)
        mask = torch.ones(1, 1, preset.model.text_len, preset.model.text_len, dtype=torch.bool)
    with PeakMemory("meta") as memory:
        encoder(inputs_embeds=embedded, attention_mask=mask)
    sizes = _parts(preset)
    parts = PartSizes(text_heads=sizes.text_heads, text_ffn=sizes.text_ffn, text_layer=sizes.text_layer)
    config = EngineConfig(precision="bf16", features="windowed", offload=())
    geometry = stream_geometry(preset.model, config)
    plain = predict_memory(geometry, parts, config, GPU)["working memory"]
    assert 0.95 < plain / memory.peak < 1.6
    offloaded = predict_memory(geometry, parts, dataclasses.replace(config, offload=("text_encoder",)), GPU)
    layer = sum(parameter.nbytes for parameter in encoder.encoder.block[1].parameters())
    assert offloaded["working memory"] - plain == 2 * layer


@torch.inference_mode()
def test_working_memory_of_speech_is_near_the_truth() -> None:
    preset = PRESETS["14b"]
    with META:
        encoder = Wav2Vec2Model(audio_config(preset)).eval()
        speech = torch.zeros(1, 16_000 * GLOBAL_SECONDS)
    with PeakMemory("meta") as memory:
        output = encoder(speech, output_hidden_states=True)
        torch.cat((*output.hidden_states[:-1], output.last_hidden_state))
    parts = PartSizes(audio_channels=_parts(preset).audio_channels)
    config = EngineConfig(precision="bf16")
    predicted = predict_memory(stream_geometry(preset.model, config), parts, config, GPU)
    assert "encoding the audio" in predicted.rows[-1].note
    assert 0.95 < predicted["working memory"] / memory.peak < 1.6


# --- what settings change


def test_the_14b_model_fits_a_card_of_48_gb() -> None:
    """With FP8 and both offloadable parts on the host, and a gigabyte left for CUDA itself."""
    settings = {"size": "704*384", "precision": "fp8", "kv_precision": "fp8"}
    memory = _predict("14b", **settings, offload=("text_encoder", "vae"))
    assert memory.total + GB < 49_140 * 2**20
    largest = sorted(memory.rows, key=lambda row: -row.bytes)[:4]
    assert [row.name for row in largest] == ["rings", "network", "working memory", "sinks"]
    assert 21.2 * GB < memory["rings"] < 21.4 * GB
    assert 17.1 * GB < memory["network"] < 17.3 * GB
    assert memory["text encoder"] == 0
    assert 11.7 * GB < memory.host < 11.8 * GB
    assert _predict("14b", **settings).total > 49_140 * 2**20, "the decoder's buffers are too large for such a card"


def test_fp8_halves_the_network_and_the_rings() -> None:
    wide, narrow = _predict("14b", precision="bf16"), _predict("14b", precision="fp8", kv_precision="fp8")
    assert 0.5 < narrow["network"] / wide["network"] < 0.53
    assert 0.5 < narrow["rings"] / wide["rings"] < 0.53


def test_offloaded_parts_are_in_host_memory() -> None:
    at_home = _predict("14b", precision="bf16", offload=())
    away = _predict("14b", precision="bf16", offload=["vae", "text_encoder"])
    assert at_home.host == 0
    assert away.host == at_home["text encoder"] + at_home["VAE"]
    assert away["text encoder"] == away["VAE"] == 0
    rows = {row.name: row for row in away.rows}
    assert rows["text encoder"].note == "offloaded: 11.36 GB of host memory"
    encoding = away["working memory"] - at_home["working memory"]
    assert 0 < encoding < at_home["VAE"], "the encoder comes to the device while it works"
    on_cpu = _predict("small", CPU, precision="bf16", offload=["vae", "text_encoder"])
    assert on_cpu.host == 0
    assert on_cpu["text encoder"] > 0


def test_graphs_keep_what_steps_need() -> None:
    captured, plain = _predict("14b", precision="bf16"), _predict("14b", precision="bf16", graphs=False)
    assert captured.total - plain.total == captured["graphs"]
    assert not [row for row in plain.rows if row.name == "graphs"]
    steps, diagonal = (
        _predict("14b", precision="bf16", offload=("vae",), schedule=name) for name in ("sequential", "diagonal")
    )
    assert 3.3 < diagonal["graphs"] / steps["graphs"] < 4


def test_sessions_steps_and_modes() -> None:
    one, three = (_predict("small", precision="bf16", max_sessions=count) for count in (1, 3))
    for name in ("rings", "sinks", "text keys", "audio states"):
        assert three[name] == 3 * one[name], name
    assert one["VAE buffers"] < three["VAE buffers"] < 3 * one["VAE buffers"]
    assert three["network"] == one["network"]
    clean = _predict("small", precision="bf16", kv_mode="clean")
    assert one["rings"] == 4 * clean["rings"]
    windowed = _predict("small", precision="bf16", features="windowed")
    assert "audio states" not in {row.name for row in windowed.rows}


# --- refusal


def _require(checkpoint: Path, share: Share | None = None, **settings) -> None:
    require_memory(Checkpoint(checkpoint), EngineConfig(devices="cpu", **settings), CPU, share)


def test_what_does_not_fit_is_refused_with_the_table(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda _: 100 * 10**6)
    with pytest.raises(DeviceMemoryError) as error:
        _require(checkpoint, size="704*384", max_sessions=2)
    sentence, *table, help_ = str(error.value).splitlines()
    assert sentence.startswith("cpu: this needs ")
    assert sentence.endswith(" of memory, 0.10 GB are free")
    assert [line.split("  ")[1] for line in table] == [
        *("network", "text encoder", "audio encoder", "VAE", "rings", "sinks", "text keys", "audio states"),
        *("VAE buffers", "time modulation", "static inputs", "working memory", "total"),
    ]
    assert help_.startswith("what would help: kv_precision fp8 (")
    assert ", precision fp8 (" in help_
    assert ", 1 session (" in help_
    assert help_.endswith(", a smaller size")
    assert "offload" not in help_


def test_what_would_help_on_a_gpu(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda _: 0)
    with pytest.raises(DeviceMemoryError, match="cuda: this needs") as error:
        require_memory(Checkpoint(checkpoint), EngineConfig(precision="fp8", kv_precision="fp8", size="64x64"), GPU)
    assert "what would help: offload vae (" in str(error.value)


def test_offloaded_weights_must_fit_the_host(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda _: 10**15)
    monkeypatch.setattr(budget, "available_memory", lambda: 1000)
    with pytest.raises(DeviceMemoryError, match="(?s)host: offloaded weights need .*offload less of text_encoder"):
        require_memory(Checkpoint(checkpoint), EngineConfig(size="64x64"), GPU)


def test_an_engine_refuses_before_it_loads(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory", lambda _: 10**6)
    for loader in ("load_network", "load_offloadable_vae", "Encoders"):
        monkeypatch.setattr(source_module, loader, lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(DeviceMemoryError, match="this needs"):
        Engine.from_pretrained(checkpoint, config=EngineConfig(size="64x64", devices="cpu"))


SHARES = (
    Share(encodes=True, sessions=2),
    Share(denoises=True, steps=2, sessions=2),
    Share(denoises=True, decodes=True, steps=2, sessions=2),
)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_shares_make_up_the_whole(device: torch.device) -> None:
    whole = _predict("14b", device, max_sessions=2)
    parts = [_predict("14b", device, share=share, max_sessions=2) for share in SHARES]
    for name in ("rings", "audio states", "VAE buffers"):
        assert whole[name] == sum(part[name] for part in parts if name in _names(part)), name
    assert [part["network"] for part in parts[1:]] == [whole["network"]] * 2, "every stage has all layers"
    assert [_names(part) & {"network", "audio encoder", "VAE", "rings"} for part in parts] == [
        {"audio encoder", "VAE"},
        {"network", "rings"},
        {"network", "VAE", "rings"},
    ]
    assert all(part.total < whole.total for part in parts)


def test_mates_share_rings(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shared = (_predict("14b", GPU, share=Share(denoises=True, steps=4, mates=mates)) for mates in (1, 4))
    assert shared["rings"] == alone["rings"] // 4
    assert "1/4 of the heads" in shared.table()
    monkeypatch.setattr(budget, "free_memory", lambda _: 0)
    with pytest.raises(DeviceMemoryError, match="cpu: the encoders need") as error:
        _require(checkpoint, Share(encodes=True), size="64x64")
    assert "network" not in str(error.value).split("what would help")[0]


def _names(memory: MemoryEstimate) -> set[str]:
    return {row.name for row in memory.rows}


def test_a_system_that_tells_nothing_refuses_nothing(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    assert (available_memory() or 0) > 10**8
    monkeypatch.setattr(budget, "_MEMINFO", tmp_path / "none")
    assert available_memory() is None
    _require(checkpoint, size="4096x4096", max_sessions=100)
    (tmp_path / "none").write_text("MemTotal: 100 kB\nMemAvailable:      20 kB\n")
    assert available_memory() == 20 * 1024
    with pytest.raises(DeviceMemoryError):
        _require(checkpoint, size="64x64")


def test_an_area_for_square_pictures_only_is_accepted(checkpoint: Path) -> None:
    _require(checkpoint, size=TINY_AREA)


def test_damage_is_found_first(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    (copy / TEXT_ENCODER).write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="not a PyTorch file"):
        _require(copy)


def test_the_table_is_plain_text() -> None:
    rows = (MemoryRow("network", 17_230_000_000, "in e4m3"), MemoryRow("a", 1_500_000))
    assert MemoryEstimate(rows).table().splitlines() == [
        "  network   17.23 GB  in e4m3",
        "  a          1.50 MB",
        "  total     17.23 GB",
    ]
