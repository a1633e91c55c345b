"""A script with the reference's import structure, flags and calls, written for the tests of the launcher."""

import argparse
import importlib.util
import logging
import os
import sys

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.distributed as dist
from liveavatar.models.wan.wan_2_2.configs import MAX_AREA_CONFIGS, WAN_CONFIGS
from liveavatar.models.wan.wan_2_2.distributed.util import init_distributed_group
from liveavatar.models.wan.wan_2_2.utils.prompt_extend import DashScopePromptExpander
from liveavatar.models.wan.wan_2_2.utils.utils import merge_video_audio, save_video, str2bool
from liveavatar.utils.args_config import parse_args_for_training_config as training_config_parser
from liveavatar.utils.router.synthesize_audio import merge_multiple_audio_files


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", default="s2v-14B", choices=list(WAN_CONFIGS))
    parser.add_argument("--size", default="64*64", choices=list(MAX_AREA_CONFIGS))
    for name in ("ckpt_dir", "prompt", "image", "audio", "save_file", "training_config", "lora_path_dmd"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--offload_model", type=str2bool, default=None)
    parser.add_argument("--ulysses_size", type=int, default=1)
    parser.add_argument("--sample_solver", default="euler")
    parser.add_argument("--sample_steps", type=int)
    parser.add_argument("--sample_shift", type=float)
    parser.add_argument("--sample_guide_scale", type=float)
    parser.add_argument("--base_seed", type=int, default=-1)
    parser.add_argument("--infer_frames", type=int, default=80)
    parser.add_argument("--num_clip", type=int)
    parser.add_argument("--num_gpus_dit", type=int, default=4)
    for name in ("load_lora", "fp8", "convert_model_dtype", "single_gpu", "tpp", "offload_kv_cache"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--use_prompt_extend", action="store_true")
    parser.add_argument("--enable_online_decode", action="store_true")
    args = parser.parse_args()
    config = WAN_CONFIGS[args.task]
    args.sample_steps = args.sample_steps or config.sample_steps
    args.sample_shift = args.sample_shift or config.sample_shift
    return args


def generate(args: argparse.Namespace, training: dict) -> None:
    rank, world_size = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    local_rank = int(os.getenv("LOCAL_RANK", 0))
    logging.basicConfig(level=logging.INFO)
    torch.cuda.set_device(local_rank)
    dist.init_process_group(backend="nccl", init_method="env://", rank=rank, world_size=world_size)
    if args.tpp:
        from liveavatar.models.wan.causal_s2v_pipeline_tpp import WanS2V
    else:
        from liveavatar.models.wan.causal_s2v_pipeline import WanS2V
    if args.ulysses_size > 1:
        init_distributed_group()
    assert importlib.util.find_spec("dashscope") is None, "others must not believe that it is installed"
    if args.use_prompt_extend:
        DashScopePromptExpander(None)
    seed = [args.base_seed]
    dist.broadcast_object_list(seed, src=0)
    wan = WanS2V(
        config=WAN_CONFIGS[args.task],
        checkpoint_dir=args.ckpt_dir,
        device_id=local_rank,
        rank=rank,
        t5_fsdp=False,
        dit_fsdp=False,
        use_sp=args.ulysses_size > 1,
        sp_size=args.ulysses_size,
        t5_cpu=False,
        convert_model_dtype=args.convert_model_dtype,
        single_gpu=True,
        offload_kv_cache=args.offload_kv_cache,
    )
    if args.load_lora and args.lora_path_dmd is not None:
        wan.noise_model = wan.add_lora_to_model(
            wan.noise_model,
            lora_rank=training["lora_rank"],
            lora_alpha=training["lora_alpha"],
            lora_target_modules=training["lora_target_modules"],
            init_lora_weights=training["init_lora_weights"],
            pretrained_lora_path=args.lora_path_dmd,
            load_lora_weight_only=False,
        )
    if args.fp8:
        from liveavatar.utils.fp8_linear import replace_linear_with_scaled_fp8

        replace_linear_with_scaled_fp8(
            wan.noise_model,
            ignore_keys=[
                *("text_embedding", "time_embedding", "time_projection", "head.head"),
                "casual_audio_encoder.encoder.final_linear",
            ],
        )
    video, _ = wan.generate(
        input_prompt=args.prompt,
        ref_image_path=args.image,
        audio_path=args.audio,
        enable_tts=False,
        tts_prompt_audio=None,
        tts_prompt_text=None,
        tts_text=None,
        num_repeat=args.num_clip,
        pose_video=None,
        generate_size=args.size,
        max_area=MAX_AREA_CONFIGS[args.size],
        infer_frames=args.infer_frames,
        shift=args.sample_shift,
        sample_solver=args.sample_solver,
        sampling_steps=args.sample_steps,
        guide_scale=args.sample_guide_scale,
        seed=seed[0],
        offload_model=True if args.offload_model is None else args.offload_model,
        init_first_frame=False,
        use_dataset=False,
        dataset_sample_idx=0,
        drop_motion_noisy=False,
        num_gpus_dit=args.num_gpus_dit,
        enable_vae_parallel=False,
        input_video_for_sam2=None,
        enable_online_decode=args.enable_online_decode,
    )
    if "+" in args.audio:
        merge_multiple_audio_files(args.audio.split("+"), "merged.wav")
    save_video(video[None], args.save_file, WAN_CONFIGS[args.task].sample_fps, (-1, 1))
    merge_video_audio(video_path=args.save_file, audio_path=args.audio)
    torch.cuda.synchronize()
    dist.destroy_process_group()


if __name__ == "__main__":
    arguments = parse()
    generate(arguments, training_config_parser(arguments.training_config))
