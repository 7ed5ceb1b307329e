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
from collections.abc import Iterator
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
    generator = torch.Generator().manual_seed(seed)
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    schedule = (1 - roots**2).cumprod(0).float()
    tensors = {}
    for name, shape, saved in layout(small):
        if saved == "I64":
            tensors[name] = torch.arange(math.prod(shape)).view(shape)  # position_ids
        elif "." not in name:
            tensors[name] = schedule.clone()  # stands for every buffer of the schedule
        elif not shape:
            tensors[name] = torch.ones((), dtype=SAVED_DTYPES[saved])
        else:
            tensor = torch.empty(shape).normal_(generator=generator)
            if len(shape) > 1 and "embedding" not in name:
                tensor /= math.sqrt(math.prod(shape[1:]))
            elif len(shape) == 1:
                tensor = tensor * 0.1 + name.endswith("weight")
            tensors[name] = tensor.to(dtype)
    return tensors


SMALL = {
    "text_dim": 64, "text_heads": 1, "vae_channels": [32, 64, 128, 128], "unet_channels": [32, 64, 128, 128],
}  # fmt: skip


def metadata(small: bool = False) -> dict[str, str]:
    """What tells sd.py that a checkpoint has not Stable Diffusion v1's sizes."""
    return {"sd.py": json.dumps(SMALL)} if small else {}


def configs(small: bool = False) -> dict[str, dict]:
    """The config.json of each part of the diffusers folder, as the released SD v1.5 has them."""
    unet = [32, 64, 128, 128] if small else [320, 640, 1280, 1280]
    vae = [32, 64, 128, 128] if small else [128, 256, 512, 512]
    text = 64 if small else 768
    scheduler = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": None,
        "num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
    }  # fmt: skip
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
        "scheduler": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **scheduler},
    }  # fmt: skip


def write_configs(folder: Path, small: bool = False, changes: dict[str, dict] | None = None) -> None:
    """The diffusers folder without its weights: configs, with the changes to each part's, and tokenizer."""
    sys.path.insert(0, str(HERE.parent))
    import sd

    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0",
        "feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False,
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    for part, config in configs(small).items():
        (folder / part).mkdir(exist_ok=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(config | (changes or {}).get(part, {}), indent=2))
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    merges = (HERE.parent / "tokenizer_vocab" / "merges.txt").read_text(encoding="utf-8")
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    (tokenizer / "vocab.json").write_text(json.dumps(sd.Tokenizer().ids), encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))


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


def write(path: Path, small: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """Writes a random checkpoint as `path`: .safetensors, .ckpt, or a diffusers folder."""
    tensors = random_tensors(small, dtype, seed)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata(small))
    elif path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 470000} | metadata(small), path)
    else:
        path.mkdir(parents=True, exist_ok=True)
        single = path / "single.safetensors"
        save_file(tensors, single)
        del tensors
        reference_pipeline(single, path, small, dtype).save_pretrained(path)
        single.unlink()


def write_vae(path: Path, small: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    """Writes a random VAE as `path`: .safetensors or .ckpt with CompVis's names, or a diffusers folder."""
    prefix = "first_stage_model."
    tensors = random_tensors(small, dtype, seed)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if prefix in name}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        from diffusers import AutoencoderKL

        path.mkdir(parents=True, exist_ok=True)
        single = path / "single.safetensors"
        save_file(tensors, single)
        (path / "config.json").write_text(json.dumps(configs(small)["vae"]))
        vae = AutoencoderKL.from_single_file(str(single), config=str(path), local_files_only=True)
        vae.to(dtype).save_pretrained(path)
        single.unlink()


def random_lora(
    layout: str, small: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, rank: int = 4
) -> dict[str, torch.Tensor]:
    """Random pairs of matrices for each linear layer and convolution of the UNet, as diffusers builds it, and
    each linear layer of transformers' text encoder: in "kohya"'s layout with alphas, or in "peft"'s."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    parts = configs(small)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(parts["unet"])
        text_encoder = CLIPTextModel(CLIPTextConfig(**parts["text_encoder"]))
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for model, peft, kohya in ((unet, "unet.", "lora_unet_"), (text_encoder, "text_encoder.", "lora_te_")):
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                continue
            if model is text_encoder:
                name = "text_model." + name.removeprefix("text_model.")  # transformers 5 is without it
            out, *inner = module.weight.shape  # (out, in) or (out, in, height, width)
            down = torch.randn(rank, *inner, generator=generator) / math.sqrt(math.prod(inner))
            up = torch.randn(out, rank, *[1 for _ in inner[1:]], generator=generator) * 0.1
            if layout == "kohya":
                name = kohya + name.replace(".", "_")
                tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
                tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
            else:
                tensors[f"{peft}{name}.lora_A.weight"], tensors[f"{peft}{name}.lora_B.weight"] = down, up
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "path", type=Path, help="file ending in .safetensors or .ckpt, or a folder for diffusers' layout"
    )
    parser.add_argument("--kind", choices=["checkpoint", "vae", "kohya", "peft"], default="checkpoint")
    parser.add_argument("--small", action="store_true", help="narrow layers, under 100 MB")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kind == "checkpoint":
        write(args.path, args.small, DTYPES[args.dtype], args.seed)
    elif args.kind == "vae":
        write_vae(args.path, args.small, DTYPES[args.dtype], args.seed)
    else:
        save_file(random_lora(args.kind, args.small, DTYPES[args.dtype], args.seed), args.path)
