"""Data sets and objectives of training: the VAE's, on images, and the UNet's, on images with captions.

An objective holds the examples of a data set, draws batches from them, and is a module whose forward is the
loss.
"""

import glob
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

import sd

if TYPE_CHECKING:
    from weights.train import Settings

# ------------------------------------------------------------------------------------------------- 1 captions


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises ValueError."""
    with sd.reading(file, "use text in UTF-8"):
        return file.read_text(encoding="utf-8-sig")


def read_json(file: Path, text: str, line: int = 1) -> Any:
    """Parses the text of a file that begins at `line`. Raises ValueError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        reason = f"not JSON: {getattr(error, 'msg', error)}; README.md shows how captions are written"
        raise ValueError(f"{file}, line {line}: {reason}") from error


def get(place: str, entry: Any, key: str, kind: Any = str) -> Any:
    """The value of `key` in an entry of a captions file. Raises ValueError if it is missing or no `kind`."""
    value = entry.get(key) if isinstance(entry, dict) else None
    found = "missing" if value is None else str(value)[:50]
    wanted = "a list" if kind is list else "a string" if kind is str else "a number"
    sd.check(f"{place}: {key}", found, isinstance(value, kind), f"{wanted}, as README.md shows")
    return value


def read_jsonl(file: Path) -> Iterator[tuple[Path, str]]:
    """Images and captions of Hugging Face's imagefolder, {"file_name": "a.png", "text": "a cat"} per line."""
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            entry, place = read_json(file, line, number), f"{file}, line {number}"
            yield file.parent / get(place, entry, "file_name"), get(place, entry, "text")


def read_coco(file: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Images, anywhere in the folder, and captions of COCO's captions_*.json."""
    content, names = read_json(file, read_text(file)), {}
    paths = {path.name: path for path in find_files(folder)}
    for i, entry in enumerate(get(str(file), content, "images", list)):
        place = f"{file}, images[{i}]"
        names[get(place, entry, "id", int | str)] = get(place, entry, "file_name")
    for i, entry in enumerate(get(str(file), content, "annotations", list)):
        place = f"{file}, annotations[{i}]"
        id, caption = get(place, entry, "image_id", int | str), get(place, entry, "caption")
        sd.check(f"{place}: image_id", id, id in names, "the id of one of the images")
        yield paths.get(names[id], folder / names[id]), caption


def read_texts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Images NAME.png, NAME.jpg, ... and the captions in NAME.txt beside them."""
    for image in find_images(folder):
        if image.with_suffix(".txt").is_file():
            yield image, read_text(image.with_suffix(".txt")).strip()


def read_captions(folder: Path) -> dict[Path, list[str]]:
    """The images of a data set, each with its captions: from metadata.jsonl, COCO's captions_*.json, or a
    NAME.txt beside each NAME.png. Raises OSError or ValueError."""
    if (folder / "metadata.jsonl").is_file():
        pairs = list(read_jsonl(folder / "metadata.jsonl"))
    elif files := find_files(folder, "captions_*.json"):
        pairs = [pair for file in files for pair in read_coco(file, folder)]
    else:
        pairs = list(read_texts(folder))
    captions: dict[Path, list[str]] = {}
    for image, caption in pairs:
        captions.setdefault(image, []).append(caption)
    sd.check(str(folder), "without captions", bool(captions), "laid out as README.md says")
    return captions


# --------------------------------------------------------------------------------------------------- 2 images


def find_files(folder: Path, pattern: str = "*") -> list[Path]:
    """The files in a folder and in the folders in it, linked ones included. Raises OSError."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; name one that holds images")
    return sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/**/{pattern}", recursive=True)))


def find_images(folder: Path) -> list[Path]:
    """The images of a data set. Raises OSError or ValueError."""
    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    images = [file for file in find_files(folder) if file.suffix.lower() in suffixes]
    sd.check(str(folder), "without images", bool(images), "a folder that holds images")
    return images


def read_pixels(paths: list[Path], side: int) -> Iterator[tuple[Path, Tensor]]:
    """Each path with its pixels, (3, H, W) uint8, the shorter side resized to `side`. Warns about images that
    cannot be read; raises ValueError where they are more than half."""
    failed = []
    for path in tqdm(paths, "reading", disable=None):
        try:
            image = sd.open_image(path)
        except ValueError as error:
            failed.append(sd.one_line(error))
            continue
        size = [round(length * side / min(image.size)) for length in image.size]
        pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))
        yield path, torch.from_numpy(pixels).permute(2, 0, 1)
    found = f"{len(failed)} of {len(paths)} images"
    if len(failed) > len(paths) / 2:
        raise ValueError(f"{found} cannot be used; replace them: {', '.join(failed[:3])}")
    if failed:
        warnings.warn(f"{found} left out: {', '.join(failed)}", stacklevel=2)


def crop(pixels: Tensor, side: int, down: float = 0.5, right: float = 0.5) -> Tensor:
    """(3, H, W) -> (3, side, side); `down` and `right`, from 0 to 1, say where, by default in the middle"""
    top, left = round(down * (pixels.shape[1] - side)), round(right * (pixels.shape[2] - side))
    return pixels[:, top : top + side, left : left + side]


def sheet(images: list[Image.Image], columns: int = 8) -> Image.Image:
    """Images of one size in rows."""
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


# ----------------------------------------------------------------------------------------------- 3 objectives


def image_side(model: sd.StableDiffusion, settings: "Settings") -> int:
    """The height and width in pixels to train at. Raises ValueError."""
    side, unit = settings.resolution or model.config.image_size, model.config.downscale
    sd.check("resolution", side, side % unit == 0, f"a multiple of {unit}")
    return side


class Reconstruction(nn.Module):
    """The VAE's objective: L1 between images and reconstructions, and between the differences of neighboring
    pixels, and a little KL divergence of the latents from a standard normal. SD's own also has LPIPS and a
    patch discriminator (Esser et al. 2020, arXiv:2012.09841), for textures that L1 leaves soft."""

    EDGE_WEIGHT, KL_WEIGHT = 0.5, 1e-3

    def __init__(self, model: sd.StableDiffusion, settings: "Settings", images: list[Path]):
        super().__init__()
        self.model, self.settings = model.requires_grad_(False), settings
        model.vae.requires_grad_(True)
        self.side = image_side(model, settings)
        self.examples = [pixels for _, pixels in read_pixels(images, self.side)]

    def draw(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Indices (B,) of examples -> random crops (B, 3, H, W) in [-1, 1], and noise (B, C, h, w)"""
        count, channels = len(indices), self.model.config.latent_channels
        places = torch.rand(count, 2, generator=generator).tolist()
        crops = [crop(self.examples[i], self.side, *place) for i, place in zip(indices.tolist(), places)]
        images = torch.stack(crops)
        flips = torch.rand(count, generator=generator) < (0.5 if self.settings.flip else 0)
        images[flips] = images[flips].flip(-1)
        side = self.side // self.model.config.downscale
        return images / 127.5 - 1, torch.randn(count, channels, side, side, generator=generator)

    def draw_fixed(self, count: int) -> tuple[Tensor, ...]:
        """A batch that is the same at every call."""
        generator = torch.Generator().manual_seed(0)
        return self.draw(torch.randint(len(self.examples), (count,), generator=generator), generator)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """(B, 3, H, W), (B, C, h, w) -> the loss"""
        mean, logvar = (moment.float() for moment in self.model.vae.encode(images))  # (B, C, h, w) each
        error = self.model.vae.decode(mean + (0.5 * logvar).exp() * noise).float() - images  # (B, 3, H, W)
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = (mean**2 + logvar.exp() - 1 - logvar).mean() / 2  # Kingma and Welling 2013, app. B
        return error.abs().mean() + self.EDGE_WEIGHT * edges + self.KL_WEIGHT * kl

    @torch.no_grad()
    def finish(self) -> None:
        """Sets the Config's latent_scale, which brings the latents of the data set to unit variance."""
        self.model.config = replace(self.model.config, latent_scale=1.0)
        images, noise = self.draw_fixed(64)
        pairs = zip(images.split(1), noise.to(self.model.device).split(1))  # memory peaks here
        latents = torch.cat([self.model.encode(image, noise) for image, noise in pairs])
        self.model.config = replace(self.model.config, latent_scale=1 / latents.std().item())

    @torch.no_grad()
    def samples(self) -> list[Image.Image]:
        """16 crops, each followed by its reconstruction."""
        images = []
        for image in self.draw_fixed(16)[0].split(1):
            images += sd.to_images(image) + sd.to_images(self.model.decode(self.model.encode(image)))
        return images


class NoisePrediction(nn.Module):
    """The UNet's objective: predicting the noise in noisy latents (Ho et al. 2020, alg. 1, eq. 14), or the
    velocity v (Salimans and Ho 2022, app. D), with min-SNR weights if wanted (Hang et al. 2023, sec. 3.4,
    arXiv:2303.09556)."""

    def __init__(self, model: sd.StableDiffusion, settings: "Settings", captions: dict[Path, list[str]]):
        super().__init__()
        self.model, self.settings = model.requires_grad_(False), settings
        model.unet.requires_grad_(True)
        model.text_encoder.requires_grad_(settings.train_text_encoder)
        self.alphas_cumprod: Tensor
        self.register_buffer("alphas_cumprod", sd.noise_schedule(model.config).float().to(model.device))
        self.prompts = [text for texts in captions.values() for text in texts][:16]
        if settings.prompts:
            self.prompts = [line for line in read_text(settings.prompts).splitlines() if line.strip()]
            sd.check("prompts", settings.prompts, bool(self.prompts), "a file with a prompt per line")
        self.no_text = torch.tensor(model.tokenizer(""))
        self.examples = []  # the moments of an image's latents, (2C, h, w), and its captions' ids, (N, T)
        self.side = image_side(model, settings)
        for path, pixels in read_pixels(list(captions), self.side):
            image = crop(pixels, self.side)
            ids = torch.tensor([model.tokenizer(text) for text in captions[path]])
            for version in (image, image.flip(-1)) if settings.flip else (image,):
                with torch.no_grad():
                    moments = model.vae.encode(version[None].to(model.device) / 127.5 - 1)
                self.examples.append((torch.cat(moments, dim=1)[0].cpu(), ids))

    def draw(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Indices (B,) of examples -> scaled latents and noise (B, C, h, w), timesteps (B,), ids (B, T)"""
        count, config = len(indices), self.model.config
        moments, captions = zip(*(self.examples[i] for i in indices.tolist()))
        mean, logvar = torch.stack(moments).chunk(2, dim=1)  # (B, C, h, w) each
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        t = torch.randint(config.timesteps, (count,), generator=generator)
        ids = torch.stack([texts[torch.randint(len(texts), (), generator=generator)] for texts in captions])
        ids[torch.rand(count, generator=generator) < self.settings.drop_text] = self.no_text
        return latents * config.latent_scale, torch.randn(mean.shape, generator=generator), t, ids

    def forward(self, latents: Tensor, noise: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """(B, C, h, w) twice, (B,), (B, T) -> the loss"""
        a_t, gamma = self.alphas_cumprod[t].view(-1, 1, 1, 1), self.settings.min_snr
        predicted = self.model.unet(sd.add_noise(latents, noise, a_t), t, self.model.text_encoder(ids))
        target, weight = noise, (gamma * (1 - a_t) / a_t).clamp(max=1)  # min(SNR, gamma) / SNR
        if self.model.config.prediction == "v_prediction":
            target = a_t**0.5 * noise - (1 - a_t) ** 0.5 * latents
            weight = weight * a_t if gamma < math.inf else weight  # min(SNR, gamma) / (SNR + 1)
        return (weight * (predicted.float() - target) ** 2).mean()

    def finish(self) -> None:
        """Nothing is left to do."""

    def samples(self) -> list[Image.Image]:
        """An image of each prompt."""
        options: dict[str, Any] = {"steps": 20, "sampler": "dpm++", "seed": self.settings.seed}
        options |= {"width": self.side, "height": self.side, "progress": False}
        return [self.model.generate(prompt, **options)[0] for prompt in self.prompts]
