"""Measures the default model: `python tests/emoji_quality.py [--weights FILE] [--sheet FILE]`.

It generates 300 emoji, each on a background that it was not trained on, image i from seed i, and prints how
often the nearest of all emoji on that background is the one named (by pixels at 32x32 and by latents), how
often the background has the color named, and the VAE's PSNR on held-out images. The sheet shows the first 64.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sd  # noqa: E402
from weights import emoji, train  # noqa: E402


def small(image: Image.Image) -> np.ndarray:
    """The pixels of the image at 32x32, to compare it by."""
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.float32).ravel()


def background(image: Image.Image) -> str:
    """The color nearest to the median of the image's edge."""
    pixels = np.asarray(image, dtype=np.float32)
    sides = (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])
    edge = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    return min(emoji.COLORS, key=lambda color: np.abs(edge - emoji.COLORS[color]).sum())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default=sd.DEFAULT_WEIGHTS)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--bare", action="store_true", help="names without their articles")
    parser.add_argument("--sheet", type=Path, default=ROOT / "sheet.png")
    args = parser.parse_args()

    model, names = sd.load(args.weights), emoji.emoji_names()
    font = ImageFont.truetype(emoji.installed(emoji.FONT), emoji.GLYPH)
    backgrounds: dict[str, str] = {}  # one for each emoji
    for one, color in emoji.split(list(names))["heldout"]:
        backgrounds.setdefault(one, color)
    asked, images = list(backgrounds.items())[: args.count], []
    for seed, (one, color) in enumerate(tqdm(asked, "generating")):
        settings = {"steps": args.steps, "guidance": args.guidance, "sampler": args.sampler, "seed": seed}
        prompt = emoji.captions(names[one], color)[args.bare]
        images += model.generate(prompt, progress=False, **settings)
    train.sheet(images[:64]).save(args.sheet)

    features = {"pixels": small, "latents": lambda image: model.encode(sd.to_tensor(image)).flatten().numpy()}
    right, psnr = dict.fromkeys([*features, "background"], 0), []
    for color in tqdm(emoji.COLORS, "comparing"):
        truth = {one: emoji.draw(one, color, font) for one in names}
        generated = {one: image for (one, wanted), image in zip(asked, images) if wanted == color}
        right["background"] += sum(background(image) == color for image in generated.values())
        for kind, feature in features.items():
            known = np.stack([feature(image) for image in truth.values()])
            for one, image in generated.items():
                nearest = ((known - feature(image)) ** 2).sum(axis=1).argmin()
                right[kind] += list(truth)[nearest] == one
        for one in generated:
            [decoded] = sd.to_images(model.decode(model.encode(sd.to_tensor(truth[one]))))
            difference = np.asarray(decoded, dtype=np.float64) - np.asarray(truth[one])
            psnr.append(10 * np.log10(255**2 / (difference**2).mean()))

    how = f"{args.steps} steps of {args.sampler}, guidance {args.guidance:g}"
    print(f"{len(asked)} emoji on held-out backgrounds, {how}")
    for name, kind, wanted in [
        ("identity by pixels", "pixels", 90), ("identity by latents", "latents", 90),
        ("background", "background", 98),
    ]:  # fmt: skip
        print(f"{name:<20} {right[kind] / len(asked):6.1%}   (wanted {wanted} %)")
    print(f"{'PSNR of the VAE':<20} {np.mean(psnr):6.2f} dB (wanted 28 dB)")


if __name__ == "__main__":
    main()
