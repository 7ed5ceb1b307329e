"""How well the default model draws: `python tests/emoji_quality.py [--weights FILE] [--sheet FILE]`.

It draws 300 emoji, each on a background that it was never shown on, picture i with seed i, and prints how
often the nearest of all emoji on that background is the one named (pixels at 32x32, the VAE's latents), how
often the background has the colour named, and how well the VAE gives held-out pictures back. The sheet shows
the first 64 of the seeded shuffle, unpicked.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "weights")]

import emoji  # noqa: E402
import sd  # noqa: E402


def small(picture: Image.Image) -> np.ndarray:
    """What two pictures are compared by: their pixels at 32x32."""
    return np.asarray(picture.resize((32, 32), Image.Resampling.BOX), dtype=np.float32).ravel()


@torch.no_grad()
def latent(model: sd.StableDiffusion, picture: Image.Image) -> np.ndarray:
    """What two pictures are compared by: their latents."""
    return model.encode(sd.to_tensor(picture)).flatten().numpy()


def background(picture: Image.Image) -> str:
    """The colour whose distance to the median of the picture's edge is least."""
    pixels = np.asarray(picture, dtype=np.float32)
    sides = (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])
    edge = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    return min(emoji.COLOURS, key=lambda colour: np.abs(edge - emoji.COLOURS[colour]).sum())


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

    model = sd.StableDiffusion.load(args.weights)
    names, font = emoji.emoji_names(), ImageFont.truetype(emoji.installed(emoji.FONT), emoji.GLYPH)
    asked = {}  # one background for each emoji
    for one, colour in emoji.split(list(names))["heldout"]:
        asked.setdefault(one, colour)
    asked = list(asked.items())[: args.count]
    drawn = []
    for seed, (one, colour) in enumerate(tqdm(asked, "drawing")):
        settings = {"steps": args.steps, "guidance": args.guidance, "sampler": args.sampler, "seed": seed}
        drawn += model.generate(emoji.captions(names[one], colour)[args.bare], progress=False, **settings)
    sd.sheet(drawn[:64]).save(args.sheet)

    right = dict.fromkeys(["pixels", "latents", "background"], 0)
    errors = []
    for colour in tqdm(emoji.COLOURS, "comparing"):
        truth = {one: emoji.draw(one, colour, font) for one in names}
        features = {"pixels": small, "latents": lambda picture: latent(model, picture)}
        for kind, feature in features.items():
            known = np.stack([feature(picture) for picture in truth.values()])
            for (one, asked_colour), picture in zip(asked, drawn):
                if asked_colour == colour:
                    nearest = ((known - feature(picture)) ** 2).sum(axis=1).argmin()
                    right[kind] += list(truth)[nearest] == one
        for (one, asked_colour), picture in zip(asked, drawn):
            if asked_colour == colour:
                right["background"] += background(picture) == colour
                with torch.no_grad():
                    [back] = sd.to_pictures(model.decode(model.encode(sd.to_tensor(truth[one]))))
                difference = np.asarray(back, dtype=np.float64) - np.asarray(truth[one])
                errors.append(10 * np.log10(255**2 / (difference**2).mean()))

    count = len(asked)
    how = f"{args.steps} steps of {args.sampler}, guidance {args.guidance:g}"
    print(f"{count} emoji on held-out backgrounds, {how}")
    print(f"identity by pixels   {right['pixels'] / count:6.1%}   (wanted 90 %)")
    print(f"identity by latents  {right['latents'] / count:6.1%}   (wanted 90 %)")
    print(f"background           {right['background'] / count:6.1%}   (wanted 98 %)")
    print(f"VAE's PSNR           {np.mean(errors):6.2f} dB (wanted 28 dB)")


if __name__ == "__main__":
    main()
