"""Measures sd.py beside diffusers: `python tests/bench.py [--rounds 3] [--only PATTERN] [--json FILE]`; with
`--profile` instead what takes the time of our denoising step.

Both take turns, each measurement in a new process, on the same random full-size checkpoints, with the same
dtype, sampler and steps. A figure is the median over the rounds; its ratio is sd.py's to diffusers', so that
below 1 is less time or memory and, for training in images per second, above 1 is faster. On a CPU, openvino
(`.venv/bin/pip install openvino`) takes its turns at steps, decoding and the command if it is installed, with
diffusers' models converted to its format. Nothing else should run meanwhile.
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
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
OURS, THEIRS = SIDES = ("sd.py", "diffusers")
OPENVINO = "OpenVINO"
PROMPT, RECIPE = "a photo of a cat", ROOT / "weights" / "emoji.json"


# ----------------------------------------------------------------------------------------------- measurements
# Imports stand where they are needed, so that a side pays for its own only.


def load(side: str, device: str, dtype: str, weights: str):
    """Our model, or diffusers' pipeline from the same file, or what `write_openvino` made of that."""
    import torch

    if side == OPENVINO:
        return load_openvino(Path(weights).with_name("openvino"), dtype)
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    if side == OURS:
        import sd

        sd.reuse_memory()  # as the command line does
        return sd.load(weights, device, torch_dtype)
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    settings = {"config": str(Path(weights).with_name("configs")), "local_files_only": True}
    pipeline = StableDiffusionPipeline.from_single_file(
        weights, torch_dtype=torch_dtype, safety_checker=None, **settings
    ).to(device)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_openvino(folder: Path, dtype: str) -> SimpleNamespace:
    """diffusers' models in OpenVINO's format, as functions of tensors in float32; tokenizer and scheduler."""
    import openvino
    import torch
    from diffusers import DPMSolverMultistepScheduler
    from transformers import CLIPTokenizer

    settings = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype]}

    def part(name: str) -> Callable:
        compiled = openvino.Core().compile_model(folder / f"{name}.xml", "CPU", settings)
        return lambda *inputs: torch.from_numpy(compiled([x.numpy() for x in inputs])[0])

    configs = folder.with_name("configs")
    return SimpleNamespace(
        text_encoder=part("text_encoder"), unet=part("unet"), vae=SimpleNamespace(decode=part("vae")),
        tokenizer=CLIPTokenizer.from_pretrained(configs / "tokenizer"),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(configs / "scheduler"),
    )  # fmt: skip


def generate_openvino(model: SimpleNamespace, steps: int, size: int) -> list:
    """What diffusers' pipeline does, with OpenVINO's models."""
    import torch
    from diffusers.image_processor import VaeImageProcessor

    ids = model.tokenizer(["", PROMPT], padding="max_length", return_tensors="pt").input_ids
    context, latents = model.text_encoder(ids), torch.randn(1, 4, size // 8, size // 8)
    model.scheduler.set_timesteps(steps)
    for t in model.scheduler.timesteps:
        uncond, cond = model.unet(latents.repeat(2, 1, 1, 1), t.repeat(2), context).chunk(2)
        latents = model.scheduler.step(uncond + 7.5 * (cond - uncond), t, latents).prev_sample
    return VaeImageProcessor().postprocess(model.vae.decode(latents / 0.18215))


def generate(side: str, model, steps: int, size: int, n: int = 1) -> list:
    """`n` images of `size` by `size` pixels."""
    if side == OPENVINO:
        return generate_openvino(model, steps, size)
    if side == OURS:
        settings = {"steps": steps, "sampler": "dpm++", "seed": 0, "n": n, "progress": False}
        return model.generate(PROMPT, width=size, height=size, **settings)
    return model(PROMPT, num_inference_steps=steps, width=size, height=size, num_images_per_prompt=n).images


def seconds(work: Callable, repeats: int = 2) -> float:
    """The median time of `work` after a first call."""
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
    input_dtype = torch.float32 if side == OPENVINO else model.unet.conv_in.weight.dtype
    like = {"device": device, "dtype": input_dtype}
    latents, context = torch.randn(2, 4, 64, 64, **like), torch.randn(2, 77, 768, **like)
    t = torch.full((2,), 500, device=device)
    with torch.no_grad():
        return seconds(lambda: model.unet(latents, t, context), repeats=20 if device == "cuda" else 2)


def vae(side: str, device: str, dtype: str, weights: str, method: str) -> float:
    """Seconds to decode, or encode, one image of 512x512."""
    import torch

    model = load(side, device, dtype, weights)  # kept, since freed weights would be memory to work in
    shape = (1, 4, 64, 64) if method == "decode" else (1, 3, 512, 512)
    input_dtype = torch.float32 if side == OPENVINO else next(model.vae.parameters()).dtype
    x = torch.randn(shape, device=device, dtype=input_dtype)
    x = x.to(memory_format=torch.channels_last) if side == OURS and method == "decode" else x  # as sd.py does
    with torch.no_grad():
        return seconds(lambda: getattr(model.vae, method)(x))


def growth(side: str, device: str, dtype: str, weights: str, size: int, n: int) -> float:
    """Seconds of one step with guidance and of decoding, with the model loaded."""
    model = load(side, device, dtype, weights)
    began = time.perf_counter()
    generate(side, model, steps=1, size=size, n=n)
    return time.perf_counter() - began


def run_sd(*words: str) -> None:
    """`python sd.py ...` in this process, which can then ask for the peak of the GPU's memory."""
    sys.argv[1:] = ["--prompt", PROMPT, "--seed", "0", *words]
    try:
        runpy.run_path(str(ROOT / "sd.py"), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def command(side: str, device: str, dtype: str, weights: str, out: str) -> None:
    """20 steps to a PNG: our command line, and what a user of diffusers would write."""
    if side == OURS:
        words = ["--weights", weights, "--dtype", dtype, "--sampler", "dpm++", "--steps", "20"]
        return run_sd("--device", device, "--out", out, *words)
    generate(side, load(side, device, dtype, weights), steps=20, size=512)[0].save(out)


def emoji(side: str, device: str, folder: str, out: str) -> None:
    """50 steps of ddpm with the default model to a PNG: likewise."""
    if side == OURS:
        return run_sd("--device", device, "--out", out)
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(PROMPT, num_inference_steps=50).images[0].save(out)


def training(side: str, device: str, folder: str) -> float:
    """Images per second of training the default model's UNet, at the batch size that it was trained with."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    if side == OURS:
        import sd
        from weights import train

        sd.reuse_memory()  # as the command line does
        unet = train.new_model(sd.Config(**json.loads(RECIPE.read_text(encoding="utf-8"))), 0).unet
    else:
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(f"{folder}/unet"))
    unet.to(device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    latents, noise = torch.randn(2, 64, 8, 16, 16, device=device)
    t, context = torch.randint(1000, (64,), device=device), torch.randn(64, 32, 128, device=device)

    def update():
        with torch.autocast(device, torch.bfloat16):
            noise_pred = unet(latents, t, context)
        noise_pred = noise_pred if side == OURS else noise_pred.sample
        F.mse_loss(noise_pred.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return len(latents) / seconds(update, repeats=10)


def busy(side: str, device: str, name: str, **arguments):
    """A measurement beside a process that keeps a core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            return globals()[name](side, device, **arguments)
        finally:
            other.kill()


def profile(device: str, dtype: str, weights: str) -> None:
    """Prints what takes the time of loading the model and of three denoising steps."""
    import torch

    with torch.profiler.profile() as profiler:
        step(OURS, device, dtype, weights)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10))


# -------------------------------------------------------------------------------------- checkpoints and cases


def prepare(folder: str) -> None:
    """Writes random checkpoints, diffusers' configs for them, and the default model for diffusers."""
    import torch
    from make_checkpoint import random_tensors, write_configs
    from safetensors.torch import save_file

    tensors = random_tensors()
    save_file(tensors, f"{folder}/fp32.safetensors")
    torch.save({"state_dict": tensors}, f"{folder}/fp32.ckpt")
    halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(halves, f"{folder}/fp16.safetensors")
    write_configs(Path(folder, "configs"))
    write_emoji_folder(Path(folder, "emoji"))
    if find_spec("openvino"):
        write_openvino(Path(folder, "openvino"), f"{folder}/fp32.safetensors")


def write_openvino(folder: Path, weights: str) -> None:
    """diffusers' models of these weights in OpenVINO's format."""
    import openvino
    import torch

    pipeline = load(THEIRS, "cpu", "fp32", weights)
    vae, t = pipeline.vae, torch.full((2,), 500)
    vae.forward = lambda latents: vae.decode(latents, return_dict=False)[0]
    examples = {
        "text_encoder": (pipeline.text_encoder, torch.zeros(2, 77, dtype=torch.long)),
        "unet": (pipeline.unet, (torch.randn(2, 4, 64, 64), t, torch.randn(2, 77, 768))),
        "vae": (vae, torch.randn(1, 4, 64, 64)),
    }
    for name, (model, inputs) in examples.items():
        with torch.no_grad():
            converted = openvino.convert_model(model, example_input=inputs)
        openvino.save_model(converted, folder / f"{name}.xml", compress_to_fp16=False)


def write_emoji_folder(folder: Path) -> None:
    """The default model as a diffusers folder."""
    from diffusers import DDPMScheduler
    from make_checkpoint import reference_pipeline
    from transformers import CLIPTokenizer

    import sd

    config = sd.load(sd.DEFAULT_WEIGHTS).config
    kinds, levels = ["CrossAttn" * attention for attention in config.unet_attention], len(config.vae_channels)
    changes = {
        "unet": {
            "sample_size": config.image_size // config.downscale, "in_channels": config.latent_channels,
            "out_channels": config.latent_channels, "block_out_channels": config.unet_channels,
            "layers_per_block": config.unet_blocks, "attention_head_dim": config.unet_heads,
            "cross_attention_dim": config.text_dim, "norm_num_groups": config.norm_groups,
            "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
            "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        },
        "vae": {
            "latent_channels": config.latent_channels, "block_out_channels": config.vae_channels,
            "layers_per_block": config.vae_blocks, "norm_num_groups": config.norm_groups,
            "down_block_types": ["DownEncoderBlock2D"] * levels, "scaling_factor": config.latent_scale,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
        "text_encoder": {
            "vocab_size": config.vocab_size, "max_position_embeddings": config.text_length,
            "hidden_size": config.text_dim, "intermediate_size": 4 * config.text_dim,
            "num_hidden_layers": config.text_layers, "num_attention_heads": config.text_heads,
            "projection_dim": config.text_dim,
            "bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1,
        },
    }  # fmt: skip
    pipeline = reference_pipeline(sd.DEFAULT_WEIGHTS, folder, changes=changes)
    vocab, merges = folder / "tokenizer" / "vocab.json", folder / "tokenizer" / "merges.txt"
    ids = sd.Tokenizer(config.vocab_size, config.text_length).ids
    vocab.write_text(json.dumps(ids), encoding="utf-8")
    lines = merges.read_text(encoding="utf-8").splitlines(keepends=True)
    merges.write_text("".join(lines[: 1 + len(ids) - 514]), encoding="utf-8")  # 512 symbols, start and end
    pipeline.tokenizer = CLIPTokenizer.from_pretrained(vocab.parent, model_max_length=config.text_length)
    betas = {"beta_start": config.beta_start, "beta_end": config.beta_end, "beta_schedule": "scaled_linear"}
    pipeline.scheduler = DDPMScheduler(**betas, clip_sample=False)
    pipeline.save_pretrained(folder)


def cases(device: str, folder: str) -> list[tuple[str, str, Callable, dict]]:
    """(title, wanted ratio, measurement, its arguments) of each row."""
    fp32, fp16, ckpt = (f"{folder}/{name}" for name in ("fp32.safetensors", "fp16.safetensors", "fp32.ckpt"))
    low, emoji_folder = "bf16" if device == "cpu" else "fp16", {"folder": f"{folder}/emoji"}
    found = [
        ("start, fp32 .safetensors, s", "<= 0.6", start, {"dtype": "fp32", "weights": fp32}),
        (f"start, fp16 .safetensors as {low}, s", "<= 0.6", start, {"dtype": low, "weights": fp16}),
        ("start, fp32 .ckpt, s", "<= 0.6", start, {"dtype": "fp32", "weights": ckpt}),
    ]
    models = [("fp16", fp16, ("<= 0.80", "", "<= 0.90")), ("bf16", fp16, ("<= 0.80", "", "<= 0.90"))]
    if device == "cpu":
        models = [
            ("fp32", fp32, ("<= 0.80", "<= 0.70", "<= 0.80")),
            ("bf16", fp16, ("<= 0.62", "<= 0.62", "<= 0.65")),
        ]
    for dtype, weights, (wanted, wanted_vae, wanted_command) in models:
        model = {"dtype": dtype, "weights": weights}
        found.append((f"step, {dtype}, s", wanted, step, model))
        found.append((f"step, {dtype}, beside a busy process, s", "", busy, model | {"name": "step"}))
        if device != "cpu":
            found.append((f"step, {dtype}, compiled, s", "<= 0.90", step, model | {"compiled": True}))
        found.append((f"decode, {dtype}, s", wanted_vae, vae, model | {"method": "decode"}))
        found.append((f"encode, {dtype}, s", "", vae, model | {"method": "encode"}))
        out = {"out": f"{folder}/out.png"}
        found.append((f"20 steps to a PNG, {dtype}, s", wanted_command, command, model | out))
    found.append(("default model to a PNG, s", "", emoji, emoji_folder | out))
    beside = emoji_folder | out | {"name": "emoji"}
    found.append(("default model to a PNG, beside a busy process, s", "", busy, beside))
    found.append(("training, images per s", ">= 1.2", training, emoji_folder))
    for dtype, weights, _ in models:
        for size, n in [(256, 1), (512, 1), (768, 1), (1024, 1), (256, 2), (256, 4), (256, 8)]:
            sizes = {"dtype": dtype, "weights": weights, "size": size, "n": n}
            found.append((f"step and decode, {dtype}, {size}x{size}, n {n}, s", "", growth, sizes))
    return found


# ----------------------------------------------------------------------------------------- both sides in turn
# This process imports nothing large: Linux has the peak of a child's memory begin at its parent's.


def run(words: list) -> tuple[str, float, float]:
    """What a Python process prints, its seconds, and its peak of resident memory in GB."""
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


def call(function: Callable, **arguments) -> tuple[str, float, float]:
    """Calls a function of this file in a new process."""
    return run([__file__, "--call", json.dumps([function.__name__, arguments])])


def measure(function: Callable, **arguments) -> dict[str, float]:
    """One measurement: its seconds, or what the function returns, and peaks of memory in GB."""
    output, seconds, peak = call(function, **arguments)
    result = json.loads(output.splitlines()[-1])
    return {"value": seconds, "peak": peak} | {key: x for key, x in result.items() if x is not None}


def row(title: str, wanted: str, ours: float, *others: float) -> None:
    """A row of the table: ours, and each other figure with the ratio of ours to it."""
    cells = [cell for other in others for cell in (f"{other:.2f}", f"{ours / other:.2f}")]
    print(f"| {title} | {wanted} | {' | '.join([f'{ours:.2f}', *cells])} |", flush=True)


def compare(rounds: int, device: str, title: str, wanted: str, function: Callable, arguments: dict) -> dict:
    """Measures the sides, prints their rows, and returns all figures."""
    sides = [*SIDES]
    if device == "cpu" and find_spec("openvino"):
        sides += [OPENVINO] * (function in (step, command) or arguments.get("method") == "decode")
    results: dict[str, list] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            results[side].append(measure(function, side=side, device=device, **arguments))
    medians = {
        kind: [statistics.median(one[kind] for one in results[side]) for side in sides]
        for kind in results[OURS][0]
    }
    row(title, wanted, *medians["value"])
    for kind in list(medians)[1:] if function in (command, emoji, growth) else ():
        target = {"fp32": "<= 1.0", "bf16": "<= 0.6"}.get(arguments["dtype"]) if function is command else ""
        row(f"{title.removesuffix(', s')}: {kind}, GB", target, *medians[kind])
    if function is emoji:
        plain = statistics.median(run(["-c", "import torch"])[1] for _ in range(rounds))
        title = f"the same, beyond the {plain:.2f} s of `import torch`, s"
        print(f"| {title} | <= 1.5 s | {medians['value'][0] - plain:.2f} |")
    ratios = {kind: [ours / other for other in others] for kind, (ours, *others) in medians.items()}
    return results | {"medians": medians, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of both (3)")
    parser.add_argument("--only", default="", help="a pattern: measure only the titles that have it")
    parser.add_argument("--json", type=Path, help="a file for all figures, medians and ratios")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--profile", action="store_true", help="only profile our denoising step in fp32")
    parser.add_argument("--call", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        name, arguments = args.call
        if arguments.get("side") == OURS:
            os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the command line does
        result = {"value": globals()[name](**arguments)}
        if arguments.get("device") == "cuda":
            import torch

            result["peak on the GPU"] = torch.cuda.max_memory_allocated() / 2**30
        return print(json.dumps(result))

    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    threads, *_ = run(["-c", "import torch; print(torch.get_num_threads())"])
    machine = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    if args.device == "cuda":
        machine, *_ = run(["-c", "import torch; print(torch.cuda.get_device_name())"])
    about = f"{machine.strip()}, {threads.strip()} threads, Python {platform.python_version()}, {libraries}"
    figures: dict[str, Any] = {"machine": about, "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as folder:
        call(prepare, folder=folder)
        if args.profile:
            print(call(profile, device=args.device, dtype="fp32", weights=f"{folder}/fp32.safetensors")[0])
            return
        print(f"{about}; medians of {args.rounds} rounds\n")
        print("| | wanted | sd.py | diffusers | ratio | OpenVINO | ratio |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for title, *case in cases(args.device, folder):
            if re.search(args.only, title):
                figures[title] = compare(args.rounds, args.device, title, *case)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
