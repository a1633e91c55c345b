"""What the pipelines refuse, in words that say what to do; and what they say of arguments that count for nothing."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compat.pipeline_calls import Files, reference_config
from safetensors.torch import load_file
from support import OWN_GOLDEN
from torch import nn

from liveavatar_engine.compat import BlockwiseWanS2V, TppWanS2V, WanS2V, replace_linear_with_scaled_fp8
from liveavatar_engine.compat.lora_file import adapter_file
from liveavatar_engine.compat.noise_model import Adapter
from liveavatar_engine.errors import CheckpointError, ConfigError, InputError

LORA = OWN_GOLDEN / "lora.safetensors"


@pytest.fixture
def files(tmp_path: Path, face: np.ndarray) -> Files:
    return Files(tmp_path, face)


@pytest.fixture
def pipeline(checkpoint: Path) -> WanS2V:
    return WanS2V(reference_config(), checkpoint)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_prompt": None}, InputError, "input_prompt: expected text"),
        ({"ref_image_path": None}, InputError, "ref_image_path: expected a picture's file"),
        ({"ref_image_path": "nobody.png"}, InputError, r"nobody\.png"),
        ({"audio_path": None}, InputError, "audio_path: expected a sound file"),
        ({"audio_path": "silence.wav"}, InputError, r"silence\.wav"),
        ({"enable_tts": True}, ConfigError, "enable_tts=True: this backend makes no speech"),
        ({"tts_text": "hello"}, ConfigError, "tts_text: only for enable_tts"),
        ({"num_repeat": 0}, ConfigError, "num_repeat must be an integer, at least 1, not 0"),
        ({"max_repeat": 0}, ConfigError, "max_repeat must be"),
        ({"max_area": 10}, InputError, "no video of 10 pixels"),
        ({"infer_frames": 80}, ConfigError, "infer_frames 80: .* pass a multiple of 12, such as 48"),
        ({"infer_frames": 0}, ConfigError, "infer_frames 0"),
        ({"sample_solver": "dpm++"}, ConfigError, r"sample_solver 'dpm\+\+': the reference only runs 'euler'"),
        ({"sampling_steps": 0}, ConfigError, "sampling_steps must be"),
        ({"init_first_frame": True}, ConfigError, "init_first_frame=True: the reference takes it and does nothing"),
        ({"use_dataset": True}, ConfigError, "use_dataset=True"),
        ({"drop_motion_noisy": True}, ConfigError, "drop_motion_noisy=True"),
        ({"dataset_sample_idx": 3}, ConfigError, "dataset_sample_idx: only for use_dataset"),
        ({"num_gpus_dit": 0}, ConfigError, "num_gpus_dit must be"),
        ({"seed": "x"}, ConfigError, "seed must be an integer"),
        (
            {"mask": torch.ones(1, 3, 5, 5, 1)},
            InputError,
            r"mask: expected a tensor \[1, 3 or more frames, or 1, 4, 4, 1\]",
        ),
        ({"mask": torch.ones(1, 2, 4, 4, 1)}, InputError, "mask: expected a tensor"),
        ({"pose_video": "nothing.mp4"}, InputError, r"nothing\.mp4"),
    ],
)
def test_generate(changes, error, message, pipeline: WanS2V, files: Files) -> None:
    with pytest.raises(error, match=message):
        pipeline.generate(**files.arguments(**changes))
    assert pipeline._backend.loaded is None, "nothing is loaded for a bad request"


def test_a_live_pipeline_refuses_at_the_call(checkpoint: Path, files: Files) -> None:
    with pytest.raises(ConfigError, match="infer_frames 80"):
        BlockwiseWanS2V(reference_config(), checkpoint).generate(**files.arguments(infer_frames=80))


@pytest.mark.parametrize(("name", "value"), [("sink_distance", 99), ("sink_distance", "far"), ("noise_clips", -1)])
def test_attributes(name: str, value: object, checkpoint: Path, files: Files) -> None:
    pipeline = BlockwiseWanS2V(reference_config(), checkpoint)
    setattr(pipeline, name, value)
    with pytest.raises(ConfigError, match=f"{name} must be"):
        list(pipeline.generate(**files.arguments()))
    assert pipeline._backend.loaded is None


def test_unknown_arguments(pipeline: WanS2V) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        pipeline.generate(colour="blue")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t5_fsdp": True}, "t5_fsdp=True: weights are not sharded"),
        ({"dit_fsdp": True}, "dit_fsdp=True: weights are not sharded"),
        ({"use_sp": True}, "use_sp=True, sp_size=None: leave it out"),
        ({"sp_size": 2}, "sp_size=2"),
        ({"is_training": True}, "is_training=True: this backend does not train"),
        ({"offload_kv_cache": True}, "offload_kv_cache=True: rings stay on the device"),
    ],
)
def test_options(options, message, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        WanS2V(reference_config(), checkpoint, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_fps": 16}, r"config\.sample_fps must be 25, not 16"),
        ({"vae_checkpoint": "other.pth"}, r"config\.vae_checkpoint must be 'Wan2.1_VAE.pth'"),
        ({"sample_solver": "heun"}, r"config\.sample_solver must be one of euler, unipc, dpm\+\+, not 'heun'"),
        ({"param_dtype": torch.float16}, r"param_dtype must be torch\.bfloat16 or torch\.float32"),
        ({"transformer": SimpleNamespace(motion_frames=17)}, r"config\.transformer\.motion_frames must be 73, not 17"),
    ],
)
def test_configurations(changes, message, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        WanS2V(reference_config(**changes), checkpoint)


def test_a_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a complete Live Avatar checkpoint"):
        WanS2V(reference_config(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lora_rank": 8}, ConfigError, "of rank 4, not lora_rank=8"),
        ({"lora_rank": 0}, ConfigError, "lora_rank must be an integer"),
        ({"lora_target_modules": "ffn.0"}, ConfigError, "which is none of lora_target_modules ffn.0"),
        ({"pretrained_lora_path": "missing.safetensors"}, CheckpointError, "missing.safetensors: no such file"),
        ({"load_only": True}, ConfigError, "state_dict_converter and load_only are not supported"),
        ({"state_dict_converter": dict}, ConfigError, "state_dict_converter and load_only are not supported"),
    ],
)
def test_adapters(arguments, error, message, pipeline: WanS2V) -> None:
    settings = {"lora_rank": 4, "lora_alpha": 2, "pretrained_lora_path": LORA, **arguments}
    with pytest.raises(error, match=message):
        pipeline.add_lora_to_model(pipeline.noise_model, **settings)
    assert pipeline.noise_model.adapter is None


def test_order_of_what_is_asked_of_the_network(checkpoint: Path, files: Files) -> None:
    pipeline = TppWanS2V(reference_config(), checkpoint)
    pipeline.noise_model = pipeline.add_lora_to_model(pipeline.noise_model, 4, 2, pretrained_lora_path=LORA)
    with pytest.raises(ConfigError, match="is merged already"):
        pipeline.add_lora_to_model(pipeline.noise_model, 4, 2, pretrained_lora_path=LORA)
    with pytest.raises(ConfigError, match="no linear layer's name contains 'nowhere'"):
        replace_linear_with_scaled_fp8(pipeline.noise_model, ["nowhere"])
    pipeline.generate(**files.arguments(max_repeat=1, sampling_steps=1))
    with pytest.raises(ConfigError, match="FP8: the network is loaded already"):
        replace_linear_with_scaled_fp8(pipeline.noise_model, ["head.head"])


def test_a_lora_behind_fp8(pipeline: WanS2V) -> None:
    replace_linear_with_scaled_fp8(pipeline.noise_model, ["head.head"])
    with pytest.raises(ConfigError, match="add it before the layers become FP8"):
        pipeline.add_lora_to_model(pipeline.noise_model, 4, 2, pretrained_lora_path=LORA)


def test_networks_of_others(pipeline: WanS2V) -> None:
    with pytest.raises(ConfigError, match="only what add_lora_to_model returned can be assigned"):
        pipeline.noise_model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="expected this pipeline's noise_model"):
        pipeline.add_lora_to_model(nn.Linear(1, 1), pretrained_lora_path=LORA)
    with pytest.raises(ConfigError, match="not a Linear"):
        replace_linear_with_scaled_fp8(nn.Linear(1, 1))
    with pytest.raises(AttributeError, match="CausalWanModel_S2V"):
        pipeline.noise_model.load_state_dict({})


def test_the_network_shows_its_sizes(pipeline: WanS2V) -> None:
    model = pipeline.noise_model
    assert (model.num_layers, model.num_heads, model.dim, model.dtype) == (3, 2, 64, torch.float32)
    assert model.eval().requires_grad_(False) is model
    assert not hasattr(model, "parameters")


def test_what_counts_for_nothing_is_said(checkpoint: Path, files: Files, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = TppWanS2V(reference_config(), checkpoint)
    with caplog.at_level(logging.INFO):
        pipeline.generate(
            **files.arguments(
                max_repeat=1,
                sampling_steps=1,
                num_gpus_dit=4,
                input_video_for_sam2=files.image,
                guide_scale=4.5,
                shift=5,
                n_prompt="ugly",
            )
        )
    for words in ("guide_scale 4.5", "shift 5", "n_prompt", "generate_size 64*64", "input_video_for_sam2: not used"):
        assert words in caplog.text


class TestAdapterFiles:
    """Where an adapter is looked for."""

    def test_a_folder(self, tmp_path: Path) -> None:
        shutil.copy(LORA, tmp_path / "liveavatar.safetensors")
        assert adapter_file(tmp_path) == tmp_path / "liveavatar.safetensors"

    def test_a_hub_name_whose_file_is_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        kept = tmp_path / "ckpt" / "LiveAvatar"
        kept.mkdir(parents=True)
        shutil.copy(LORA, kept / "liveavatar.safetensors")
        assert adapter_file("Quark-Vision/Live-Avatar").resolve() == kept / "liveavatar.safetensors"

    def test_a_hub_name_that_the_hub_does_not_give(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub

        def refuse(*args, **kwargs):
            raise OSError("no network")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
        with pytest.raises(CheckpointError, match="LoRA Quark-Vision/Live-Avatar: neither a file .* no network"):
            adapter_file("Quark-Vision/Live-Avatar")

    def test_a_pickle(self, pipeline: WanS2V, tmp_path: Path) -> None:
        path = tmp_path / "lora.pt"
        path.write_bytes(b"broken")
        with pytest.raises(CheckpointError, match=r"lora\.pt: not a PyTorch file of plain tensors"):
            pipeline.add_lora_to_model(pipeline.noise_model, 4, 2, pretrained_lora_path=path)
        torch.save(load_file(LORA), path)
        pipeline.add_lora_to_model(pipeline.noise_model, 4, 2, pretrained_lora_path=path)
        assert pipeline.noise_model.adapter == Adapter(path, 0.5)


def test_an_adapters_scale_is_alpha_over_rank(checkpoint: Path, files: Files, tmp_path: Path) -> None:
    tensors = load_file(LORA)
    halved = {name: tensor / 2 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    torch.save(halved, tmp_path / "halved.pt")
    videos = []
    for lora, alpha in ((LORA, 2), (tmp_path / "halved.pt", 4), (LORA, 4)):
        pipeline = TppWanS2V(reference_config(), checkpoint)
        pipeline.add_lora_to_model(pipeline.noise_model, 4, alpha, pretrained_lora_path=lora)
        videos.append(pipeline.generate(**files.arguments(max_repeat=1, sampling_steps=1))[0])
    assert videos[0].equal(videos[1])
    assert not videos[0].equal(videos[2])
