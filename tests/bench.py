"""sd.py beside diffusers, measured: `python tests/bench.py [--rounds 3] [--only PATTERN] [--json FILE]`; with
`--profile` instead what a denoising step of ours takes its time for.

Both sides take turns, each measurement in a fresh process, on the same random full-size checkpoints, with the
same dtype, sampler and steps. A figure is the median over the rounds; its ratio is sd.py's to diffusers', so
that below 1 is less time or memory, and for training, counted in pictures, above 1 is more. Nothing else
should run meanwhile.
"""

import argparse
import json
import os
import platform
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
OURS, THEIRS = SIDES = ("sd.py", "diffusers")
PROMPT = "a photo of a cat"


# ------------------------------------------------------------------------ what a process of its own measures
# It imports late: what a side does not need, it does not pay for.


def load(side: str, device: str, dtype: str, weights: str):
    """Our model, or diffusers' pipeline from the same file."""
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    if side == OURS:
        import sd

        sd.reuse_memory()  # as the command line does
        return sd.StableDiffusion.load(weights, device, dtype)
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    configs = Path(weights).with_name("configs")
    pipeline = StableDiffusionPipeline.from_single_file(
        weights, config=str(configs), torch_dtype=dtype, safety_checker=None, local_files_only=True
    ).to(device)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(side: str, model, steps: int, size: int, n: int = 1) -> list:
    """`n` pictures of `size` by `size`."""
    if side == OURS:
        settings = {"steps": steps, "sampler": "dpm++", "seed": 0, "n": n, "progress": False}
        return model.generate(PROMPT, width=size, height=size, **settings)
    return model(PROMPT, num_inference_steps=steps, width=size, height=size, num_images_per_prompt=n).images


def seconds(work: Callable, repeats: int = 2) -> float:
    """The median time that `work` takes once it is warm."""
    import torch

    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def start(side: str, device: str, dtype: str, weights: str) -> float:
    """Seconds from the start of the process to the first denoising step."""
    model = load(side, device, dtype, weights)
    elapsed = []
    model.unet.register_forward_pre_hook(lambda *_: elapsed.append(time.time() - float(os.environ["BEGAN"])))
    generate(side, model, steps=1, size=64)
    return elapsed[0]


def step(side: str, device: str, dtype: str, weights: str, compiled: bool = False) -> float:
    """Seconds of one denoising step with guidance, at 512x512."""
    import torch

    model = load(side, device, dtype, weights)
    if compiled:
        model.unet.compile(mode="reduce-overhead")
    latent = torch.randn(2, 4, 64, 64, device=device, dtype=model.unet.conv_in.weight.dtype)
    context = torch.randn(2, 77, 768, device=device, dtype=latent.dtype)
    t = torch.full((2,), 500, device=device)
    with torch.no_grad():
        return seconds(lambda: model.unet(latent, t, context), repeats=20 if device == "cuda" else 2)


def vae(side: str, device: str, dtype: str, weights: str, way: str) -> float:
    """Seconds to decode, or encode, one picture of 512x512."""
    import torch

    model = load(side, device, dtype, weights)  # kept: freed weights would be memory to work in
    shape = (1, 4, 64, 64) if way == "decode" else (1, 3, 512, 512)
    x = torch.randn(shape, device=device, dtype=next(model.vae.parameters()).dtype)
    with torch.no_grad():
        return seconds(lambda: getattr(model.vae, way)(x))


def growth(side: str, device: str, dtype: str, weights: str, size: int, n: int) -> float:
    """Seconds of one step with guidance and the decoding, once the model is loaded."""
    model = load(side, device, dtype, weights)
    began = time.perf_counter()
    generate(side, model, steps=1, size=size, n=n)
    return time.perf_counter() - began


def run_sd(*words: str) -> None:
    """`python sd.py ...` in this process, so that its peak on a GPU can be asked for."""
    sys.argv[1:] = ["--prompt", PROMPT, "--seed", "0", *words]
    try:
        runpy.run_path(str(ROOT / "sd.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def command(side: str, device: str, dtype: str, weights: str, out: str) -> None:
    """20 steps to a file: the command line, and what a user of diffusers would write."""
    if side == OURS:
        settings = ["--weights", weights, "--dtype", dtype, "--sampler", "dpm++", "--steps", "20"]
        return run_sd("--device", device, "--out", out, *settings)
    generate(side, load(side, device, dtype, weights), steps=20, size=512)[0].save(out)


def profile(device: str, dtype: str, weights: str) -> None:
    """Prints what three denoising steps, and loading the model, take their time for."""
    import torch

    with torch.profiler.profile() as profiler:
        step(OURS, device, dtype, weights)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))


def emoji_parts() -> tuple:
    """The default model's Config, and a UNet, a VAE and a text encoder of the libraries in its sizes."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    import sd

    config = sd.Config.from_json((ROOT / "weights" / "emoji.json").read_text())
    attends, levels = config.unet_attends, len(config.vae_widths)
    unet = UNet2DConditionModel(
        sample_size=config.image_size // config.downscale, in_channels=config.latent_channels,
        out_channels=config.latent_channels, block_out_channels=config.unet_widths,
        layers_per_block=config.unet_blocks, attention_head_dim=config.unet_heads,
        cross_attention_dim=config.text_width, norm_num_groups=config.norm_groups,
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in attends[::-1]],
    )  # fmt: skip
    autoencoder = AutoencoderKL(
        latent_channels=config.latent_channels, block_out_channels=config.vae_widths,
        layers_per_block=config.vae_blocks, norm_num_groups=config.norm_groups,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
    )  # fmt: skip
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.text_width, intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers, num_attention_heads=config.text_heads,
        max_position_embeddings=config.text_length, projection_dim=config.text_width,
        bos_token_id=config.vocab_size - 2, eos_token_id=config.vocab_size - 1,
    ))  # fmt: skip
    return config, unet, autoencoder, text_encoder


def write_emoji_folder(folder: str) -> None:
    """A diffusers folder of the default model's sizes."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from make_checkpoint import write_configs
    from transformers import CLIPTokenizer

    import sd

    config, unet, autoencoder, text_encoder = emoji_parts()
    write_configs(Path(folder))
    tokenizer = Path(folder, "tokenizer")
    ids = sd.Tokenizer(config.vocab_size, config.text_length).ids
    Path(tokenizer, "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    merges = Path(tokenizer, "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    Path(tokenizer, "merges.txt").write_text("".join(merges[: 1 + len(ids) - 514]), encoding="utf-8")
    StableDiffusionPipeline(
        vae=autoencoder, text_encoder=text_encoder, unet=unet, safety_checker=None, feature_extractor=None,
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer, model_max_length=config.text_length),
        scheduler=DDPMScheduler(
            beta_start=config.beta_start, beta_end=config.beta_end, beta_schedule="scaled_linear",
            clip_sample=False,
        ),
    ).save_pretrained(folder)  # fmt: skip


def emoji(side: str, device: str, folder: str, out: str) -> None:
    """50 steps of ddpm with the default model's sizes: the command line, and what a user would write."""
    if side == OURS:
        return run_sd("--device", device, "--out", out)
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPT, num_inference_steps=50).images[0].save(out)


def training(side: str, device: str) -> float:
    """Pictures a second in the default model's UNet stage, at the batch size that made it."""
    import torch
    import torch.nn.functional as F

    import sd

    torch.manual_seed(0)
    config = sd.Config.from_json((ROOT / "weights" / "emoji.json").read_text())
    if side == OURS:
        sd.reuse_memory()  # as the command line does
        unet = sd.new_model(config, 0).unet.to(device)
    else:
        unet = emoji_parts()[1].to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    count, side_length = 64, config.image_size // config.downscale
    latent, noise = torch.randn(2, count, config.latent_channels, side_length, side_length, device=device)
    context = torch.randn(count, config.text_length, config.text_width, device=device)
    t = torch.randint(config.timesteps, (count,), device=device)

    def update():
        with torch.autocast(device, torch.bfloat16):
            noise_pred = unet(latent, t, context)
        noise_pred = noise_pred if side == OURS else noise_pred.sample
        F.mse_loss(noise_pred.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return count / seconds(update, repeats=10)


# -------------------------------------------------------------------------------- what both sides work with


def prepare(folder: str) -> None:
    """Random checkpoints, diffusers' configurations for them, and its folder of the default model's sizes."""
    import torch
    from make_checkpoint import random_tensors, write_configs
    from safetensors.torch import save_file

    tensors = random_tensors()
    save_file(tensors, f"{folder}/fp32.safetensors")
    torch.save({"state_dict": tensors}, f"{folder}/fp32.ckpt")
    halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(halves, f"{folder}/fp16.safetensors")
    write_configs(Path(folder, "configs"))
    write_emoji_folder(f"{folder}/emoji")


def cases(device: str, folder: str) -> list[tuple[str, str, Callable, dict]]:
    """(what it is called, what its ratio should be, the measurement, its arguments)"""
    fp32, fp16, ckpt = (f"{folder}/{name}" for name in ("fp32.safetensors", "fp16.safetensors", "fp32.ckpt"))
    low = "bf16" if device == "cpu" else "fp16"
    if device == "cpu":
        models = [({"dtype": "fp32", "weights": fp32}, "<= 0.95", "<= 0.90"),
                  ({"dtype": "bf16", "weights": fp16}, "<= 0.85", "<= 0.85")]  # fmt: skip
    else:
        models = [({"dtype": dtype, "weights": fp16}, "<= 0.80", "") for dtype in ("fp16", "bf16")]
    found = [
        ("start, fp32 .safetensors, s", "<= 0.6", start, {"dtype": "fp32", "weights": fp32}),
        (f"start, fp16 .safetensors as {low}, s", "<= 0.6", start, {"dtype": low, "weights": fp16}),
        ("start, fp32 .ckpt, s", "<= 0.6", start, {"dtype": "fp32", "weights": ckpt}),
    ]
    for model, wanted, _ in models:
        found.append((f"step, {model['dtype']}, s", wanted, step, model))
        if device != "cpu":
            compiled = model | {"compiled": True}
            found.append((f"step, {model['dtype']}, compiled, s", "<= 0.90", step, compiled))
    for model, _, wanted in models:
        found.append((f"decode, {model['dtype']}, s", wanted, vae, model | {"way": "decode"}))
        found.append((f"encode, {model['dtype']}, s", "", vae, model | {"way": "encode"}))
    out = {"out": f"{folder}/out.png"}
    for model, _, _ in models:
        found.append((f"20 steps to a PNG, {model['dtype']}, s", "<= 0.90", command, model | out))
    found.append(("default model to a PNG, s", "", emoji, {"folder": f"{folder}/emoji"} | out))
    found.append(("training, pictures per s", ">= 1.2", training, {}))
    for size, n in [(256, 1), (512, 1), (768, 1), (1024, 1), (256, 2), (256, 4), (256, 8)]:
        sizes = {"dtype": low, "weights": fp16, "size": size, "n": n}
        found.append((f"step and decode, {low}, {size}x{size}, n {n}, s", "", growth, sizes))
    return found


# ----------------------------------------------------------------------------------- both sides, in turn
# This process imports nothing large: the peak of memory that Linux tells of a child begins at its parent's.


def run(words: list) -> tuple[str, float, float]:
    """What a Python process prints, the seconds it takes, and its peak of resident memory in GB."""
    began = time.time()
    environment = os.environ | {"BEGAN": str(began), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        took = time.time() - began
        if status:
            errors.seek(0)
            raise SystemExit(f"{words} ended with {status}:\n{errors.read()}")
    return output, took, usage.ru_maxrss / 2**20


def measure(side: str, device: str, work: Callable, arguments: dict) -> dict[str, float]:
    """One measurement in a process of its own: seconds, or what `work` returns, and peaks of memory in GB."""
    output, value, peak = run([__file__, "--work", json.dumps([work.__name__, [side, device], arguments])])
    result = json.loads(output.splitlines()[-1])
    return {"value": value if result["value"] is None else result["value"], "peak": peak} | result["gpu"]


def row(title: str, wanted: str, ours: float, theirs: float) -> None:
    print(f"| {title} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | {wanted} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of both sides (3)")
    parser.add_argument("--only", default="", help="a pattern, to measure only what has it in its name")
    parser.add_argument("--json", type=Path, help="a file for every single figure, the medians and ratios")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--profile", action="store_true", help="of our denoising step in fp32, and no more")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        name, places, arguments = json.loads(args.work)
        result = {"value": globals()[name](*places, **arguments), "gpu": {}}
        if "cuda" in places:
            import torch

            result["gpu"] = {"peak on the GPU": torch.cuda.max_memory_allocated() / 2**30}
        print(json.dumps(result))
        return

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    threads, _, _ = run(["-c", "import torch; print(torch.get_num_threads())"])
    machine = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    if args.device == "cuda":
        machine, _, _ = run(["-c", "import torch; print(torch.cuda.get_device_name())"])
    about = f"{machine.strip()}, {threads.strip()} threads, Python {platform.python_version()}, {libraries}"
    print(f"{about}; medians of {args.rounds} rounds\n")
    print("| | sd.py | diffusers | ratio | wanted |\n|---|---|---|---|---|", flush=True)
    figures = {"machine": about, "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as folder:
        run([__file__, "--work", json.dumps(["prepare", [folder], {}])])
        if args.profile:
            places = [args.device, "fp32", f"{folder}/fp32.safetensors"]
            print(run([__file__, "--work", json.dumps(["profile", places, {}])])[0])
            return
        for title, wanted, work, arguments in cases(args.device, folder):
            if not re.search(args.only, title):
                continue
            results = {side: [] for side in SIDES}
            for _ in range(args.rounds):
                for side in SIDES:
                    results[side].append(measure(side, args.device, work, arguments))
            median = {
                kind: [statistics.median(one[kind] for one in results[side]) for side in SIDES]
                for kind in results[THEIRS][0] if kind in results[OURS][0]
            }  # fmt: skip
            ratio = {kind: ours / theirs for kind, (ours, theirs) in median.items()}
            figures[title] = results | {"medians": dict(median), "ratios": ratio}
            row(title, wanted, *median.pop("value"))
            for kind, values in median.items() if work in (command, emoji, growth) else ():
                target = "<= 0.6" if work is command and arguments["dtype"] == "bf16" else ""
                row(f"{title.removesuffix(', s')}: {kind}, GB", target, *values)
            if work is emoji:
                plain = statistics.median(run(["-c", "import torch"])[1] for _ in range(args.rounds))
                ours, _ = (statistics.median(one["value"] for one in results[side]) for side in SIDES)
                title = f"the same, beyond the {plain:.2f} s of `import torch`, s"
                print(f"| {title} | {ours - plain:.2f} | | | <= 1.5 s |")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
