"""Stable Diffusion v1 in one file: from a prompt to a picture, read from top to bottom.

    python sd.py --prompt "a photograph of an astronaut riding a horse" --weights v1-5-pruned-emaonly.safetensors

The prompt is cut into tokens (2), which a transformer turns into a context (4). A denoiser (6) looks at a latent, a
picture eight times smaller that starts as pure noise, and at the context, and says what in the latent is noise; a
sampler (7) takes some of that noise away, again and again. A decoder (5) turns the clean latent into a picture.

    1 configuration   2 tokenizer   3 building blocks   4 text encoder    5 autoencoder
    6 denoiser        7 diffusion   8 checkpoints       9 pipeline       11 command line

Shapes stand at the end of a line: B batch, T tokens, D width, C channels, H W pixels, h w the latent's.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752
Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239
"""

import argparse
import json
import math
import mmap
import os
import pickle
import random
import re
import statistics
import struct
import sys
import tempfile
import unicodedata
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
DEFAULT_WEIGHTS = HERE / "weights" / "emoji.safetensors"


# ------------------------------------------------------------------------------------------------ 1 configuration
# Every size in this file comes from here, so that a small model is the same code with other numbers.


@dataclass(frozen=True)
class Config:
    """The sizes of a model. The defaults are Stable Diffusion v1's (CompVis, configs/.../v1-inference.yaml)."""

    image_size: int = 512  # width and height of a picture, in pixels, when none are asked for

    vocab_size: int = 49408
    text_length: int = 77  # tokens, start and end included
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12

    latent_channels: int = 4
    latent_scale: float = 0.18215  # brings the latents to unit variance (Rombach et al. 2022, app. G)
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)  # channels at each resolution, the picture's own first
    vae_blocks: int = 2

    unet_widths: tuple[int, ...] = (320, 640, 1280, 1280)
    unet_attends: tuple[bool, ...] = (True, True, True, False)  # which resolutions look at the text
    unet_blocks: int = 2
    unet_heads: int = 8
    norm_groups: int = 32

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """What `json.dumps(asdict(config))` wrote."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()})

    @property
    def downscale(self) -> int:
        """How many pixels of the picture, across, make one of the latent."""
        return 2 ** (len(self.vae_widths) - 1)


# ---------------------------------------------------------------------------------------------------- 2 tokenizer
# Byte-pair encoding (Sennrich et al. 2016) over bytes, as OpenAI's CLIP has it (simple_tokenizer.py): text is cut into
# words, a word into bytes, and the pairs that were most common in CLIP's training text grow together again.

# A byte is written as one visible character: itself where it is visible, else the next free one from U+0100 on.
VISIBLE_BYTES = [byte for byte in range(256) if byte > ord(" ") and chr(byte).isprintable()]
HIDDEN_BYTES = [byte for byte in range(256) if byte not in VISIBLE_BYTES]
BYTE_SYMBOLS = {byte: chr(byte) for byte in VISIBLE_BYTES} | {b: chr(256 + i) for i, b in enumerate(HIDDEN_BYTES)}

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = re.compile(f"({re.escape(START)}|{re.escape(END)})", re.IGNORECASE | re.ASCII)
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


class Tokenizer:
    """CLIP's tokenizer. A `vocab_size` below CLIP's 49,408 uses the first, most common merges only."""

    def __init__(
        self,
        vocab_size: int = Config.vocab_size,
        length: int = Config.text_length,
        merges: Path = HERE / "tokenizer_vocab" / "merges.txt",
    ):
        self.length = length
        symbols = list(BYTE_SYMBOLS.values())
        pairs = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").splitlines()]
        pairs = pairs[: vocab_size - 2 * len(symbols) - 2]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in pairs] + [START, END]
        self.ids = {token: id for id, token in enumerate(tokens)}

    def __call__(self, text: str) -> list[int]:
        """`text` as `length` ids: a start, at most `length - 2` tokens, and ends up to the full length."""
        ids = [id for _, word_ids in self.words(text) for id in word_ids][: self.length - 2]
        return [self.ids[START], *ids] + [self.ids[END]] * (self.length - 1 - len(ids))

    def dropped(self, text: str) -> list[str]:
        """The words of `text` that do not fit, whole or in part, into `length` ids."""
        room, dropped = self.length - 2, []
        for word, ids in self.words(text):
            room -= len(ids)
            if room < 0:
                dropped.append(word)
        return dropped

    def words(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """The words of `text`, normalised, each with its ids; special tokens are words of one id."""
        for part in SPECIAL.split(text):
            if part in (START, END):
                yield part, [self.ids[part]]
                continue
            part = unicodedata.normalize("NFC", part)
            part = "".join(character.lower() for character in part)  # one by one: no final sigma
            for word in WORD.findall(part):
                yield word, [self.ids[token] for token in self.merge(word)]

    def merge(self, word: str) -> list[str]:
        """`word` as tokens: its bytes, of which the pair that comes first in the list of merges is joined, over and over."""
        tokens = [BYTE_SYMBOLS[byte] for byte in word.encode("utf-8", errors="replace")]
        tokens[-1] += "</w>"
        while len(tokens) > 1:
            pair = min(zip(tokens, tokens[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if pair not in self.ranks:
                break
            merged = []
            for token in tokens:
                if merged and (merged[-1], token) == pair:
                    merged[-1] += token
                else:
                    merged.append(token)
            tokens = merged
        return tokens


# ---------------------------------------------------------------------------------------------- 3 building blocks
# What more than one of the three models is made of. Pictures and latents are (B, C, H, W), text is (B, T, D); where
# attention looks at a picture, its pixels are the tokens.


class Attention(nn.Module):
    """Every token gathers from others what it asks for (Vaswani et al. 2017, sec. 3.2.2, arXiv:1706.03762).

    Self-attention, where the tokens ask each other, or cross-attention, where they ask a context of `context_width`.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = True):
        super().__init__()
        self.heads = heads
        if context_width is None:
            self.qkv = nn.Linear(width, 3 * width, bias)  # one matrix product, as q, k and v share their input
        else:
            self.q = nn.Linear(width, width, bias)
            self.kv = nn.Linear(context_width, 2 * width, bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False) -> Tensor:
        """(B, T, D) and, for cross-attention, (B, S, context_width) -> (B, T, D); `causal` hides later tokens."""
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, T, D) each
        else:
            q, (k, v) = self.q(x), self.kv(context).chunk(2, dim=-1)  # (B, T, D), (B, S, D) each
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, T, D / heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, D)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015); between them the denoiser adds the timestep (Ho, app. B)."""

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float, time_width: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        if time_width is not None:
            self.time = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and, in the denoiser, (B, time_width) -> (B, out_channels, H, W)"""
        residual = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            residual = residual + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(residual)))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution that smooths the steps."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size), twice the size by default"""
        height, width = x.shape[-2:]
        return self.conv(F.interpolate(x, size or (2 * height, 2 * width)))


# ------------------------------------------------------------------------------------------------- 4 text encoder
# CLIP ViT-L/14's text transformer (Radford et al. 2021, sec. 2.4, arXiv:2103.00020): ids in, one vector a token out.


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU (Hendrycks and Gimpel 2016, sec. 2, arXiv:1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """A transformer layer that norms before it works; a token sees only itself and those before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = x + self.attention(self.norm1(x), causal=True)
        return x + self.mlp(self.norm2(x))


class CLIPTextEncoder(nn.Module):
    """Turns token ids into the context that the denoiser looks at."""

    def __init__(self, config: Config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.text_width)
        self.position_embedding = nn.Embedding(config.text_length, config.text_width)
        self.layers = nn.Sequential(*(TextBlock(config.text_width, config.text_heads) for _ in range(config.text_layers)))
        self.norm = nn.LayerNorm(config.text_width)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64, T at most text_length -> (B, T, text_width), the last layer's output, normed"""
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, T, D)
        return self.norm(self.layers(x))


# -------------------------------------------------------------------------------------------------- 5 autoencoder
# Squeezes a picture into a latent and back (Rombach et al. 2022, sec. 3.1 and app. G; Kingma and Welling 2013). Both
# halves are straight lines: each is written as the list of its layers.

VAE_EPS = 1e-6


class ImageAttention(nn.Module):
    """Self-attention of one head over all pixels, beside a shortcut."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, VAE_EPS)
        self.attention = Attention(channels, heads=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        return x + self.attention(tokens).transpose(1, 2).view_as(x)


def vae_levels(widths: tuple[int, ...], blocks: int, groups: int, resample: Callable[[int], nn.Module]) -> nn.Sequential:
    """`blocks` residual blocks at each of `widths`, and `resample` from one resolution to the next."""
    levels = nn.Sequential()
    for last_width, width in zip((widths[0], *widths), widths):
        channels = [last_width] + blocks * [width]
        level = nn.Sequential(OrderedDict(
            blocks=nn.Sequential(*(ResidualBlock(*pair, groups, VAE_EPS) for pair in zip(channels, channels[1:]))),
            resample=resample(width) if len(levels) < len(widths) - 1 else nn.Identity(),
        ))
        levels.append(level)
    return levels


def vae_middle(width: int, groups: int) -> nn.Sequential:
    """What stands between the two halves' levels and the latent."""
    return nn.Sequential(
        ResidualBlock(width, width, groups, VAE_EPS),
        ImageAttention(width, groups),
        ResidualBlock(width, width, groups, VAE_EPS),
    )


class Encoder(nn.Sequential):
    """(B, 3, H, W) -> (B, 2 * latent_channels, h, w)"""

    def __init__(self, config: Config):
        def halve(width: int) -> nn.Module:  # SD pads on the right and at the bottom only
            return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))

        widths, groups = config.vae_widths, config.norm_groups
        super().__init__(OrderedDict(
            conv_in=nn.Conv2d(3, widths[0], 3, padding=1),
            down=vae_levels(widths, config.vae_blocks, groups, halve),
            middle=vae_middle(widths[-1], groups),
            norm_out=nn.GroupNorm(groups, widths[-1], VAE_EPS),
            activation=nn.SiLU(),
            conv_out=nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1),
        ))


class Decoder(nn.Sequential):
    """(B, latent_channels, h, w) -> (B, 3, H, W)"""

    def __init__(self, config: Config):
        widths, groups = config.vae_widths[::-1], config.norm_groups
        super().__init__(OrderedDict(
            conv_in=nn.Conv2d(config.latent_channels, widths[0], 3, padding=1),
            middle=vae_middle(widths[0], groups),
            up=vae_levels(widths, config.vae_blocks + 1, groups, Upsample),
            norm_out=nn.GroupNorm(groups, widths[-1], VAE_EPS),
            activation=nn.SiLU(),
            conv_out=nn.Conv2d(widths[-1], 3, 3, padding=1),
        ))


class VAE(nn.Module):
    """The autoencoder: pictures in [-1, 1] to latents `config.downscale` times smaller, and back."""

    def __init__(self, config: Config):
        super().__init__()
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.quant = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant = nn.Conv2d(channels, channels, 1)
        self.decoder = Decoder(config)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the latent's mean and log-variance, each (B, latent_channels, h, w), not scaled"""
        mean, logvar = self.quant(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent: Tensor) -> Tensor:
        """(B, latent_channels, h, w), not scaled -> (B, 3, H, W), about [-1, 1]"""
        return self.decoder(self.post_quant(latent))


# ----------------------------------------------------------------------------------------------------- 6 denoiser
# A U-Net (Ronneberger et al. 2015, arXiv:1505.04597) that looks at the text at every resolution but the smallest
# (Rombach et al. 2022, sec. 3.3). On the way up each block also gets what a block on the way down made of its size.


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """(B,) timesteps -> (B, width): cosines and sines of falling frequency (Vaswani et al. 2017, sec. 3.5)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class GEGLU(nn.Module):
    """A linear layer of which one half gates the other (Shazeer 2020, eq. 6, arXiv:2002.05202)."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, out_width)"""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class SpatialTransformer(nn.Module):
    """A transformer layer over a latent's pixels: they look at each other, then at the text, then each at itself."""

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, config.unet_heads, bias=False)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, config.unet_heads, config.text_width, bias=False)
        self.norm3 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(GEGLU(channels, 4 * channels), nn.Linear(4 * channels, channels))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w), (B, T, text_width) -> (B, C, h, w)"""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, hw, C)
        tokens = tokens + self.self_attention(self.norm1(tokens))
        tokens = tokens + self.cross_attention(self.norm2(tokens), context)
        tokens = tokens + self.mlp(self.norm3(tokens))
        return x + self.proj_out(tokens).transpose(1, 2).view_as(x)


class UNetBlock(nn.Module):
    """A residual block, which learns the timestep, then, where the U-Net `attends`, a transformer, which learns the text."""

    def __init__(self, channels: int, out_channels: int, attends: bool, config: Config):
        super().__init__()
        time_width = 4 * config.unet_widths[0]
        self.residual = ResidualBlock(channels, out_channels, config.norm_groups, 1e-5, time_width)
        self.transformer = SpatialTransformer(out_channels, config) if attends else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w), (B, time_width), (B, T, text_width) -> (B, out_channels, h, w)"""
        x = self.residual(x, time)
        return x if self.transformer is None else self.transformer(x, context)


class UNet(nn.Module):
    """The denoiser: says which part of a noisy latent is noise."""

    def __init__(self, config: Config):
        super().__init__()
        self.width = width = config.unet_widths[0]
        self.time_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        levels = list(zip(config.unet_widths, config.unet_attends))

        self.down = nn.ModuleList()
        channels, skips = width, [width]
        for width, attends in levels:
            level = nn.ModuleDict({"blocks": nn.ModuleList()})
            for _ in range(config.unet_blocks):
                level["blocks"].append(UNetBlock(channels, width, attends, config))
                channels = width
                skips.append(channels)
            if len(self.down) < len(levels) - 1:
                level["resample"] = nn.Conv2d(width, width, 3, stride=2, padding=1)
                skips.append(channels)
            self.down.append(level)

        self.middle = nn.ModuleList([UNetBlock(channels, channels, attends, config) for attends in (True, False)])

        self.up = nn.ModuleList()
        for width, attends in reversed(levels):
            level = nn.ModuleDict({"blocks": nn.ModuleList()})
            for _ in range(config.unet_blocks + 1):
                level["blocks"].append(UNetBlock(channels + skips.pop(), width, attends, config))
                channels = width
            if len(self.up) < len(levels) - 1:
                level["resample"] = Upsample(width)
            self.up.append(level)

        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, latent: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Noisy latent (B, C, h, w), timestep (B,), context (B, T, text_width) -> predicted noise (B, C, h, w)"""
        time = self.time_mlp(timestep_embedding(t, self.width).to(latent.dtype))  # (B, time_width)
        x = self.conv_in(latent)
        skips = [x]
        for level in self.down:
            for block in level["blocks"]:
                x = block(x, time, context)
                skips.append(x)
            if "resample" in level:
                x = level["resample"](x)
                skips.append(x)
        for block in self.middle:
            x = block(x, time, context)
        for level in self.up:
            for block in level["blocks"]:
                x = block(torch.cat([x, skips.pop()], dim=1), time, context)
            if "resample" in level:
                x = level["resample"](x, skips[-1].shape[-2:])  # the skip's size: twice it, or one less where odd
        return self.conv_out(F.silu(self.norm_out(x)))


# ---------------------------------------------------------------------------------------------------- 7 diffusion
# Forward: a latent x_0 drowns in noise, x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, where a_t, written alphas_cumprod,
# falls from nearly 1 at t = 0 to nearly 0 at t = 999 (Ho et al. 2020, eq. 4). Reverse: a sampler starts from noise and
# steps from one timestep to an earlier one, each time with the noise that the denoiser predicts.


def noise_schedule(config: Config) -> Tensor:
    """alphas_cumprod (timesteps,) in float64; SD's betas are linear in their square root ("scaled linear")."""
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64)
    return (1 - roots**2).cumprod(0)


def add_noise(latent: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The forward process (Ho et al. 2020, eq. 4): (B, C, h, w) twice, and alphas_cumprod () or (B, 1, 1, 1)."""
    return alphas_cumprod.sqrt() * latent + (1 - alphas_cumprod).sqrt() * noise


class Sampler:
    """A reverse process: `timesteps`, noisiest first, and `step`, which goes from one to the next.

    `levels[i]` is alphas_cumprod where step i starts, `levels[i + 1]` where it ends.
    """

    def __init__(self, config: Config, steps: int, strength: float = 1.0):
        """Of `steps` timesteps over the whole schedule only the last share, `strength` in (0, 1], is run; at least one."""
        schedule = noise_schedule(config)
        self.timesteps = self.spacing(steps, config.timesteps)[-max(1, int(steps * strength)) :]
        self.levels = torch.cat([schedule[self.timesteps], self.final(schedule)])

    def spacing(self, steps: int, timesteps: int) -> list[int]:
        """Evenly spaced, starting one above the bottom, as SD has it: 981, 961, ..., 1 for 50 of 1000."""
        stride = timesteps // steps
        offset = min(1, timesteps - 1 - (steps - 1) * stride)
        return [offset + i * stride for i in reversed(range(steps))]

    def final(self, schedule: Tensor) -> Tensor:
        """The level that the last step ends at, (1,): no noise."""
        return torch.ones_like(schedule[:1])

    def predict_clean(self, i: int, latent: Tensor, noise_pred: Tensor) -> Tensor:
        """x_0 as the predicted noise has it (Ho et al. 2020, eq. 4 the other way round)."""
        return (latent - (1 - self.levels[i]).sqrt() * noise_pred) / self.levels[i].sqrt()

    def step(self, i: int, latent: Tensor, noise_pred: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """The latent after step `i`, all (B, C, h, w); `draw` makes fresh noise where the process needs some."""
        raise NotImplementedError


class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020, alg. 2), written as DDIM with eta = 1 (Song et al. 2020, arXiv:2010.02502)."""

    eta = 1.0

    def step(self, i: int, latent: Tensor, noise_pred: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        now, after = self.levels[i], self.levels[i + 1]
        variance = self.eta**2 * (1 - after) / (1 - now) * (1 - now / after)  # Song et al. 2020, eq. 16
        mean = after.sqrt() * self.predict_clean(i, latent, noise_pred) + (1 - after - variance).sqrt() * noise_pred
        return mean + variance.sqrt() * draw() if self.eta else mean  # Song et al. 2020, eq. 12


class DDIM(DDPM):
    """The same without fresh noise, eta = 0; SD's ends at the schedule's lowest noise level, not at none."""

    eta = 0.0

    def final(self, schedule: Tensor) -> Tensor:
        return schedule[:1]


class DPMPlusPlus(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2, arXiv:2211.01095): each step also looks back at the one before."""

    def spacing(self, steps: int, timesteps: int) -> list[int]:
        """Evenly spaced from the top, which suits few steps: 999, 949, ..., 50 for 20 of 1000."""
        spaced = np.linspace(0, timesteps - 1, steps + 1).round().astype(int)[:0:-1]
        return list(dict.fromkeys(spaced.tolist()))  # 1000 steps of 1000 round to 999

    def step(self, i: int, latent: Tensor, noise_pred: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        alphas, sigmas = self.levels.sqrt(), (1 - self.levels).sqrt()
        h = (alphas / sigmas).log().diff()  # steps in log signal-to-noise, the last one infinite
        clean = slope = self.predict_clean(i, latent, noise_pred)
        if 0 < i < len(self.timesteps) - 1:
            slope = clean + h[i] / (2 * h[i - 1]) * (clean - self.last_clean)
        self.last_clean = clean
        return sigmas[i + 1] / sigmas[i] * latent - alphas[i + 1] * torch.expm1(-h[i]) * slope


SAMPLERS = {"ddpm": DDPM, "ddim": DDIM, "dpm++": DPMPlusPlus}


# -------------------------------------------------------------------------------------------------- 8 checkpoints
# A file comes in as a dict of tensors over a memory map, whatever its kind: nothing is read until it is used, and
# nothing that a pickle names is run. Rules then turn the names of both dialects, CompVis's single file and diffusers'
# folder, into those of the classes above, and the shapes say which Config they belong to.

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PICKLE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
OWN_MARK = "sd.py"  # the metadata key under which our own files carry their Config
ZIP_MAGIC, PICKLE_MAGIC, LEGACY_MAGIC = b"PK\3\4", b"\x80", 0x1950A86A20F9469CFC6C


def mapped(data: mmap.mmap, offset: int, dtype: torch.dtype, numel: int) -> Tensor:
    """(numel,) over the bytes of the map from `offset` on; copied only where the file did not align them."""
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    if offset % dtype.itemsize:
        return torch.frombuffer(data, dtype=torch.uint8, count=numel * dtype.itemsize, offset=offset).clone().view(dtype)
    return torch.frombuffer(data, dtype=dtype, count=numel, offset=offset)


def read_safetensors(data: mmap.mmap) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata: 8 bytes of length, a JSON header, then every tensor's bytes without a gap."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if begin != end or min(shape, default=0) < 0 or stop - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} does not fit its place, bytes {begin} to {stop}")
        if start + stop > len(data):
            raise ValueError(f"{name} ends at byte {start + stop} and the file at byte {len(data)}")
        tensors[name] = mapped(data, start + begin, dtype, math.prod(shape)).view(shape)
        end = stop
    if start + end != len(data):
        raise ValueError(f"its tensors end at byte {start + end} and the file at byte {len(data)}")
    return tensors, metadata


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes what `read_safetensors` reads, atomically."""
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # aligns the tensors
    with written_whole(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


@contextmanager
def written_whole(path: Path) -> Iterator:
    """A binary file to write, which appears at `path` when it is complete and on disk, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Foreign:
    """Stands for whatever else a pickle names, such as a training loop's callbacks: takes anything, does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def ignore(self, *args):
        pass

    __setstate__ = __setitem__ = append = extend = add = ignore


class TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors in plain containers. Nothing that the file names is imported, and of it nothing is called."""

    def __init__(self, file, storage: Callable[[str, torch.dtype, int], Tensor] | None = None):
        super().__init__(file, encoding="latin-1")
        self.storage = storage  # (key, dtype, numel) -> the flat tensor (numel,) of which the file's tensors are views

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: storage.as_strided(shape, stride, offset)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in PICKLE_DTYPES:
            return PICKLE_DTYPES[name]
        return type(name, (Foreign,), {"__module__": module})

    def persistent_load(self, pid: tuple) -> Tensor:
        _, dtype, key, _, numel = pid[:5]
        return self.storage(key, dtype, numel)


def read_pickle(path: Path, data: mmap.mmap):
    """The object in a .ckpt or .bin of either of PyTorch's formats: a zip or, up to version 1.5, pickles in a row."""
    if data[:4] == ZIP_MAGIC:
        archive = zipfile.ZipFile(path)
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}

        def storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
            record = records[f"data/{key}"]
            if record.compress_type != zipfile.ZIP_STORED or record.file_size < numel * dtype.itemsize:
                raise ValueError(f"storage {key} does not hold {numel} numbers, uncompressed")
            name_length, extra_length = struct.unpack_from("<HH", data, record.header_offset + 26)
            return mapped(data, record.header_offset + 30 + name_length + extra_length, dtype, numel)

        with archive, archive.open(records["data.pkl"]) as file:
            return TensorUnpickler(file, storage).load()

    # Four pickles: a magic number, a version, the writer's machine, the object; then the keys of the object's storages
    # and, for each, its length and its bytes. How long a storage is stands in the object only, so that is read twice.
    if TensorUnpickler(data).load() != LEGACY_MAGIC:
        raise ValueError("it is a pickle, but not one of PyTorch's")
    TensorUnpickler(data).load()
    TensorUnpickler(data).load()
    start, sizes, offsets = data.tell(), {}, {}

    def measure(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        sizes[key] = numel * dtype.itemsize
        return torch.empty(numel, dtype=dtype, device="meta")

    TensorUnpickler(data, measure).load()
    for key in TensorUnpickler(data).load():
        offsets[key] = data.tell() + 8
        data.seek(offsets[key] + sizes[key])
    data.seek(start)
    return TensorUnpickler(data, lambda key, dtype, numel: mapped(data, offsets[key], dtype, numel)).load()


def read_file(path: Path) -> tuple[dict, dict[str, str]]:
    """The tensors in a file, by its own names, and its metadata; what kind of file it is, its content decides.

    Raises OSError for a file that cannot be opened, ValueError for one that is no checkpoint or a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder; name a checkpoint, or see weights/README.md for one")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty; download it again")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: what is written to it stays in memory
    if data[:23] == b"version https://git-lfs":
        raise ValueError("this is a Git LFS pointer, not the checkpoint; get that with `git lfs pull`")
    if data[:256].lstrip()[:1] == b"<":
        raise ValueError("this is a web page, not a checkpoint; download the file that the page links to")
    try:
        if data[8:9] == b"{":
            return read_safetensors(data)
        if data[:4] != ZIP_MAGIC and data[:1] != PICKLE_MAGIC:
            raise ValueError("it starts like no kind of checkpoint")
        content = read_pickle(path, data)
        content = content.get("state_dict", content)
        return {name: value for name, value in content.items() if isinstance(name, str)}, {}
    except Exception as error:  # a damaged pickle can fail in every way there is
        raise ValueError(f"not a checkpoint, or a damaged one ({first_line(error)}); download it again") from error


def read_folder(path: Path) -> tuple[dict, dict]:
    """The tensors in a diffusers folder, and what its config.json files say that shapes do not, as fields of Config."""
    tensors, settings = {}, {}
    for part in ("text_encoder", "vae", "unet"):
        stems = ("diffusion_pytorch_model", "model", "pytorch_model")
        names = [stem + variant for variant in ("", ".fp16") for stem in stems]
        files = [path / part / (name + suffix) for suffix in (".safetensors", ".bin") for name in names]
        file = next(filter(Path.is_file, files), None)
        if file is None:
            raise ValueError(f"{part}/ holds no weights; name a whole diffusers folder, or a checkpoint file")
        tensors |= {f"{part}.{name}": value for name, value in read_file(file)[0].items()}
        try:
            settings[part] = json.loads((path / part / "config.json").read_text())
        except FileNotFoundError:
            settings[part] = {}
        except ValueError as error:
            raise ValueError(f"{part}/config.json is not JSON ({error}); download it again") from error
    fields = {
        "text_heads": settings["text_encoder"].get("num_attention_heads"),
        "latent_scale": settings["vae"].get("scaling_factor"),
        "norm_groups": settings["unet"].get("norm_num_groups"),
        "unet_heads": settings["unet"].get("attention_head_dim"),  # diffusers' name for the number of heads
    }
    return tensors, {field: value for field, value in fields.items() if value is not None}


# Both dialects' names become ours by these, in this order: (a pattern, what takes its place).
RULES = [
    # the three models
    (r"^model\.diffusion_model\.", "unet."),
    (r"^first_stage_model\.", "vae."),
    (r"^cond_stage_model\.transformer\.", "text_encoder."),
    # the text encoder, alike in both
    (r"^text_encoder\.(text_model\.)?((embeddings|encoder)\.)?", "text_encoder."),
    (r"\.final_layer_norm\.", ".norm."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.", ".attention."),
    (r"\.([qkv]|out)_proj\.", r".\1."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.2."),
    # where the blocks of the U-Net stand: CompVis counts them through, diffusers level by level
    (r"^unet\.input_blocks\.0\.0\.", "unet.conv_in."),
    (r"^unet\.(input|output)_blocks\.(\d+)\.(\d)\.(op\.|conv\.)?", lambda match: compvis_place(*match.groups())),
    (r"^unet\.middle_block\.0\.", "unet.middle.0.residual."),
    (r"^unet\.middle_block\.1\.", "unet.middle.0.transformer."),
    (r"^unet\.middle_block\.2\.", "unet.middle.1.residual."),
    (r"^unet\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r"unet.\1.\2.blocks.\3.residual."),
    (r"^unet\.(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r"unet.\1.\2.blocks.\3.transformer."),
    (r"^unet\.down_blocks\.(\d+)\.downsamplers\.0\.conv\.", r"unet.down.\1.resample."),
    (r"^unet\.up_blocks\.(\d+)\.upsamplers\.0\.", r"unet.up.\1.resample."),
    (r"^unet\.mid_block\.resnets\.([01])\.", r"unet.middle.\1.residual."),
    (r"^unet\.mid_block\.attentions\.0\.", "unet.middle.0.transformer."),
    (r"^unet\.(time_embed\.0|time_embedding\.linear_1)\.", "unet.time_mlp.0."),
    (r"^unet\.(time_embed\.2|time_embedding\.linear_2)\.", "unet.time_mlp.2."),
    (r"^unet\.out\.0\.", "unet.norm_out."),
    (r"^unet\.out\.2\.", "unet.conv_out."),
    # where those of the autoencoder stand: CompVis numbers the decoder's levels from the picture's size down
    (r"^vae\.(post_)?quant_conv\.", r"vae.\1quant."),
    (r"^vae\.decoder\.up\.(\d+)\.", lambda match: f"vae.decoder.up.{len(Config.vae_widths) - 1 - int(match[1])}."),
    (r"^vae\.(encoder\.down|decoder\.up)(?:_blocks)?\.(\d+)\.(?:block|resnets)\.", r"vae.\1.\2.blocks."),
    (r"^vae\.encoder\.down(?:_blocks)?\.(\d+)\.(?:downsample|downsamplers\.0)\.conv\.", r"vae.encoder.down.\1.resample.1."),
    (r"^vae\.decoder\.up(?:_blocks)?\.(\d+)\.(?:upsample|upsamplers\.0)\.", r"vae.decoder.up.\1.resample."),
    (r"^vae\.(en|de)coder\.(mid\.block_1|mid_block\.resnets\.0)\.", r"vae.\1coder.middle.0."),
    (r"^vae\.(en|de)coder\.(mid\.attn_1|mid_block\.attentions\.0)\.", r"vae.\1coder.middle.1.attention."),
    (r"^vae\.(en|de)coder\.(mid\.block_2|mid_block\.resnets\.1)\.", r"vae.\1coder.middle.2."),
    (r"\.conv_norm_out\.", ".norm_out."),
    # inside a block
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.(emb_layers\.1|time_emb_proj)\.", ".time."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.(nin_shortcut|conv_shortcut|skip_connection)\.", ".shortcut."),
    (r"\.transformer_blocks\.0\.", "."),
    (r"\.attn1\.", ".self_attention."),
    (r"\.attn2\.", ".cross_attention."),
    (r"\.ff\.net\.0\.", ".mlp.0."),
    (r"\.ff\.net\.2\.", ".mlp.1."),
    (r"attention\.(?:to_)?([qkv])(?:uery|ey|alue)?\.", r"attention.\1."),
    (r"attention\.(to_out\.0|proj_attn|proj_out)\.", "attention.out."),
    (r"\.attention\.(group_)?norm\.", ".norm."),
]

# Known and not needed: schedules, which have no dot in their names, averaged weights and what served training.
UNNEEDED = r"^\w+$|^model_ema\.|^first_stage_model\.loss\.|\bposition_ids$"

# What else people have under the same endings: (what it is, how its tensors are named).
FAMILIES = [
    ("a LoRA", r"lora[_.]|\.alpha$"),
    ("a ControlNet", r"^control_model\.|^controlnet_"),
    ("Stable Diffusion XL", r"^conditioner\.|^text_encoder_2\."),
    ("Stable Diffusion 2", r"^cond_stage_model\.model\."),
    ("Stable Diffusion 3", r"joint_blocks\."),
    ("FLUX", r"double_blocks\."),
    ("a textual inversion", r"^string_to_param|^emb_params"),
]
CONTEXT_FAMILIES = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}  # by the width of the text they look at
INPUT_FAMILIES = {9: "an inpainting UNet (9 input channels)", 8: "an InstructPix2Pix UNet", 5: "a depth UNet"}


def compvis_place(way: str, number: str, part: str, resample: str | None) -> str:
    """Our name for the U-Net's input_blocks.{number}.{part}, where 0 is the first convolution, or output_blocks'."""
    level, block = divmod(int(number) - (way == "input"), Config.unet_blocks + 1)
    if resample:
        return f"unet.down.{level}.resample." if way == "input" else f"unet.up.{level}.resample.conv."
    return f"unet.{'down' if way == 'input' else 'up'}.{level}.blocks.{block}.{'transformer' if int(part) else 'residual'}."


def rename(name: str) -> str:
    """Our name for a tensor that either dialect names `name`."""
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def other_family(shapes: dict[str, torch.Size]) -> str | None:
    """What the tensors of such names and shapes belong to, if that is known and is not Stable Diffusion v1."""
    for family, pattern in FAMILIES:
        if any(re.search(pattern, name) for name in shapes):
            return family
    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight") and shape[-1] in CONTEXT_FAMILIES:
            return CONTEXT_FAMILIES[shape[-1]]
        if re.search(r"(input_blocks\.0\.0|unet\.conv_in)\.weight$", name) and shape[1] in INPUT_FAMILIES:
            return INPUT_FAMILIES[shape[1]]
    if not any(re.match(r"model\.diffusion_model\.|unet\.", name) for name in shapes):
        return "a VAE alone" if any(re.search(r"\b(en|de)coder\.conv_in\.", name) for name in shapes) else "something else"
    return None


def infer_config(shapes: dict[str, torch.Size]) -> Config:
    """The Config of tensors of these (our) names. What shapes cannot tell is Stable Diffusion v1's, for text a head's size.

    A size is the commonest among the tensors that have it, so that one bad tensor is reported and not believed.
    """

    def size(pattern: str, default: int) -> int:
        return statistics.mode([shape[0] for name, shape in shapes.items() if re.match(pattern, name) and shape] or [default])

    def number(pattern: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    vae_levels, unet_levels = number(r"vae\.encoder\.down\.(\d+)\.blocks"), number(r"unet\.down\.(\d+)\.blocks")
    block = r"blocks\.\d+\.(residual\.)?(conv\d|norm2)\."
    text_width = size(r"text_encoder\.layers\.\d+\.norm", Config.text_width)
    return Config(
        vocab_size=size(r"text_encoder\.token_embedding", Config.vocab_size),
        text_length=size(r"text_encoder\.position_embedding", Config.text_length),
        text_width=text_width,
        text_layers=number(r"text_encoder\.layers\.(\d+)") or Config.text_layers,
        text_heads=max(1, text_width // (Config.text_width // Config.text_heads)),
        latent_channels=size(r"vae\.post_quant|unet\.conv_out", Config.latent_channels),
        vae_widths=tuple(size(rf"vae\.encoder\.down\.{i}\.{block}", 0) for i in range(vae_levels)) or Config.vae_widths,
        vae_blocks=number(r"vae\.encoder\.down\.\d+\.blocks\.(\d+)") or Config.vae_blocks,
        unet_widths=tuple(size(rf"unet\.down\.{i}\.{block}", 0) for i in range(unet_levels)),
        unet_attends=tuple(number(rf"unet\.down\.{i}\.blocks\.(\d+)\.transformer") > 0 for i in range(unet_levels)),
        unet_blocks=number(r"unet\.down\.\d+\.blocks\.(\d+)"),
    )


class WithoutNumbers(TorchFunctionMode):
    """Modules built inside get shapes but no initial weights: drawing them, even on meta, takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def first_few(items: list[str]) -> str:
    """The first three and how many more."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def fit(tensors: dict, model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of `model` out of `tensors`, which loses what is used: a q, k and v that ours has as one are joined,
    a 1x1 convolution becomes a linear layer or the other way round; what is right as it is stays as it is, unread.

    Raises ValueError where a tensor is missing, has another shape or is none, or is not finite.
    """
    state, wrong = {}, []
    for name, target in model.state_dict().items():
        owner, layer, kind = name.rsplit(".", 2)
        joined = layer in ("qkv", "kv") and name not in tensors
        sources = [f"{owner}.{letter}.{kind}" for letter in layer] if joined else [name]
        shape = torch.Size([target.shape[0] // len(sources), *target.shape[1:]])
        parts = [tensors.pop(source, None) for source in sources]
        for i, (source, part) in enumerate(zip(sources, parts)):
            if part is None:
                wrong.append(f"{source} is missing")
            elif not isinstance(part, Tensor):
                wrong.append(f"{source} is no tensor but {type(part).__module__}.{type(part).__qualname__}")
            elif part.shape[:2] != shape[:2] or part.numel() != shape.numel():
                wrong.append(f"{source} has shape {tuple(part.shape)} and not {tuple(shape)}")
            else:
                parts[i] = part.reshape(shape).to(device, dtype)
        if not wrong:
            state[name] = torch.cat(parts) if joined else parts[0]
    if wrong:
        raise ValueError(f"{first_few(wrong)}; use a complete Stable Diffusion v1 checkpoint")
    # A sum shows NaN and infinity in one pass and no memory.
    exact = torch.promote_types(dtype, torch.float32)
    wrong = [name for name, tensor in state.items() if not tensor.sum(dtype=exact).isfinite()]
    if wrong:
        raise ValueError(f"NaN or infinite weights in {first_few(wrong)}; download it again, or try another dtype")
    return state


def read_model(path: Path) -> tuple[Config, dict]:
    """The Config of any checkpoint and its tensors by our names; raises as `StableDiffusion.load` does."""
    if path.is_dir():
        tensors, settings = read_folder(path)
    else:
        tensors, metadata = read_file(path)
        settings = {}
        if OWN_MARK in metadata:
            return Config.from_json(metadata[OWN_MARK]), tensors
    shapes = {name: value.shape for name, value in tensors.items() if isinstance(value, Tensor)}
    if family := other_family(shapes):
        raise ValueError(f"this is {family}; use a whole Stable Diffusion v1 checkpoint")
    tensors = {rename(name): value for name, value in tensors.items() if not re.search(UNNEEDED, name)}
    shapes = {name: value.shape for name, value in tensors.items() if isinstance(value, Tensor)}
    return replace(infer_config(shapes), **settings), tensors


# ---------------------------------------------------------------------------------------------------- 9 pipeline
# The story from a prompt to a picture: `generate` tells it.


def open_picture(source: str | Path | Image.Image) -> Image.Image:
    """A picture in RGB, upright, transparent parts white. Raises ValueError for a file that holds no single picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source)
            if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's MPO is one picture and its preview
                raise ValueError(f"it is animated, {image.n_frames} frames; save one of them as a picture")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would cut off at 255
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source}: no such picture") from error
    except Exception as error:  # a damaged picture, like a damaged pickle, can fail in every way
        raise ValueError(f"{source}: not a picture that can be used ({first_line(error)})") from error


def to_tensor(image: Image.Image) -> Tensor:
    """A picture of W by H -> (1, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> B pictures"""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


class StableDiffusion(nn.Module):
    """Tokenizer, text encoder, autoencoder and denoiser, and what they do together."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config.vocab_size, config.text_length)
        self.text_encoder = CLIPTextEncoder(config)
        self.vae = VAE(config)
        self.unet = UNet(config)
        self.offload_device: torch.device | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> "StableDiffusion":
        """A model from any SD v1 checkpoint: CompVis's .safetensors or .ckpt, a diffusers folder, or what `save` wrote.

        With `offload` each of the three models is on `device` only while it works. Weights that need no conversion stay
        in the file, mapped. Raises OSError or ValueError, with one line, for what is not such a checkpoint.
        """
        try:
            config, tensors = read_model(Path(path))
            with torch.device("meta"), WithoutNumbers():
                model = cls(config)
            model.load_state_dict(fit(tensors, model, "cpu" if offload else device, dtype), assign=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {first_line(error)}") from error
        if tensors:
            warnings.warn(f"{path}: {len(tensors)} tensors are not used: {first_few(list(tensors))}", stacklevel=2)
        model.offload_device = torch.device(device) if offload else None
        return model.eval()

    def save(self, path: str | Path) -> None:
        """Writes all weights under our own names, with the Config, as one .safetensors file, atomically."""
        metadata = {"format": "pt", OWN_MARK: json.dumps(asdict(self.config))}
        write_safetensors(Path(path), self.state_dict(), metadata)

    @property
    def device(self) -> torch.device:
        """Where the models work."""
        return self.offload_device or next(self.parameters()).device

    @contextmanager
    def working(self, model: nn.Module) -> Iterator[torch.dtype]:
        """`model` is on the device inside; yields its dtype. Offloaded weights are copied there and then dropped."""
        kept = [(parameter, parameter.data) for parameter in model.parameters()]
        for parameter, data in kept:
            parameter.data = data.to(self.device)
        try:
            yield kept[0][1].dtype
        finally:
            if self.offload_device:
                for parameter, data in kept:
                    parameter.data = data

    def embed(self, texts: list[str]) -> Tensor:
        """B texts -> context (B, T, text_width). Warns of the words that do not fit."""
        for text in dict.fromkeys(texts):
            if words := self.tokenizer.dropped(text):
                room = self.config.text_length - 2
                warnings.warn(f"the prompt is longer than {room} tokens; dropped: {' '.join(words)}", stacklevel=3)
        ids = torch.tensor([self.tokenizer(text) for text in texts], device=self.device)  # (B, T)
        with self.working(self.text_encoder):
            return self.text_encoder(ids)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> its latent (B, C, h, w), scaled: the mean, or with `noise` (B, C, h, w) a sample."""
        mean, logvar = self.in_finite_dtype(lambda x: torch.cat(self.vae.encode(x), dim=1), image).chunk(2, dim=1)
        if noise is not None:
            mean = mean + (0.5 * logvar).exp() * noise
        return mean * self.config.latent_scale

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w), scaled -> (B, 3, H, W), about [-1, 1]"""
        latents = (latent / self.config.latent_scale).split(1)  # one by one: this is where memory peaks
        return torch.cat([self.in_finite_dtype(self.vae.decode, latent) for latent in latents])

    def in_finite_dtype(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`work`, of the VAE, on `x`; the VAE goes to float32 for good where it overflows, as SD's can in fp16."""
        with self.working(self.vae) as dtype:
            result = work(x.to(self.device, dtype))
            if not result.isfinite().all():
                self.vae.float()
                result = work(x.to(self.device, torch.float32))
        return result.float()

    def predict_noise(self, latent: Tensor, t: int, context: Tensor, guidance: float) -> Tensor:
        """(B, C, h, w), context (B, T, D) -> (B, C, h, w). With guidance, away from what an empty or negative prompt, in
        the first half of a context (2B, T, D), would make (Ho and Salimans 2022, eq. 6, arXiv:2207.12598)."""
        batch = len(context)
        noise_pred = self.unet(
            latent.to(context.dtype).repeat(batch // len(latent), 1, 1, 1),
            torch.full((batch,), t, device=latent.device),
            context,
        ).float()
        if batch == len(latent):
            return noise_pred
        unconditional, conditional = noise_pred.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def check(
        self, *, prompts=1, steps=50, guidance=7.5, sampler="ddpm", seed=0, n=1, width=None, height=None, image=None,
        strength=0.8, mask=None,
    ) -> tuple[int, int]:  # fmt: skip
        """The width and height that `generate` would draw with these arguments; ValueError where it would not."""
        unit, timesteps = self.config.downscale, self.config.timesteps
        sizes = image.size if image else (self.config.image_size, self.config.image_size)
        width, height = (size // unit * unit if given is None else given for given, size in zip((width, height), sizes))
        rules = [
            ("steps", steps, 1 <= steps <= timesteps, f"from 1 to {timesteps}"),
            ("guidance", guidance, math.isfinite(guidance), "a finite number, 1 for none"),
            ("sampler", sampler, sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
            ("n", n, n >= 1, "1 or more"),
            ("seed", seed, seed >= 0 and seed + prompts * n <= 2**64, f"from 0 to {2**64 - prompts * n}"),
            ("width", width, width >= unit and width % unit == 0, f"a multiple of {unit}, {unit} or more"),
            ("height", height, height >= unit and height % unit == 0, f"a multiple of {unit}, {unit} or more"),
            ("strength", strength, 0 < strength <= 1, "over 0 and at most 1"),
            ("mask", "given", mask is None or image is not None, "used with an image only"),
        ]
        for name, value, holds, wanted in rules:
            if not holds:
                raise ValueError(f"{name} is {value} and must be {wanted}")
        if mask and mask.size != image.size:
            raise ValueError("mask is {}x{} and its image {}x{}; make them the same size".format(*mask.size, *image.size))
        return width, height

    @torch.no_grad()
    def generate(
        self,
        prompt: str | list[str],
        negative: str = "",
        *,
        steps: int = 50,
        guidance: float = 7.5,
        sampler: str = "ddpm",
        seed: int | None = None,
        n: int = 1,
        width: int | None = None,
        height: int | None = None,
        image: str | Path | Image.Image | None = None,
        strength: float = 0.8,
        mask: str | Path | Image.Image | None = None,
        progress: bool = True,
    ) -> list[Image.Image]:
        """Draws `n` pictures of each prompt; picture i is that of `seed + i`, whatever is drawn beside it.

        steps: 1 to 1000 of the sampler "ddpm", "ddim" or "dpm++"; guidance: how far to follow the prompt, 1 for without
        `negative`; width, height: in pixels, multiples of 8, by default the image's or the Config's. With an image, that
        is changed, by `strength` in (0, 1]; with a mask of its size, only where the mask is white.
        Raises ValueError where an argument is out of range, an image cannot be used or a result is not finite.
        """
        prompts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(n)]
        image, mask = (source if source is None else open_picture(source) for source in (image, mask))
        seed = random.randrange(2**32) if seed is None else seed
        width, height = self.check(
            prompts=len(prompts) // n, steps=steps, guidance=guidance, sampler=sampler, seed=seed, n=n, width=width, height=height, image=image,
            strength=strength, mask=mask,
        )  # fmt: skip

        unit = self.config.downscale
        shape = (self.config.latent_channels, height // unit, width // unit)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]

        def draw() -> Tensor:
            noise = [torch.randn(shape, generator=generator) for generator in generators]
            return torch.stack(noise).to(self.device)  # (B, C, h, w), the same on every device

        texts = prompts if guidance == 1 else [negative] * len(prompts) + prompts
        context = self.embed(texts)  # (B or 2B, T, D)

        process = SAMPLERS[sampler](self.config, steps, strength if image else 1.0)
        if image:
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
            original = self.encode(to_tensor(image), draw())  # (B, C, h, w)
            noise = draw()
            latent = add_noise(original, noise, process.levels[0])
        else:
            latent = draw()
        if mask:
            mask = ImageOps.fit(mask.convert("L"), (width, height), Image.Resampling.LANCZOS)
            redraw = F.max_pool2d(torch.from_numpy(np.array(mask))[None, None].float(), unit) >= 128  # (1, 1, h, w)
            redraw = redraw.to(self.device)

        with self.working(self.unet):
            for i, t in enumerate(tqdm(process.timesteps, disable=None if progress else True)):  # None: if no terminal
                if mask:
                    latent = torch.where(redraw, latent, add_noise(original, noise, process.levels[i]))
                noise_pred = self.predict_noise(latent, t, context, guidance)
                latent = process.step(i, latent, noise_pred, draw)
        if mask:
            latent = torch.where(redraw, latent, original)

        images = self.decode(latent)  # (B, 3, H, W)
        if not images.isfinite().all():
            raise ValueError(f"the picture is not finite in {context.dtype}; use bf16 or fp32, or other weights")
        pictures = to_pictures(images)
        return [Image.composite(picture, image, mask) for picture in pictures] if mask else pictures


# ------------------------------------------------------------------------------------------------ 11 command line

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEBUI_SAMPLERS = {"ddpm": "DDPM", "ddim": "DDIM", "dpm++": "DPM++ 2M"}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}; see python {self.prog} --help\n")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="sd.py", usage="python sd.py --prompt TEXT [options]", allow_abbrev=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20, width=90))
    add = parser.add_argument
    add("--prompt", metavar="TEXT", required=True, help="what to draw")
    add("--negative", metavar="TEXT", default="", help="what to keep out of it")
    add("--weights", metavar="PATH", type=Path, default=DEFAULT_WEIGHTS, help="a checkpoint or diffusers folder (weights/emoji.safetensors)")
    add("--out", metavar="FILE", type=Path, default="out.png", help="a PNG; never overwrites: out.png, out-1.png, ... (out.png)")
    add("--steps", metavar="N", type=int, default=50, help="denoising steps, 1 to 1000 (50)")
    add("--guidance", metavar="G", type=float, default=7.5, help="how closely to follow the prompt; 1: unguided (7.5)")
    add("--sampler", choices=SAMPLERS, default="ddpm", help="ddpm, ddim or dpm++, good from 20 steps (ddpm)")
    add("--seed", metavar="N", type=int, help="makes a picture repeatable; picture i uses seed + i (random)")
    add("--n", metavar="N", type=int, default=1, help="how many pictures (1)")
    add("--width", metavar="W", type=int, help="in pixels, a multiple of 8 (the image's, or 512)")
    add("--height", metavar="H", type=int, help="the same")
    add("--image", metavar="FILE", type=Path, help="a picture to start from")
    add("--strength", metavar="S", type=float, help="how much to change it, over 0 to 1 (0.8)")
    add("--mask", metavar="FILE", type=Path, help="redraw only where this picture is white")
    add("--device", metavar="D", help="cpu, cuda, cuda:1, mps (the fastest there is)")
    add("--dtype", choices=DTYPES, help="fp32, fp16 or bf16 (fp32 on a CPU, else fp16)")
    add("--offload", action="store_true", help="keep each model on the device only while it works")
    add("--compile", action="store_true", help="compile the denoiser: slow start, faster steps")
    return parser.parse_args(arguments)


def pick_device(name: str | None) -> torch.device:
    """The device named, or the fastest there is; ValueError where it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # each backend has its own kind
        raise ValueError(f"device {name} is not there ({first_line(error)}); use --device cpu") from error
    return torch.device(name)


def check_out(path: Path) -> None:
    """OSError or ValueError, before any work is done, where no picture could be saved."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"out is {path} and must end in .png")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"out is {path}, but {path.parent} cannot be written to ({error.strerror}); name another place") from error


def save_picture(picture: Image.Image, path: Path, parameters: str) -> Path:
    """Saves a PNG as out.png, out-1.png, ..., the first name that is free, with `parameters` inside; returns that name."""
    for i in count():
        free = path.with_stem(f"{path.stem}-{i}") if i else path
        try:
            free.touch(exist_ok=False)  # claims the name
            break
        except FileExistsError:
            continue
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters)
    try:
        with written_whole(free) as file:
            picture.save(file, "png", pnginfo=info)
    except BaseException:
        free.unlink()
        raise
    return free


def draw(args: argparse.Namespace) -> None:
    """Does what the command line asks for."""
    device = pick_device(args.device)
    dtype = args.dtype or ("fp32" if device.type == "cpu" else "fp16")
    check_out(args.out)
    if args.strength is not None and args.image is None:
        raise ValueError("strength is given and must be used with an image only")
    settings = {
        "steps": args.steps, "guidance": args.guidance, "sampler": args.sampler,
        "seed": random.randrange(2**32) if args.seed is None else args.seed,
        "image": args.image and open_picture(args.image), "mask": args.mask and open_picture(args.mask),
        "strength": 0.8 if args.strength is None else args.strength,
    }  # fmt: skip
    model = StableDiffusion.load(args.weights, device, DTYPES[dtype], args.offload)
    width, height = model.check(n=args.n, width=args.width, height=args.height, **settings)
    settings |= {"width": width, "height": height}
    if args.compile:
        model.unet.compile()
    about = f"{args.steps} steps of {args.sampler}, guidance {args.guidance:g}, seed {settings['seed']}"
    print(f"sd.py: {args.weights.name} on {device} in {dtype}, {width}x{height}, {about}", file=sys.stderr)

    first_seed = settings.pop("seed")
    for seed in range(first_seed, first_seed + args.n):  # one by one, so that what is done is saved
        [picture] = model.generate(args.prompt, args.negative, seed=seed, **settings)
        parameters = args.prompt + (f"\nNegative prompt: {args.negative}" if args.negative else "")
        parameters += f"\nSteps: {args.steps}, Sampler: {WEBUI_SAMPLERS[args.sampler]}, CFG scale: {args.guidance:g}, "
        parameters += f"Seed: {seed}, Size: {width}x{height}, Model: {args.weights.stem}"
        parameters += f", Denoising strength: {settings['strength']:g}" if args.image else ""
        print(save_picture(picture, args.out, parameters))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    args = parse_arguments(arguments)
    warnings.showwarning = lambda message, *_: print(f"sd.py: note: {message}", file=sys.stderr)
    try:
        draw(args)
    except (OSError, ValueError) as error:
        print(f"sd.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
