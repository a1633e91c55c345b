"""What the reference's pipelines have in common: their constructor, and attributes that scripts touch.

Weights are loaded when the first video is made. LoRA and FP8, which scripts ask for behind the constructor, are merged
and quantised on the way; the constructor looks at the checkpoint's files and headers only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conditions.audio_features import GLOBAL_SECONDS, Features
from ..conditions.pose import PoseStream
from ..config.geometry import FRAMES_PER_SECOND
from ..denoise.schedule import TRAIN_TIMESTEPS
from ..errors import ConfigError
from ..model.network import MOTION_FRAMES
from ..pipeline import inputs as engine_inputs
from ..pipeline.engine import Engine
from ..weights.layout import TEXT_ENCODER, TOKENIZER, VAE, Checkpoint
from .arguments import Arguments
from .backend import Backend
from .clips import Observer
from .devices import Layout, one_device
from .encoders import AudioEncoderView, TextEncoderView, VaeView
from .inputs import Inputs
from .noise_model import NoiseModel

_log = logging.getLogger(__name__)
_SOLVERS = ("euler", "unipc", "dpm++")
_TRAINED_DROP = 0.3
_ANY_STEPS, _ANY_SIDES = 4, (384, 704)
"""Settings of an engine that is loaded for its encoders; those of a video take their place."""


class Pipeline:
    """A pipeline of the reference over this engine.

    Attributes:
        noise_model: the network to be loaded.
        text_encoder, vae, audio_encoder: the engine's, as the reference calls them; using one loads the engine.
        motion_frames: video frames behind the motion latents.
        fps: video frames per second.
        sink_distance: "random", or a fixed distance from a block to the reference image (4..30 latent frames). The
            reference draws with Python's `random`; here the draws follow from the seed.
        whole_speech_seconds: longest recorded speech that wav2vec2 sees as a whole, as the reference does with any.
        observe: called with the number and the latents of every block; None: nobody.
    """

    sink_distance: str | int = "random"
    whole_speech_seconds: float = GLOBAL_SECONDS
    observe: Observer | None = None

    def __init__(
        self,
        config: Any,
        checkpoint_dir: str | Path,
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_sp: bool = False,
        sp_size: int | None = None,
        t5_cpu: bool = False,
        init_on_cpu: bool = True,
        drop_part_motion_frames: float = 0.3,
        convert_model_dtype: bool = False,
        is_training: bool = False,
        single_gpu: bool = False,
        offload_kv_cache: bool = False,
    ) -> None:
        """Take the reference's arguments.

        Args:
            config: the reference's configuration of the model, such as `WAN_CONFIGS["s2v-14B"]`.
            checkpoint_dir: of the checkpoint, original or converted.
            device_id: GPU of this process; without any GPU, the CPU is used.
            rank: of this process in its job.
            t5_fsdp, dit_fsdp: sharded weights, which are refused.
            use_sp, sp_size: sequence parallelism, which is refused; an `sp_size` of 1 is none.
            t5_cpu: keep the text encoder's weights in host memory.
            init_on_cpu, convert_model_dtype: nothing to do: weights go to the device at once, in `config.param_dtype`.
            drop_part_motion_frames: of training; it counts for nothing in `generate`.
            is_training: refused.
            single_gpu: nothing to do: all caches are on the device.
            offload_kv_cache: refused: rings stay on the device.

        Raises:
            ConfigError: something that this backend does not do is asked for.
            CheckpointError: the checkpoint is not complete.
        """
        _check_options(t5_fsdp, dit_fsdp, use_sp, sp_size, is_training, offload_kv_cache)
        _check_config(config)
        if drop_part_motion_frames != _TRAINED_DROP:
            _log.warning(
                "drop_part_motion_frames %s: only training reads it, as in the reference", drop_part_motion_frames
            )
        self.config, self.checkpoint_dir, self.device_id, self.rank = config, checkpoint_dir, device_id, rank
        self.t5_cpu, self.init_on_cpu, self.is_training = t5_cpu, init_on_cpu, is_training
        self.single_gpu, self.offload_kv_cache, self.sp_size = single_gpu, offload_kv_cache, 1
        self.drop_part_motion_frames = drop_part_motion_frames
        self.num_train_timesteps, self.num_frames_per_block = config.num_train_timesteps, config.num_frames_per_block
        self.param_dtype, self.sample_neg_prompt = config.param_dtype, config.sample_neg_prompt
        self.motion_frames, self.fps = config.transformer.motion_frames, config.sample_fps
        self.drop_first_motion, self.audio_sample_m = config.drop_first_motion, 0
        found = Checkpoint(Path(checkpoint_dir))
        self._noise_model = NoiseModel(found, config.param_dtype, config.num_frames_per_block)
        self._backend = Backend(found, self._noise_model, config.text_len)
        self.device = torch.device(one_device(device_id).devices[0])
        self.text_encoder = TextEncoderView(self._any_engine, self._backend)
        self.vae = VaeView(self._any_engine)
        self.audio_encoder = AudioEncoderView(self._any_engine)

    @property
    def noise_model(self) -> NoiseModel:
        """The network to be loaded; what `add_lora_to_model` returned may be assigned to it."""
        return self._noise_model

    @noise_model.setter
    def noise_model(self, model: Any) -> None:
        if model is not self._noise_model:
            raise ConfigError(
                "noise_model: only what add_lora_to_model returned can be assigned; a network of your own runs in a "
                "loop of your own, as liveavatar_engine.compat.CausalWanModel_S2V"
            )

    def add_lora_to_model(
        self,
        model: Any,
        lora_rank: int = 4,
        lora_alpha: float = 4,
        lora_target_modules: str = "q,k,v,o,ffn.0,ffn.2",
        init_lora_weights: str | bool = "kaiming",
        pretrained_lora_path: str | Path | None = None,
        state_dict_converter: Callable[..., Any] | None = None,
        load_only: bool = False,
        load_lora_weight_only: bool = False,
    ) -> NoiseModel:
        """Merge an adapter, W + (lora_alpha / lora_rank) B A, when the weights are loaded; its file is checked now.

        Args:
            model: this pipeline's noise model.
            lora_rank, lora_alpha: of the adapter.
            lora_target_modules: ends of the names of layers that it may change, joined by commas.
            init_lora_weights: of an adapter without a file, which changes nothing.
            pretrained_lora_path: a .safetensors or PyTorch file, a folder with liveavatar.safetensors, or a name on the
                Hugging Face hub; None: nothing is merged.
            state_dict_converter, load_only: refused.
            load_lora_weight_only: nothing to do: files with other tensors than an adapter's are refused.

        Raises:
            ConfigError, CheckpointError: as `NoiseModel.add_adapter`, or an argument that is refused.
        """
        if model is not self._noise_model:
            raise ConfigError("add_lora_to_model: expected this pipeline's noise_model")
        if state_dict_converter is not None or load_only:
            raise ConfigError(
                "state_dict_converter and load_only are not supported: pass the file of an adapter as it is"
            )
        if pretrained_lora_path is None:
            _log.info("add_lora_to_model without a file: a new adapter (%s) changes nothing", init_lora_weights)
            return model
        if not isinstance(lora_rank, int) or lora_rank < 1:
            raise ConfigError(f"lora_rank must be an integer, at least 1, not {lora_rank!r}")
        targets = [target.strip() for target in lora_target_modules.split(",")]
        model.add_adapter(pretrained_lora_path, lora_rank, float(lora_alpha), targets)
        return model

    def encode_prompt(
        self, input_prompt: str, n_prompt: str | None = None, offload_model: bool = True
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Contexts of a prompt and, unless `n_prompt` is None, of a negative one ("": the configuration's)."""
        negative = self.sample_neg_prompt if n_prompt == "" else n_prompt
        context = self.text_encoder([input_prompt], self.device)
        return context, None if negative is None else self.text_encoder([negative], self.device)

    def encode_audio(self, audio_path: str | Path, infer_frames: int) -> tuple[Tensor, int]:
        """Audio states of a file, [1, layers, dim, columns], zero past its end, and its clips of `infer_frames`."""
        features = self.audio_encoder.extract_audio_feat(audio_path, return_all_layers=True)
        return self._columns(features, infer_frames)

    def _columns(self, features: Tensor, infer_frames: int) -> tuple[Tensor, int]:
        """States at 30 Hz as those of clips of video frames, and how many clips."""
        columns, clips = self.audio_encoder.get_audio_embed_bucket_fps(features, self.fps, infer_frames)
        return columns.permute(1, 2, 0)[None].to(self.device), clips

    def set_eval(self) -> None:
        """Nothing to do: this backend only infers."""

    def _read(self, arguments: Arguments, clips: int | None, *, listens: bool = False) -> Inputs:
        """Check and read what `generate` was given."""
        arguments.check(self.num_frames_per_block)
        model = self._noise_model.config
        return Inputs.read(arguments, model, self.num_frames_per_block, clips, listens=listens)

    def _engine(self, layout: Layout, arguments: Arguments, inputs: Inputs) -> Engine:
        size = inputs.geometry.height, inputs.geometry.width
        offload = arguments.offload_model or self.t5_cpu
        distance = self.sink_distance
        wanted = self._backend.settings(layout, arguments.sampling_steps, size, offload=offload, sink_distance=distance)
        return self._backend.engine(wanted)

    def _spoken(self, engine: Engine, inputs: Inputs) -> Features:
        """Audio states of what was read."""
        return self._backend.spoken(engine, inputs, self.whole_speech_seconds)

    def _any_engine(self) -> Engine:
        """An engine for its encoders: the one at hand, else one with settings that a video may change."""
        if self._backend.loaded is not None:
            return self._backend.loaded
        layout = one_device(self.device_id)
        distance = self.sink_distance
        wanted = self._backend.settings(layout, _ANY_STEPS, _ANY_SIDES, offload=True, sink_distance=distance)
        return self._backend.engine(wanted)

    def _pose(
        self, engine: Engine, arguments: Arguments, inputs: Inputs, kind: type[PoseStream] = PoseStream
    ) -> PoseStream | None:
        if arguments.pose_video is None:
            return None
        geometry = inputs.geometry
        frames = engine_inputs.pose_frames(arguments.pose_video, geometry.height, geometry.width, FRAMES_PER_SECOND)
        return kind(engine.encoders.vae, frames, geometry)


def _check_options(
    t5_fsdp: bool, dit_fsdp: bool, use_sp: bool, sp_size: int | None, is_training: bool, offload_kv_cache: bool
) -> None:
    """Refuse what this backend does not do."""
    for name, asked in (("t5_fsdp", t5_fsdp), ("dit_fsdp", dit_fsdp)):
        if asked:
            raise ConfigError(f"{name}=True: weights are not sharded; leave it out (t5_cpu keeps T5's on the host)")
    if use_sp or sp_size not in (None, 1):
        raise ConfigError(
            f"use_sp={use_sp}, sp_size={sp_size}: leave it out, as the reference's scripts have to; Engine shares "
            "steps between GPUs (EngineConfig.sequence_parallel)"
        )
    if is_training:
        raise ConfigError("is_training=True: this backend does not train")
    if offload_kv_cache:
        raise ConfigError(
            "offload_kv_cache=True: rings stay on the device; leave it out, and if memory is short, use FP8 or a "
            "smaller size"
        )


def _check_config(config: Any) -> None:
    """Check a configuration of the reference against what the engine is made for."""
    expected = {
        "num_train_timesteps": TRAIN_TIMESTEPS,
        "sample_fps": FRAMES_PER_SECOND,
        "t5_checkpoint": TEXT_ENCODER,
        "t5_tokenizer": TOKENIZER,
        "vae_checkpoint": VAE,
    }
    for name, value in expected.items():
        if (found := getattr(config, name, None)) != value:
            raise ConfigError(f"config.{name} must be {value!r}, not {found!r}")
    motion = config.transformer.motion_frames
    if motion != MOTION_FRAMES:
        raise ConfigError(f"config.transformer.motion_frames must be {MOTION_FRAMES}, not {motion!r}")
    if config.sample_solver not in _SOLVERS:
        raise ConfigError(f"config.sample_solver must be one of {', '.join(_SOLVERS)}, not {config.sample_solver!r}")
