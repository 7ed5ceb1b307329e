"""Draws the README's tour from the default model: `python tests/figures.py [--out FILE]`."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure, SubFigure
from PIL import Image, ImageDraw
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sd  # noqa: E402

Cell = tuple[Image.Image | np.ndarray, str]  # an image and its title
PROMPT = "a red apple on a blue background"


def attention_map(module: sd.Attention, x: Tensor, context: Tensor) -> Tensor:
    """The module's softmax: (B, T, D), (B, S, context_dim) -> (B, heads, T, S), which sums to 1 over S"""
    q, k = (y.unflatten(-1, (module.heads, -1)).transpose(1, 2) for y in (module.q(x), module.k(context)))
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)


@torch.no_grad()
def word_maps(model: sd.StableDiffusion, prompt: str, **settings) -> list[tuple[str, Tensor]]:
    """Each word of a prompt and the share of cross-attention that it gets while the prompt's image is made:
    (h, w) like the latents, which are square, averaged over heads, layers and steps."""
    maps, side = [], model.config.image_size // model.config.downscale

    def look(module: sd.Attention, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        shares = attention_map(module, *inputs)[-1].mean(dim=0).T  # (S, hw), of the prompt, which comes last
        height = int(shares.shape[1] ** 0.5)
        shares = shares.unflatten(1, (height, height))  # (S, h, w) at this level
        maps.append(F.interpolate(shares[None], (side, side), mode="bilinear")[0])

    layers = [module for name, module in model.unet.named_modules() if name.endswith("cross_attention")]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    for _ in model.denoise(prompt, **settings):
        pass
    for hook in hooks:
        hook.remove()
    shares, words, start = torch.stack(maps).mean(dim=0), [], 1  # token 0 is the start of the text
    for word, ids in model.tokenizer.words(prompt):
        words.append((word, shares[start : start + len(ids)].sum(dim=0)))
        start += len(ids)
    return words


def as_colors(latents: Tensor) -> np.ndarray:
    """The first three channels of latents (1, C, h, w), from -3 to 3, as red, green and blue."""
    return (latents[0, :3].permute(1, 2, 0) / 6 + 0.5).clamp(0, 1).numpy()


def heat(image: Image.Image, shares: Tensor) -> np.ndarray:
    """The image in gray, and over it in red where the shares, (h, w), are large."""
    gray = np.asarray(image.convert("L").convert("RGB")) / 255
    weights = np.asarray(Image.fromarray(shares.numpy()).resize(image.size, Image.Resampling.BICUBIC))
    weights = ((weights - weights.min()) / (weights.max() - weights.min()))[..., None]
    return gray * (1 - 0.8 * weights) + np.array([0.9, 0.1, 0.1]) * 0.8 * weights


def draw_schedule(figure: SubFigure, title: str, alphas_cumprod: np.ndarray) -> None:
    figure.suptitle(title, x=0.03, ha="left", fontsize=11)
    axes = figure.subplots()
    axes.plot(alphas_cumprod**0.5, label="signal")
    axes.plot((1 - alphas_cumprod) ** 0.5, label="noise")
    axes.set_xlabel("timestep t", fontsize=8)
    axes.set_ylabel("factor", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8)


def draw_row(figure: SubFigure, title: str, cells: list[Cell]) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, (image, text) in zip(figure.subplots(1, len(cells)), cells):
        axes.imshow(image)
        axes.set_title(text, fontsize=9, pad=3)
        axes.set_axis_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=ROOT / "weights/tour.png", type=Path)
    args, model = parser.parse_args(), sd.load(sd.DEFAULT_WEIGHTS)

    def generate(prompt: str, **settings) -> Image.Image:
        return model.generate(prompt, seed=0, progress=False, **settings)[0]

    def decode(latents: Tensor) -> Image.Image:
        return sd.to_images(model.decode(latents))[0]

    apple = generate(PROMPT)
    latents = model.encode(sd.to_tensor(apple))  # (1, C, h, w)
    target = model.encode(sd.to_tensor(generate("a slice of pizza on a green background")))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    schedule = sd.noise_schedule(model.config)
    steps = [step for step in model.denoise(PROMPT, seed=0) if step.number % 7 == 1]  # 8 of 50
    mask = Image.new("L", apple.size)
    ImageDraw.Draw(mask).rectangle((0, apple.height // 2, *apple.size), fill=255)

    forward: list[Cell] = []
    for t in (0, 100, 250, 500, 750, 999):
        forward.append((decode(sd.add_noise(latents, noise, schedule[t].item())), f"t = {t}"))
    predicted: list[Cell] = [(decode(step.x0), f"step {step.number}, t = {step.timestep}") for step in steps]
    reverse: list[Cell] = [(as_colors(step.latents), f"step {step.number}") for step in steps]
    attention: list[Cell] = [(apple, "the image")]
    for word, shares in word_maps(model, PROMPT, seed=0):
        attention.append((heat(apple, shares), f"{word}: {shares.mean():.1%}"))
    guidance: list[Cell] = []
    for prompt in ("a cat", "a house"):
        for value in (1, 3, 7.5, 15):
            guidance.append((generate(prompt, guidance=value), f"{prompt}, {value}"))
    strength: list[Cell] = [(apple, "the image")]
    for value in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8):
        changed = generate("a green apple on a blue background", image=apple, strength=value)
        strength.append((changed, f"strength {value}"))
    walk: list[Cell] = [(decode(latents.lerp(target, i / 7)), f"{i} / 7") for i in range(8)]
    inpainting: list[Cell] = [(apple, "the image"), (mask.convert("RGB"), "the mask")]
    for thing in ("slice of pizza", "strawberry", "pig face", "pumpkin", "bear", "globe"):
        redrawn = generate(f"a {thing} on a blue background", image=apple, mask=mask, strength=1.0)
        inpainting.append((redrawn, thing))

    figure = Figure(figsize=(12, 14.5), dpi=120, layout="constrained")
    rows = figure.subfigures(8, 1)
    curves, images = rows[0].subfigures(1, 2, width_ratios=(1, 3))
    draw_schedule(curves, "1  The noise schedule", schedule.numpy())
    draw_row(images, "    Forward noise: x_t = signal factor * x_0 + noise factor * noise", forward)
    draw_row(rows[1], f'2  Eight of 50 steps for "{PROMPT}": the predicted x_0 ...', predicted)
    draw_row(rows[2], "    ... and the latents, three of their channels as red, green and blue", reverse)
    draw_row(rows[3], "3  Where cross-attention looks for each word, and the word's share of it", attention)
    draw_row(rows[4], "4  Classifier-free guidance", guidance)
    draw_row(rows[5], '5  Image-to-image, "a green apple on a blue background"', strength)
    draw_row(rows[6], "6  From one image's latents to another's, decoded", walk)
    draw_row(rows[7], "7  Inpainting: redrawn where the mask is white, with other prompts", inpainting)
    figure.savefig(args.out)


if __name__ == "__main__":
    main()
