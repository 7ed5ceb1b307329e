"""Random checkpoints in the layout of v1-5-pruned-emaonly, full-size (4.27 GB in fp32) or small.

    python tests/make_checkpoint.py random.safetensors                  # by the ending: .safetensors, .ckpt,
    python tests/make_checkpoint.py --small --dtype fp16 folder/        # or else a diffusers folder
    python tests/make_checkpoint.py --kind vae vae.ckpt                 # a VAE alone
    python tests/make_checkpoint.py --kind kohya style.safetensors      # a LoRA in kohya's layout, or peft

sd15_keys.json holds the real file's list of tensors. The folder is written by diffusers itself.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVED_DTYPES = {"F32": torch.float32, "I64": torch.int64, "I32": torch.int32}


def layout(small: bool = False) -> Iterator[tuple[str, list[int], str]]:
    """(name, shape, dtype) of each tensor of the real file; a small one has all of them, only narrower."""
    for name, (shape, dtype) in json.loads((HERE / "sd15_keys.json").read_text()).items():
        if small and name.startswith("model.diffusion_model."):
            shape = [64 if size == 768 else size // 10 if size >= 320 else size for size in shape]
        elif small and name.startswith("first_stage_model."):
            shape = [size // 4 if size >= 128 else size for size in shape]
        elif small and name.startswith("cond_stage_model."):
            shape = [size // 12 if size in (768, 3072) else size for size in shape]
        yield name, shape, dtype


def random_tensors(
    small: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A tensor for each name: no bias at zero, no norm at identity, and signals that keep their size."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape, saved in layout(small):
        if saved == "I64":
            tensors[name] = torch.arange(math.prod(shape)).view(shape)  # position_ids
        elif "." not in name or not shape:  # the noise schedule, and counts; sd.py needs neither
            tensors[name] = torch.ones(shape, dtype=SAVED_DTYPES[saved])
        else:
            tensor = torch.empty(shape).normal_(generator=generator)
            if len(shape) > 1 and "embedding" not in name:
                tensor /= math.sqrt(math.prod(shape[1:]))
            elif len(shape) == 1:
                tensor = tensor * 0.1 + name.endswith("weight")
            tensors[name] = tensor.to(dtype)
    return tensors


SMALL = {  # what tells sd.py that a checkpoint has not Stable Diffusion v1's sizes
    "text_dim": 64, "text_heads": 1, "vae_channels": [32, 64, 128, 128], "unet_channels": [32, 64, 128, 128],
}  # fmt: skip


def configs(small: bool = False) -> dict[str, dict]:
    """The config.json of each part of the diffusers folder, as the released SD v1.5 has them."""
    unet = SMALL["unet_channels"] if small else [320, 640, 1280, 1280]
    vae = SMALL["vae_channels"] if small else [128, 256, 512, 512]
    text = SMALL["text_dim"] if small else 768
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 64,
            "block_out_channels": unet, "layers_per_block": 2, "attention_head_dim": 8,
            "cross_attention_dim": text,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        },
        "vae": {
            "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
            "sample_size": 512, "block_out_channels": vae, "layers_per_block": 2, "norm_num_groups": 32,
            "scaling_factor": 0.18215,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": text,
            "intermediate_size": 4 * text, "num_hidden_layers": 12, "num_attention_heads": text // 64,
            "hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77,
            "projection_dim": text,
            "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1, "layer_norm_eps": 1e-5,
        },
        "scheduler": {
            "_class_name": "PNDMScheduler", "skip_prk_steps": True, "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "trained_betas": None, "num_train_timesteps": 1000,
            "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
        },
    }  # fmt: skip


def write_configs(folder: Path, small: bool = False, changes: dict[str, dict] | None = None) -> None:
    """The diffusers folder without its weights: configs, with the changes to each part's, and tokenizer."""
    sys.path.insert(0, str(HERE.parent))
    import sd

    files = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0",
            "feature_extractor": [None, None], "safety_checker": [None, None],
            "requires_safety_checker": False, "scheduler": ["diffusers", "PNDMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        },
        "tokenizer/vocab.json": sd.Tokenizer().ids,
        "tokenizer/tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>",
        },
    }  # fmt: skip
    for part, config in configs(small).items():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        files[f"{part}/{name}"] = config | (changes or {}).get(part, {})
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    merges = (HERE.parent / "tokenizer_vocab" / "merges.txt").read_text(encoding="utf-8")
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


def reference_pipeline(
    checkpoint: Path, folder: Path, small: bool = False, dtype: torch.dtype = torch.float32,
    changes: dict[str, dict] | None = None,
):  # fmt: skip
    """diffusers' own pipeline from a single file; `folder` is where it finds the configs."""
    from diffusers import StableDiffusionPipeline

    write_configs(folder, small, changes)
    pipeline = StableDiffusionPipeline.from_single_file(
        str(checkpoint), config=str(folder), local_files_only=True, torch_dtype=dtype, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write(
    path: Path, small: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, vae: bool = False
) -> None:
    """Writes a random checkpoint, or its VAE alone, as .safetensors, .ckpt, or else a diffusers folder."""
    if path.suffix not in (".safetensors", ".ckpt"):
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, "whole.safetensors")
            write(whole, small, dtype, seed)
            pipeline = reference_pipeline(whole, Path(folder), small, dtype)
            return (pipeline.vae if vae else pipeline).save_pretrained(path)
    tensors, prefix = random_tensors(small, dtype, seed), "first_stage_model."
    if vae:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if prefix in name}
    about = {"sd.py": json.dumps(SMALL)} if small and not vae else {}
    if path.suffix == ".safetensors":
        save_file(tensors, path, about)
    else:
        torch.save({"state_dict": tensors, "global_step": 470000} | about, path)


write_vae = partial(write, vae=True)


def empty_models(small: bool = False) -> dict[str, torch.nn.Module]:
    """diffusers' UNet and VAE and transformers' text encoder, without their numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    parts = configs(small)
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(parts["unet"]),
            "vae": AutoencoderKL.from_config(parts["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**parts["text_encoder"])),
        }


def random_lora(
    layout: str, small: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, rank: int = 4
) -> dict[str, torch.Tensor]:
    """Random pairs of matrices for each linear layer and convolution of the UNet and the text encoder: in
    "kohya"'s layout with alphas, or in "peft"'s."""
    models, generator, tensors = empty_models(small), torch.Generator().manual_seed(seed), {}
    for part, kohya in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        for name, module in models[part].named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                continue
            if part == "text_encoder":
                name = "text_model." + name.removeprefix("text_model.")  # transformers 5 is without it
            out, *inner = module.weight.shape  # (out, in) or (out, in, height, width)
            down = torch.randn(rank, *inner, generator=generator) / math.sqrt(math.prod(inner))
            up = torch.randn(out, rank, *[1 for _ in inner[1:]], generator=generator) * 0.1
            if layout == "kohya":
                name, ends = kohya + name.replace(".", "_"), ("lora_down", "lora_up")
                tensors[f"{name}.alpha"] = torch.tensor(rank / 2, dtype=torch.float16)  # as kohya's scripts
            else:
                name, ends = f"{part}.{name}", ("lora_A", "lora_B")
            tensors |= {f"{name}.{end}.weight": x.to(dtype) for end, x in zip(ends, (down, up))}
    return tensors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a .safetensors, a .ckpt, or a folder for diffusers' layout")
    parser.add_argument("--kind", choices=["checkpoint", "vae", "kohya", "peft"], default="checkpoint")
    parser.add_argument("--small", action="store_true", help="narrow layers, under 100 MB")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options = args.small, DTYPES[args.dtype], args.seed
    if args.kind in ("checkpoint", "vae"):
        write(args.path, *options, vae=args.kind == "vae")
    else:
        save_file(random_lora(args.kind, *options), args.path)
