"""Configurations by task, and areas by name."""

from types import SimpleNamespace

import torch

WAN_CONFIGS = {
    "s2v-14B": SimpleNamespace(
        num_train_timesteps=1000,
        num_frames_per_block=3,
        param_dtype=torch.float32,
        text_len=12,
        t5_checkpoint="models_t5_umt5-xxl-enc-bf16.pth",
        t5_tokenizer="google/umt5-xxl",
        vae_checkpoint="Wan2.1_VAE.pth",
        sample_solver="unipc",
        sample_neg_prompt="blurred",
        sample_fps=25,
        sample_shift=3,
        sample_steps=40,
        sample_guide_scale=4.5,
        drop_first_motion=True,
        transformer=SimpleNamespace(motion_frames=73),
    )
}
MAX_AREA_CONFIGS = {"64*64": 64 * 64, "128*64": 128 * 64}
