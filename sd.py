"""Stable Diffusion v1 in one file, to be read from top to bottom.

    python sd.py --prompt "a photograph of an astronaut riding a horse" --weights v1-5-pruned-emaonly.ckpt

The tokenizer (section 2) turns the prompt into ids, and the text encoder (4) turns these into a context. In
latents, which are an eighth of an image's size and begin as noise, the UNet (6) predicts the noise, and a
sampler (7) removes a part of it at each step. The autoencoder (5) decodes the result; (8) connects all.
Sections 1 to 8 are the complete method; 9 and 10 make it a tool.
Shapes have B for batch, T and S tokens, D and d dimensions, C channels, H W pixels, h w sizes of latents.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752
Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239
"""

import argparse
import ctypes
import json
import logging
import math
import mmap
import os
import pickletools
import re
import sys
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from numbers import Integral, Real
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO, NamedTuple

if __name__ == "__main__":  # before PyTorch is imported, which takes a second and reads the environment
    sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)
    if "OMP_WAIT_POLICY" not in os.environ:  # long spins of waiting threads stall all where a core is busy
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor, nn
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
DEFAULT_WEIGHTS = HERE / "weights" / "emoji.safetensors"
OUT_OF_MEMORY = re.compile(r"allocate (memory|\d)|bad_alloc")  # in the messages of PyTorch's RuntimeErrors


# -------------------------------------------------------------------------------------------- 1 configuration
# Every size in this file comes from here, so a smaller model is the same code with another Config.


def check(name: str, value: object, right: object, wanted: str) -> None:
    """Raises ValueError, as in "steps is 0 and must be from 1 to 1000", unless `right`."""
    if not right:
        raise ValueError(f"{name} is {' '.join(str(value)[:99].split())} and must be {wanted}")


@dataclass(frozen=True)
class Config:
    """The sizes of a model; by default those of Stable Diffusion v1 (CompVis, v1-inference.yaml)."""

    image_size: int = 512  # default height and width of an image, in pixels
    vocab_size: int = 49408
    vocabulary: tuple[str, ...] = ()  # BERT's tokens, in the order of their ids, for BERT in CLIP's place
    text_length: int = 77  # tokens, including start and end
    text_dim: int = 768
    text_layers: int = 12
    text_heads: int = 12
    latent_channels: int = 4
    latent_scale: float = 0.18215  # scales latents to unit variance (Rombach et al. 2022, app. G)
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)  # at each level, starting with the image's own size
    vae_blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more
    unet_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    unet_attention: tuple[bool, ...] = (True, True, True, False)  # which levels have transformers
    unet_blocks: int = 2  # residual blocks per level on the way down; one more on the way up
    unet_heads: int = 8
    norm_groups: int = 32
    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: str = "epsilon"  # what the UNet predicts: epsilon (the noise) or v_prediction

    def __post_init__(self) -> None:
        for field in fields(self):
            name, default, value = field.name, getattr(Config, field.name), getattr(self, field.name)
            value = tuple(value) if isinstance(value, list) else value  # JSON has lists for tuples
            object.__setattr__(self, name, value)
            if name not in ("vocabulary", "prediction"):
                numbers, one = (value, default[0]) if isinstance(default, tuple) else ((value,), default)
                kinds = (int, float) if isinstance(one, float) else (type(one),)
                most = 32 if name.endswith(("_layers", "_blocks")) else 2**20
                right = isinstance(numbers, tuple) and 0 < len(numbers) < 9
                right = right and all(type(n) in kinds and (n is False or 0 < n <= most) for n in numbers)
                check(name, value, right, f"{kinds[-1].__name__} in (0, {most}]")
        heads, groups, words = self.unet_heads, self.norm_groups, self.vocabulary
        check("vocabulary", words, isinstance(words, tuple) and {*map(type, words)} <= {str}, "of strings")
        check("vocab_size", self.vocab_size, words or self.vocab_size >= 514, "514 or more")
        check("text_length", self.text_length, self.text_length >= 2, "2 or more")
        check("text_heads", self.text_heads, self.text_dim % self.text_heads == 0, "a divisor of text_dim")
        check("unet_channels", self.unet_channels, self.unet_channels[0] % 2 == 0, "even at the first level")
        levels = len(self.unet_channels)
        check("unet_attention", self.unet_attention, len(self.unet_attention) == levels, f"{levels} values")
        start, end, limit = self.beta_start, self.beta_end, min(0.5, 20 / self.timesteps)
        check("beta_end", end, 1e-9 <= start <= end <= limit, f"from beta_start to {limit}")
        right = self.prediction in ("epsilon", "v_prediction")
        check("prediction", self.prediction, right, "epsilon or v_prediction")
        channels = self.unet_channels + self.vae_channels
        check("unet_heads", heads, math.gcd(*self.unet_channels) % heads == 0, "a divisor of unet_channels")
        check("norm_groups", groups, math.gcd(*channels) % groups == 0, f"a divisor of {channels}")

    @property
    def downscale(self) -> int:
        """The height of an image divided by the height of its latents."""
        return 2 ** (len(self.vae_channels) - 1)


# ------------------------------------------------------------------------------------------------ 2 tokenizer
# Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) as in OpenAI's CLIP: text is split into words,
# words into bytes, and bytes are merged into the tokens that were frequent in CLIP's training data.

# A byte is written as one character: a printable one as itself, the others from U+0100 on. </w> ends a word.
PRINTABLE = [byte for byte in range(256) if byte > ord(" ") and chr(byte).isprintable()]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_SYMBOLS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = re.compile(f"({re.escape(START)}|{re.escape(END)})")
WORD = regex.compile(rf"{SPECIAL.pattern}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+")


class Tokenizer:
    """CLIP's tokenizer. A `vocab_size` below CLIP's 49,408 uses the first, most frequent merges only."""

    def __init__(self, vocab_size: int = Config.vocab_size, length: int = Config.text_length):
        self.length = length
        symbols = [symbol + end for end in ("", "</w>") for symbol in BYTE_SYMBOLS.values()]
        merges = (HERE / "tokenizer_vocab" / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split()) for line in merges[: max(0, vocab_size - len(symbols) - 2)]]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.ids = {token: id for id, token in enumerate([*symbols, *map("".join, pairs), START, END])}
        self.start, self.end, self.pad = self.ids[START], self.ids[END], self.ids[END]

    def __call__(self, text: str) -> list[int]:
        """`text` as `length` ids: start, at most `length - 2` tokens, end, padding."""
        ids = [id for _, word_ids in self.words(text) for id in word_ids][: self.length - 2]
        return [self.start, *ids, self.end] + [self.pad] * (self.length - 2 - len(ids))

    def dropped(self, text: str) -> list[str]:
        """The words of `text` that do not fit, or not entirely, into `length` ids."""
        words = list(self.words(text))
        ends = accumulate(len(ids) for _, ids in words)
        return [word for (word, _), end in zip(words, ends) if end > self.length - 2]

    def words(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """The normalized words of `text` with their ids; a special token is a word."""
        for part in SPECIAL.split(text):
            if part in (START, END):
                yield part, [self.ids[part]]
                continue
            part = "".join(map(str.lower, unicodedata.normalize("NFC", part)))  # by letter: no final sigma
            for match in WORD.finditer(part):
                # <|ENDOFTEXT|>, in lower case by now, is not special but three words.
                for word in ("<|", match[1][2:-2], "|>") if match[1] else (match[0],):
                    yield word, [self.ids[token] for token in self.tokens(word)]

    def tokens(self, word: str) -> list[str]:
        """The bytes of `word`, merged pair by pair, always the pair of the lowest rank."""
        tokens = [BYTE_SYMBOLS[byte] for byte in word.encode("utf-8", errors="replace")]
        tokens[-1] += "</w>"
        while len(tokens) > 1:
            pair = min(pairwise(tokens), key=lambda pair: self.ranks.get(pair, math.inf))
            if pair not in self.ranks:
                break
            merged: list[str] = []
            for token in tokens:
                if merged and (merged[-1], token) == pair:
                    merged[-1] += token
                else:
                    merged.append(token)
            tokens = merged
        return tokens


# ------------------------------------------------------------------------------------------ 3 building blocks
# Modules that several of the three models share. Text is (B, T, D), images and latents are (B, C, H, W).

CPU = getattr(torch.cpu, "get_capabilities", dict[str, Any])()
HAS_AMX = CPU.get("amx_bf16")  # matrix products
# In fp32, PyTorch calls MKL, which takes twice oneDNN's time on AMD's processors; no public API chooses.
USE_ONEDNN = "AMD" in CPU.get("cpu_name", "") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """nn.Linear, by oneDNN where USE_ONEDNN says so: a step then takes 0.8 to 0.85 of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)"""
        fits = x.is_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled()
        if USE_ONEDNN and fits and not torch.compiler.is_compiling():  # the compiler cannot handle it
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


class Attention(nn.Module):
    """Multi-head self-attention or, to a context, cross-attention (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim, bias)
        self.k = Linear(context_dim or dim, dim, bias)
        self.v = Linear(context_dim or dim, dim, bias)
        self.out = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, D), (B, S, context_dim) -> (B, T, D); False in a mask, for (B, heads, T, S), hides"""
        context = x if context is None else context
        q, k, v = self.q(x), self.k(context), self.v(context)  # (B, T, D), (B, S, D), (B, S, D)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, T, d)
        if q.is_cpu and q.dtype == torch.bfloat16 and mask is None and (q.requires_grad or not HAS_AMX):
            # Without AMX, and for gradients, plain products of 128 queries take half the fused kernel's time.
            k, v = k.contiguous().transpose(2, 3) * q.shape[-1] ** -0.5, v.contiguous()  # k: (B, heads, d, S)
            x = torch.cat([(queries @ k).softmax(dim=-1) @ v for queries in q.split(128, dim=2)], dim=2)
        else:
            x = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, D)


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (He et al. 2015, arXiv:1512.03385); the UNet's take the timestep."""

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float = 1e-6, time_dim: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        if time_dim:
            self.time = Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and, in the UNet, (B, time_dim) -> (B, out_channels, H, W)"""
        residual = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            residual = residual + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(residual)))


class Upsample(nn.Module):
    """Nearest-neighbor interpolation and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size), by default twice the size"""
        return self.conv(F.interpolate(x, size, scale_factor=None if size else 2.0))


# --------------------------------------------------------------------------------------------- 4 text encoder
# CLIP ViT-L/14's text transformer (Radford et al. 2021, sec. 2.4, arXiv:2103.00020).


class TextLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, dim: int, heads: int, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = x + self.attention(self.norm1(x), mask=mask)
        hidden = self.fc1(self.norm2(x))  # (B, T, 4D)
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # quick GELU (arXiv:1606.08415, sec. 2)


class CLIPTextEncoder(nn.Module):
    """Turns token ids into the context for the UNet's cross-attention."""

    def __init__(self, config: Config):
        super().__init__()
        self.token_embedding = nn.Parameter(torch.zeros(config.vocab_size, config.text_dim))
        self.position_embedding = nn.Parameter(torch.zeros(config.text_length, config.text_dim))
        dim, heads = config.text_dim, config.text_heads
        self.layers = nn.ModuleList(TextLayer(dim, heads) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(config.text_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64, T at most text_length -> (B, T, text_dim), the last hidden state, normalized"""
        length = ids.shape[1]
        x = F.embedding(ids, self.token_embedding) + self.position_embedding[:length]  # (B, T, D)
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        for layer in self.layers:
            x = layer(x, causal)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------- 5 autoencoder
# A variational autoencoder (Kingma and Welling 2013, arXiv:1312.6114; Rombach et al. 2022, sec. 3.1).


class ImageAttention(Attention):
    """Single-head self-attention over all positions, with a residual connection."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) -> (B, C, H, W)"""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        return x + super().forward(tokens).transpose(1, 2).view_as(x)


def residual_blocks(n: int, channels: int, out_channels: int, groups: int) -> list[nn.Module]:
    """Residual blocks, of which the first changes the number of channels."""
    return [ResidualBlock(c, out_channels, groups) for c in [channels] + (n - 1) * [out_channels]]


class Encoder(nn.Sequential):
    """(B, 3, H, W) -> (B, 2 * latent_channels, h, w), through its modules in order"""

    def __init__(self, config: Config):
        super().__init__()
        channels, groups, last = config.vae_channels[0], config.norm_groups, len(config.vae_channels) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.Sequential()
        for i, out_channels in enumerate(config.vae_channels):
            layers = residual_blocks(config.vae_blocks, channels, out_channels, groups)
            channels = out_channels
            if i < last:  # padded on the right and at the bottom only
                layers += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)]
            self.down.append(nn.Sequential(*layers))
        before, after = residual_blocks(2, channels, channels, groups)
        self.middle = nn.Sequential(before, ImageAttention(channels, groups), after)
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.activation = nn.SiLU()
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)


class Decoder(nn.Sequential):
    """(B, latent_channels, h, w) -> (B, 3, H, W), through its modules in order"""

    def __init__(self, config: Config):
        super().__init__()
        channels, groups, last = config.vae_channels[-1], config.norm_groups, len(config.vae_channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        before, after = residual_blocks(2, channels, channels, groups)
        self.middle = nn.Sequential(before, ImageAttention(channels, groups), after)
        self.up = nn.Sequential()
        for i, out_channels in enumerate(reversed(config.vae_channels)):
            layers = residual_blocks(config.vae_blocks + 1, channels, out_channels, groups)
            channels = out_channels
            if i < last:
                layers.append(Upsample(channels))
            self.up.append(nn.Sequential(*layers))
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.activation = nn.SiLU()
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)


class VAE(nn.Module):
    """Encodes images in [-1, 1] as normal distributions over latents, and decodes latents."""

    def __init__(self, config: Config):
        super().__init__()
        self.encoder = Encoder(config)
        self.quant = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance, each (B, latent_channels, h, w), not scaled"""
        mean, logvar = self.quant(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, latent_channels, h, w), not scaled -> (B, 3, H, W), about [-1, 1]"""
        return self.decoder(self.post_quant(latents))


# ----------------------------------------------------------------------------------------------------- 6 UNet
# The denoiser: a U-Net (Ronneberger et al. 2015, arXiv:1505.04597) with cross-attention to the text
# (Rombach et al. 2022, sec. 3.3). On the way up, each block also takes one of the outputs of the way down.


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) timesteps -> (B, dim): cosines and sines of falling frequencies (Vaswani et al. 2017, sec. 3.5)"""
    steps = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * steps / (dim // 2))  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SpatialTransformer(nn.Module):
    """A pre-norm transformer layer over the positions of the latents, with cross-attention to the context."""

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels)
        self.norm_self = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, config.unet_heads, bias=False)
        self.norm_cross = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, config.unet_heads, config.text_dim, bias=False)
        self.norm_mlp = nn.LayerNorm(channels)
        self.fc1 = Linear(channels, 8 * channels)
        self.fc2 = Linear(4 * channels, channels)
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w), (B, T, text_dim) -> (B, C, h, w)"""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, hw, C)
        tokens = tokens + self.self_attention(self.norm_self(tokens))
        tokens = tokens + self.cross_attention(self.norm_cross(tokens), context)
        hidden, gate = self.fc1(self.norm_mlp(tokens)).chunk(2, dim=-1)  # (B, hw, 4C) each
        tokens = tokens + self.fc2(hidden * F.gelu(gate))  # GEGLU (Shazeer 2020, eq. 6, arXiv:2002.05202)
        return x + self.proj_out(tokens).transpose(1, 2).view_as(x)


class UNetBlock(nn.Module):
    """A residual block, for the timestep, and at some levels a transformer, for the context."""

    def __init__(self, channels: int, out_channels: int, attention: bool, config: Config):
        super().__init__()
        time_dim = 4 * config.unet_channels[0]
        self.residual = ResidualBlock(channels, out_channels, config.norm_groups, 1e-5, time_dim)
        self.transformer = SpatialTransformer(out_channels, config) if attention else None

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w), (B, time_dim), (B, T, text_dim) -> (B, out_channels, h, w)"""
        x = self.residual(x, time)
        return x if self.transformer is None else self.transformer(x, context)


class UNet(nn.Module):
    """Predicts the noise in noisy latents or, as the Config says, v."""

    def __init__(self, config: Config):
        super().__init__()
        self.dim = dim = channels = config.unet_channels[0]
        self.time_mlp = nn.Sequential(Linear(dim, 4 * dim), nn.SiLU(), Linear(4 * dim, 4 * dim))
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        levels, last = list(zip(config.unet_channels, config.unet_attention)), len(config.unet_channels) - 1
        skips = [channels]  # the channels of each output on the way down that the way up takes
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for i, (out_channels, attention) in enumerate(levels):
            inputs = [channels] + (config.unet_blocks - 1) * [out_channels]
            self.down.append(nn.ModuleList(UNetBlock(c, out_channels, attention, config) for c in inputs))
            channels = out_channels
            skips += config.unet_blocks * [channels]
            if i < last:
                self.downsample.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
        self.middle = nn.ModuleList(UNetBlock(channels, channels, flag, config) for flag in (True, False))
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for i, (out_channels, attention) in enumerate(reversed(levels)):
            inputs = [c + skips.pop() for c in [channels] + config.unet_blocks * [out_channels]]
            self.up.append(nn.ModuleList(UNetBlock(c, out_channels, attention, config) for c in inputs))
            channels = out_channels
            if i < last:
                self.upsample.append(Upsample(channels))
        self.norm_out = nn.GroupNorm(config.norm_groups, channels, eps=1e-5)
        self.conv_out = nn.Conv2d(channels, config.latent_channels, 3, padding=1)

    def forward(self, latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Latents (B, C, h, w), timesteps (B,), context (B, T, text_dim) -> predicted noise (B, C, h, w)"""
        time = self.time_mlp(timestep_embedding(t, self.dim).to(latents.dtype))  # (B, time_dim)
        x = self.conv_in(latents)
        skips = [x]
        for i, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, time, context)
                skips.append(x)
            if i < len(self.downsample):
                x = self.downsample[i](x)
                skips.append(x)
        for block in self.middle:
            x = block(x, time, context)
        for i, blocks in enumerate(self.up):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(torch.cat([x, skips.pop()], dim=1), time, context)
            if i < len(self.upsample):
                x = self.upsample[i](x, skips[-1].shape[-2:])  # the skip's size, also where that is odd
        return self.conv_out(F.silu(self.norm_out(x)))


# ------------------------------------------------------------------------------------------------ 7 diffusion
# Forward: noise is gradually added, x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise
# (Ho et al. 2020, eq. 4). Reverse: a sampler starts from noise and steps from one timestep to an earlier one,
# each time with the noise that the UNet predicts. In code, a_t and a_prev are alphas_cumprod at these two.


def noise_schedule(config: Config) -> Tensor:
    """alphas_cumprod (timesteps,) in float64, for betas whose square roots are evenly spaced"""
    start, end = config.beta_start**0.5, config.beta_end**0.5
    return (1 - torch.linspace(start, end, config.timesteps, dtype=torch.float64) ** 2).cumprod(0)


def add_noise(x0: Tensor, noise: Tensor, alphas_cumprod: float | Tensor) -> Tensor:
    """Ho et al. 2020, eq. 4: (B, C, h, w) twice, alphas_cumprod a number or (B, 1, 1, 1) -> (B, C, h, w)"""
    return alphas_cumprod**0.5 * x0 + (1 - alphas_cumprod) ** 0.5 * noise


class DDIM:
    """Song et al. 2020, arXiv:2010.02502. Step i goes from `alphas_cumprod[i]` to `alphas_cumprod[i + 1]`."""

    eta, ends_without_noise = 0.0, False  # SD's DDIM ends at the first timestep of the schedule

    def __init__(self, config: Config, steps: int, strength: float = 1.0):
        """Spaces `steps` over the schedule and keeps the last fraction `strength` of them, at least one."""
        schedule = noise_schedule(config)
        self.timesteps = self.spacing(steps, config.timesteps)[-max(1, int(steps * strength)) :]
        last = 1.0 if self.ends_without_noise else schedule[0].item()
        self.alphas_cumprod = [*schedule[self.timesteps].tolist(), last]

    def spacing(self, steps: int, timesteps: int) -> list[int]:
        """Leading spacing with SD's offset of 1: 981, 961, ..., 1 for 50 steps of 1000"""
        stride = timesteps // steps
        offset = min(1, timesteps - 1 - (steps - 1) * stride)  # 0 where 1 does not fit
        return [offset + i * stride for i in reversed(range(steps))]

    def predict_x0(self, i: int, latents: Tensor, noise_pred: Tensor) -> Tensor:
        """Ho et al. 2020, eq. 4, solved for x_0: (B, C, h, w) twice -> (B, C, h, w)"""
        a_t = self.alphas_cumprod[i]
        return (latents - (1 - a_t) ** 0.5 * noise_pred) / a_t**0.5

    def step(self, i: int, latents: Tensor, noise_pred: Tensor, noise: Tensor) -> Tensor:
        """The i-th latents, the noise predicted in them, fresh noise: (B, C, h, w) each -> the next ones"""
        a_t, a_prev = self.alphas_cumprod[i : i + 2]
        variance = self.eta**2 * (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)  # eq. 16
        x0 = self.predict_x0(i, latents, noise_pred)
        mean = a_prev**0.5 * x0 + (1 - a_prev - variance) ** 0.5 * noise_pred  # eq. 12
        return mean + variance**0.5 * noise


class DDPM(DDIM):
    """Ancestral sampling (Ho et al. 2020, alg. 2), which is DDIM with eta = 1."""

    eta, ends_without_noise = 1.0, True


class DPMPlusPlus(DDIM):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2, arXiv:2211.01095); its first and last steps are DDIM's."""

    ends_without_noise = True
    last_x0: Tensor

    def spacing(self, steps: int, timesteps: int) -> list[int]:
        """Evenly spaced from the last timestep: 999, 949, ..., 50 for 20 steps of 1000"""
        spaced = np.linspace(0, timesteps - 1, steps + 1).round().astype(int)[:0:-1]
        return list(dict.fromkeys(spaced.tolist()))  # 1000 steps give 999 distinct timesteps

    def step(self, i: int, latents: Tensor, noise_pred: Tensor, noise: Tensor) -> Tensor:
        a_t, a_prev = self.alphas_cumprod[i : i + 2]
        h = self.half_log_snr(i + 1) - self.half_log_snr(i)
        x0 = estimate = self.predict_x0(i, latents, noise_pred)
        if 0 < i < len(self.timesteps) - 1:
            r = (self.half_log_snr(i) - self.half_log_snr(i - 1)) / h
            estimate = x0 + 1 / (2 * r) * (x0 - self.last_x0)
        self.last_x0 = x0
        return ((1 - a_prev) / (1 - a_t)) ** 0.5 * latents - a_prev**0.5 * math.expm1(-h) * estimate

    def half_log_snr(self, i: int) -> float:
        """The paper's lambda: half the logarithm of the signal-to-noise ratio."""
        a_t = self.alphas_cumprod[i]
        return math.log(a_t / (1 - a_t)) / 2 if a_t < 1 else math.inf


SAMPLERS: dict[str, type[DDIM]] = {"ddpm": DDPM, "ddim": DDIM, "dpm++": DPMPlusPlus}
SAMPLER_NAMES = {"ddpm": "ddpm", "DDIM": "ddim", "DPM++ 2M": "dpm++"}  # A1111's and ours; it has no DDPM


# ------------------------------------------------------------------------------------------------- 8 pipeline
# Images in and out, the settings, and from a prompt to an image: `denoise` and `generate`.


def one_line(error: object) -> str:
    """The message of an exception or a warning, without line breaks."""
    return " ".join(re.sub(r"^\[Errno -?\d+\] ", "", str(error)).split()) or type(error).__name__


@contextmanager
def reading(path: Any, advice: str = "use another one, or download it again") -> Iterator[None]:
    """Turns whatever fails in a foreign file into a ValueError of one line about the file."""
    try:
        check("it", "a pipe", not Path(os.path.expanduser(str(path))).is_fifo(), "a file")
        yield
    except Exception as error:  # damaged files fail in many ways; PyTorch explains some in four paragraphs
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            raise
        paragraphs = r".*(WeightsUnpickler error: |trusted source\. )|(\. | Please | Check ).*"
        missing = " is missing" if isinstance(error, KeyError) else ""
        reason = re.sub(paragraphs, "", one_line(error)[:2000])[:300] + missing
        raise ValueError(f"{path}: {reason}; {advice}") from error


def open_image(file: Any, background: str = "white") -> Image.Image:
    """A file or an image -> the image in RGB, upright, with `background` where it is transparent."""
    with reading(file):
        kinds = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # an EPS would run a program
        image = file if isinstance(file, Image.Image) else Image.open(os.path.expanduser(file), "r", kinds)
        check("it", f"of {image.size} pixels", image.width * image.height <= 5e7, "at most 50 million")
        animated = getattr(image, "is_animated", False) and image.format != "MPO"  # a JPEG with previews
        check("it", "animated", not animated, "one image")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow would clip at 255
            pixels = np.asarray(image).astype(np.int32).clip(0, 65535)
            image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
        return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image of W by H pixels -> (1, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def to_images(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> B images"""
    pixels = ((images.detach() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


@dataclass
class Settings:
    """The arguments of `denoise`, and of `generate`, which also takes `progress`."""

    prompt: Any  # a string or a list of strings
    negative: str = ""
    steps: int = 50  # 1 to 1000
    guidance: float = 7.5  # how closely to follow the prompt and to avoid `negative`; 1 is no guidance
    sampler: str = "ddpm"  # or "ddim" or "dpm++"
    seed: Any = None  # of the first image; the others have seed + 1, ...; None is a random seed
    n: int = 1  # images of each prompt
    width: Any = None  # in pixels, a multiple of 8; None is that of the image or of the Config
    height: Any = None
    image: Any = None  # a file or a PIL image to start from
    strength: float = 0.8  # how much to change it, over 0 to 1
    mask: Any = None  # a file or a PIL image of the same size: the image is redrawn where this is white

    def resolve(self, config: Config) -> "Settings":
        """Checks and completes the settings for a model of `config`; opens and resizes image and mask."""
        kinds: dict[str, tuple[Any, str]] = {
            "a string": (str, "negative sampler"), "a number": (Real, "guidance strength"),
            "a file or a PIL image": ((str, os.PathLike, Image.Image), "image mask"),
            "an integer": (Integral, "steps n seed width height")}  # fmt: skip
        for wanted, (kind, names) in kinds.items():
            for name in names.split():
                value = getattr(self, name)
                right = isinstance(value, kind) or value is getattr(Settings, name)  # None, in five of them
                check(name, repr(value), right, wanted)
        unit, limit = config.downscale, 2**14
        texts = self.prompt = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        right = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
        check("prompt", repr(texts), right and texts, "a string or a list of strings")
        check("prompt", "too long", max(map(len, [*texts, self.negative])) <= 4000, "at most 4000 characters")
        self.seed = int(np.random.default_rng().integers(2**32) if self.seed is None else self.seed)
        self.image = self.image and open_image(self.image)
        self.mask = self.mask and open_image(self.mask, background="black")
        size = self.image.size if self.image else (config.image_size, config.image_size)
        width = self.width = size[0] // unit * unit if self.width is None else self.width
        height = self.height = size[1] // unit * unit if self.height is None else self.height
        last_seed = 2**64 - int(self.n) * len(self.prompt)
        check("steps", self.steps, 1 <= self.steps <= config.timesteps, f"from 1 to {config.timesteps}")
        check("guidance", self.guidance, math.isfinite(self.guidance), "a finite number, 1 for none")
        check("sampler", self.sampler, self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}")
        check("n", self.n, 1 <= self.n <= 2**32, "from 1 to 2**32")
        check("seed", self.seed, 0 <= self.seed <= last_seed, f"from 0 to {last_seed}")
        check("width", width, width in range(unit, limit + 1, unit), f"a multiple of {unit} up to {limit}")
        check("height", height, height in range(unit, limit + 1, unit), f"a multiple of {unit} up to {limit}")
        check("strength", self.strength, 0 < self.strength <= 1, "over 0 and at most 1")
        check("mask", "given", self.image or not self.mask, "used with an image only")
        if self.mask:
            check("mask", f"{self.mask.size} pixels", self.mask.size == size, f"of its image's size, {size}")
            self.mask = ImageOps.fit(self.mask.convert("L"), (width, height), Image.Resampling.LANCZOS)
        self.image = self.image and ImageOps.fit(self.image, (width, height), Image.Resampling.LANCZOS)
        self.strength = self.strength if self.image else 1.0
        return self

    def parameters(self, i: int, model: str) -> str:
        """The resolved settings of image i, as AUTOMATIC1111's web UI writes and reads them."""
        [sampler] = [theirs for theirs, ours in SAMPLER_NAMES.items() if ours == self.sampler]
        model = json.dumps(model) if re.search(r'[,:"\n]', model) else model
        text = self.prompt[i // self.n] + (f"\nNegative prompt: {self.negative}" if self.negative else "")
        text += f"\nSteps: {self.steps}, Sampler: {sampler}, CFG scale: {self.guidance:.15g}, "
        text += f"Seed: {self.seed + i}, Size: {self.width}x{self.height}, RNG: CPU, Model: {model}"
        return text + (f", Denoising strength: {self.strength:.15g}" if self.image else "")


# What `denoise` yields: the step's number, from 1, its timestep, the latents after it, and the predicted x0.
Step = NamedTuple("Step", [("number", int), ("timestep", int), ("latents", Tensor), ("x0", Tensor)])


class StableDiffusion(nn.Module):
    """A tokenizer, a text encoder, an autoencoder and a UNet, and how they generate images together."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.name = config, ""
        self.offload_device: torch.device | None = None
        self.vae, self.unet = VAE(config), UNet(config)
        self.tokenizer: Any = Tokenizer(config.vocab_size, config.text_length)
        self.text_encoder: nn.Module = CLIPTextEncoder(config)
        if config.vocabulary:
            check("weights/bert.py", "missing", (HERE / "weights/bert.py").exists(), "beside sd.py, for BERT")
            from weights import bert

            self.tokenizer, self.text_encoder = bert.text_models(config)

    @property
    def device(self) -> torch.device:
        """The device that the models run on."""
        return self.offload_device or next(self.parameters()).device

    @contextmanager
    def on_device(self, model: nn.Module) -> Iterator[torch.dtype]:
        """Moves `model` to the device, with offload only until the block ends; yields its dtype."""
        kept = [(parameter, parameter.data) for parameter in model.parameters()]
        try:
            model.to(self.device)
            yield kept[0][1].dtype
        finally:
            for parameter, data in kept if self.offload_device else []:
                parameter.data = data

    def embed(self, texts: list[str]) -> Tensor:
        """B texts -> context (B, T, text_dim). Warns about words that do not fit."""
        for text in dict.fromkeys(texts):
            if words := " ".join(self.tokenizer.dropped(text)):
                warnings.warn(f"over {self.tokenizer.length - 2} tokens; dropped: {words}", stacklevel=2)
            if weight := re.search(r"[(<][^()<>]*:[-\d.]+[)>]", text):
                warnings.warn(f"{weight[0]} is plain text to CLIP: weights are not built in", stacklevel=2)
        ids = torch.tensor([self.tokenizer(text) for text in texts], device=self.device)  # (B, T)
        with self.on_device(self.text_encoder), torch.no_grad():
            return self.text_encoder(ids)

    def encode(self, images: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), scaled: the mean or, with noise, a sample"""
        with self.on_device(self.vae) as dtype, torch.no_grad():
            mean, logvar = self.vae.encode(images.to(self.device, dtype))  # (B, C, h, w) each
            if dtype == torch.float16 and not mean.isfinite().all():  # it overflowed
                mean, logvar = deepcopy(self.vae).float().encode(images.to(self.device))
        return (mean.float() + (0.5 * logvar.float()).exp() * noise) * self.config.latent_scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), scaled -> images (B, 3, H, W), about [-1, 1]"""
        images = []
        with self.on_device(self.vae) as dtype, torch.no_grad():
            for latent in (latents.to(self.device) / self.config.latent_scale).split(1):  # saves memory
                image = self.vae.decode(latent.to(dtype, memory_format=torch.channels_last))
                if dtype == torch.float16 and not image.isfinite().all():
                    image = deepcopy(self.vae).float().decode(latent)
                images.append(image.float())
        return torch.cat(images)

    def predict_noise(self, latents: Tensor, t: int, cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance (Ho and Salimans 2022, eq. 6, arXiv:2207.12598; `guidance` is 1 + w)"""
        x, timesteps = latents.to(cond.dtype), torch.full((len(latents),), t, device=latents.device)
        if guidance == 1:
            predicted = self.unet(x, timesteps, cond).float()
        else:
            both = self.unet(x.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([uncond, cond])).float()
            from_uncond, from_cond = both.chunk(2)
            predicted = from_uncond + guidance * (from_cond - from_uncond)
        if self.config.prediction == "v_prediction":  # Salimans and Ho 2022, app. D, arXiv:2202.00512
            a_t = noise_schedule(self.config)[t].item()
            predicted = a_t**0.5 * predicted + (1 - a_t) ** 0.5 * latents
        return predicted

    @torch.no_grad()
    def denoise(self, prompt: str | list[str], negative: str = "", **settings: Any) -> Iterator[Step]:
        """Runs the reverse process with the arguments in Settings and yields a Step after each step."""
        s = Settings(prompt, negative, **settings).resolve(self.config)
        cond = self.embed([text for text in s.prompt for _ in range(s.n)])  # (B, T, text_dim)
        uncond = self.embed([s.negative]).expand_as(cond)
        unit, sampler = self.config.downscale, SAMPLERS[s.sampler](self.config, s.steps, s.strength)
        shape = (self.config.latent_channels, s.height // unit, s.width // unit)
        generators = [torch.Generator().manual_seed(s.seed + i) for i in range(len(cond))]

        def draw() -> Tensor:  # on the CPU, so that neither the device nor the batch changes an image's noise
            noise = [torch.randn(shape, generator=g, dtype=torch.float32, device="cpu") for g in generators]
            return torch.stack(noise).to(self.device)  # (B, C, h, w)

        latents = draw()
        if s.image:
            original = self.encode(to_tensor(s.image), latents)  # (B, C, h, w), a sample for each seed
            noise = draw()
            latents = add_noise(original, noise, sampler.alphas_cumprod[0])
        if s.mask:
            white = torch.from_numpy(np.array(s.mask))[None] >= 128  # (1, H, W)
            redrawn = F.max_pool2d(white.float(), unit).bool().to(self.device)  # (1, h, w)
            known = [*sampler.alphas_cumprod[1:-1], 1.0]  # of the rest, at the end without noise
        with self.on_device(self.unet):
            for i, t in enumerate(sampler.timesteps):
                noise_pred = self.predict_noise(latents, t, cond, uncond, s.guidance)
                x0 = sampler.predict_x0(i, latents, noise_pred)
                latents = sampler.step(i, latents, noise_pred, draw())
                if s.mask:
                    latents = torch.where(redrawn, latents, add_noise(original, noise, known[i]))
                yield Step(i + 1, t, latents, x0)

    @torch.no_grad()
    def generate(
        self, prompt: str | list[str], negative: str = "", *, progress: bool = True, **settings: Any
    ) -> list[Image.Image]:
        """Generates images; Settings has the other arguments. Image i has the seed `seed + i`.
        Its `info` has its "seed" and, as "parameters", the settings. Raises ValueError."""
        s = Settings(prompt, negative, **settings).resolve(self.config)
        total = len(SAMPLERS[s.sampler](self.config, s.steps, s.strength).timesteps)
        for step in tqdm(self.denoise(**vars(s)), total=total, disable=not progress):
            latents = step.latents
        decoded = self.decode(latents)  # (B, 3, H, W)
        check("the image", f"not finite with {self.name}", decoded.isfinite().all(), "made in bf16 or fp32")
        images = to_images(decoded)
        if s.mask:
            images = [Image.composite(image, s.image, s.mask) for image in images]
        for i, image in enumerate(images):
            image.info = {"seed": s.seed + i, "parameters": s.parameters(i, self.name)}
        return images


# ---------------------------------------------------------------------------------------------- 9 checkpoints
# Weights stay in the mapped file unless converted. NAMES has CompVis's and diffusers' names for ours.

COMPVIS, DIFFUSERS = 0, -1  # which of the words in PREFIXES and NAMES
CONFIG_KEY = "sd.py"  # in a file's metadata, for the Config as JSON
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
PREFIXES = {"text_encoder": "cond_stage_model.transformer.text_model. text_encoder.text_model.",
    "vae": "first_stage_model. vae.", "unet": "model.diffusion_model. unet."}  # fmt: skip
NAMES = {  # ours: CompVis's and, where it is another one, diffusers'
    "text_encoder": {"token_embedding": "embeddings.token_embedding.weight", "layers": "encoder.layers",
        "position_embedding": "embeddings.position_embedding.weight", "attention": "self_attn", "q": "q_proj",
        "k": "k_proj", "v": "v_proj", "out": "out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2",
        "fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm": "final_layer_norm"},
    "vae": {"middle.0": "mid.block_1 mid_block.resnets.0", "middle.1": "mid.attn_1 mid_block.attentions.0",
        "middle.2": "mid.block_2 mid_block.resnets.1", "shortcut": "nin_shortcut conv_shortcut",
        "norm": "norm group_norm", "q": "q to_q", "k": "k to_k", "v": "v to_v", "out": "proj_out to_out.0",
        "norm_out": "norm_out conv_norm_out", "quant": "quant_conv", "post_quant": "post_quant_conv"},
    "unet": {"time_mlp.0": "time_embed.0 time_embedding.linear_1", "conv_in": "input_blocks.0.0 conv_in",
        "time_mlp.2": "time_embed.2 time_embedding.linear_2", "conv_out": "out.2 conv_out", "q": "to_q",
        "middle.0.residual": "middle_block.0 mid_block.resnets.0", "norm_out": "out.0 conv_norm_out",
        "middle.0.transformer": "middle_block.1 mid_block.attentions.0", "k": "to_k", "v": "to_v",
        "middle.1.residual": "middle_block.2 mid_block.resnets.1", "time": "emb_layers.1 time_emb_proj",
        "norm1": "in_layers.0 norm1", "conv1": "in_layers.2 conv1", "norm2": "out_layers.0 norm2",
        "conv2": "out_layers.3 conv2", "shortcut": "skip_connection conv_shortcut", "out": "to_out.0",
        "norm_self": "transformer_blocks.0.norm1", "self_attention": "transformer_blocks.0.attn1",
        "norm_cross": "transformer_blocks.0.norm2", "cross_attention": "transformer_blocks.0.attn2",
        "norm_mlp": "transformer_blocks.0.norm3", "fc1": "transformer_blocks.0.ff.net.0.proj",
        "fc2": "transformer_blocks.0.ff.net.2"}}  # fmt: skip


def level_names(config: Config) -> dict[str, dict[str, str]]:
    """NAMES of levels and more. CompVis counts decoder levels backwards and UNet blocks in one go."""
    vae, unet, last = {}, {}, len(config.vae_channels) - 1
    for i in range(last + 1):
        for j in range(config.vae_blocks + 1):
            vae[f"down.{i}.{j}"] = f"down.{i}.block.{j} down_blocks.{i}.resnets.{j}"
            vae[f"up.{i}.{j}"] = f"up.{last - i}.block.{j} up_blocks.{i}.resnets.{j}"
        vae[f"down.{i}.{j + 1}"] = f"down.{i}.downsample.conv down_blocks.{i}.downsamplers.0.conv"
        vae[f"up.{i}.{j + 1}"] = f"up.{last - i}.upsample up_blocks.{i}.upsamplers.0"
    for i, attention in enumerate(reversed(config.unet_attention)):
        for j in range(config.unet_blocks + 1):
            n = i * (config.unet_blocks + 1) + j
            for k, (ours, theirs) in enumerate([("residual", "resnets"), ("transformer", "attentions")]):
                unet[f"down.{i}.{j}.{ours}"] = f"input_blocks.{n + 1}.{k} down_blocks.{i}.{theirs}.{j}"
                unet[f"up.{i}.{j}.{ours}"] = f"output_blocks.{n}.{k} up_blocks.{i}.{theirs}.{j}"
        unet[f"downsample.{i}"] = f"input_blocks.{n + 1}.0.op down_blocks.{i}.downsamplers.0.conv"
        unet[f"upsample.{i}"] = f"output_blocks.{n}.{1 + attention} up_blocks.{i}.upsamplers.0"
    return {"text_encoder": {}, "vae": vae, "unet": unet}


def rename(names: Iterable[str], words: dict[str, str], dialect: int) -> dict[str, str]:
    """Each of our names -> the name with a dialect's words; the longest match wins"""
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    word = re.compile(rf"(?<![^.])(?:{'|'.join(longest_first)})(?=\.|$)")
    return {name: word.sub(lambda match: words[match[0]].split()[dialect], name) for name in names}


def names_in(dialect: int, model: StableDiffusion, parts: Iterable[str] = PREFIXES) -> dict[str, str]:
    """Our name of each tensor of these parts of the model -> its name in a dialect"""
    names: dict[str, str] = {}
    words, levels = NAMES | getattr(model.text_encoder, "NAMES", {}), level_names(model.config)  # BERT's
    for part in parts:
        pairs = rename(model.get_submodule(part).state_dict(), words[part] | levels[part], dialect).items()
        names |= {f"{part}.{ours}": PREFIXES[part].split()[dialect] + theirs for ours, theirs in pairs}
    return names


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of pairs. Raises ValueError if a name is there twice."""
    check("a name", "there twice", len(dict(pairs)) == len(pairs), "different from the others")
    return dict(pairs)


def read_safetensors(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a .safetensors file: the header's length (8 bytes), the header, the tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    check("its header", f"of {start} bytes", start <= 5_000_000, "of at most 5 million")
    text = data[8:start].decode()
    header = json.loads(text, object_pairs_hook=unique)
    json.dumps(header, ensure_ascii=False).encode()  # refuses broken UTF-16
    numbers = re.sub('"[^"]*"', "", re.sub(r"\\.", "", text))  # what is outside of strings
    check("a number", "wrong", not re.search(r"[^\d\s:,{}\[\]]|\d{20}", numbers), "natural and below 10**19")
    metadata = header.pop("__metadata__", {})
    check("__metadata__", metadata, {*map(type, metadata.values())} <= {str}, "of strings only")
    tensors, end = {}, start
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        check(name, entry, len(entry) == 3 and len(shape) < 9, "dtype, shape and data_offsets")
        begin, stop = (start + offset for offset in entry["data_offsets"])
        size = math.prod(shape) * dtype.itemsize
        right = begin == end and stop == begin + size <= len(data)
        check(name, f"at bytes {begin} to {stop} of {len(data)}", right, f"{size} bytes from {end} on")
        flat = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=begin) if size else torch.empty(0)
        flat = flat.clone() if begin % dtype.itemsize else flat  # only files without padding are not aligned
        tensors[name], end = flat.view(dtype).view(shape), stop
    check("the last byte", len(data), end == len(data), f"the tensors' last, {end}")
    return tensors, metadata


@contextmanager
def atomic_write(path: Path, overwrite: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write; it appears at `path` when it is complete and on disk. Raises OSError."""
    temporary = path.with_name(f".{path.name[:50]}.{os.urandom(8).hex()}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not overwrite:
            path.touch(exist_ok=False)  # raises FileExistsError; not a hard link: some disks have none
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(f"{path}: {one_line(error)}; make room, or save elsewhere") from error
    finally:
        temporary.unlink(missing_ok=True)


class Placeholder:
    """An inert stand-in for the foreign objects that a .ckpt may hold beside its tensors."""

    __init__ = __setstate__ = lambda self, *args, **kwargs: None


# PyTorch's unpickler allows these, though their numbers are not in the file, or are complex or quantized.
MAKERS = r"GLOBAL (\w+.bytearray|torch.(.*Tensor$|storage.|Complex|Q|_utils._rebuild_(?!tensor_v2$|param)))"


def check_pickle(file: Any) -> None:
    """Refuses a pickle that takes endless time or memory, or names one of MAKERS."""
    tuples, made, shared, last = set(), 0, 0, ""
    for i, (code, argument, _) in enumerate(pickletools.genops(file)):
        right = i < 10**6 and not re.match(MAKERS, f"{code.name} {argument}")
        check("its pickle", f"made with {argument}", right, "short, of the file's numbers")
        made += code.name.startswith("TUPLE")
        shared += "GET" in code.name and argument in tuples  # nested, they take endless time to hash
        tuples |= {argument} if "PUT" in code.name and last.startswith("TUPLE") else set()
        last = last if "PUT" in code.name else code.name  # PUT numbers what was made before
    check("its pickle", f"of {made} tuples, {shared} used again", made < 50_000 and shared < 20, "of fewer")


def read_pickle(path: Path, data: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors in a file of torch.save, and its strings as metadata. No code of the file is run."""
    limit, zipped, mapped, foreign = 2 * len(data) + 10**8, data[:4] == b"PK\3\4", False, []
    pickles = [data] * 5  # with which files of before PyTorch 1.6 begin
    if zipped:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            size, methods = sum(r.file_size for r in records), {r.compress_type for r in records}
            plain = min(r.header_offset for r in records) == 0 and not archive.comment  # no second directory
            right = plain and size <= limit and methods <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
            check("it", f"packed, {size} bytes", right, f"a plain or deflated zip of at most {limit}")
            pickles = [archive.open(r) for r in records if r.filename.lower().endswith("data.pkl")]
        mapped = path.suffix != ".safetensors" and not any(methods)  # PyTorch misreads these
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    for file in pickles:
        check_pickle(file)
    sizes = [data.tell()]

    def zeros(storage: Any, _: str) -> Any:  # for old files, in place of uninitialized memory; it cannot grow
        sizes.append(8 + storage.nbytes())
        return torch.from_numpy(np.zeros(storage.nbytes(), np.uint8)).untyped_storage()

    data.seek(0)
    source, place = str(path) if mapped else data, "cpu" if zipped else zeros
    with torch.serialization.safe_globals([(Placeholder, name) for name in foreign]):
        content = torch.load(source, place, weights_only=True, mmap=mapped)
    check("its end", data.tell(), zipped or data.tell() == sum(sizes) == len(data), f"{sum(sizes)}")
    tensors = dict(content.get("state_dict", content))
    size = sum(tensor.nbytes for tensor in tensors.values() if isinstance(tensor, Tensor))
    check("the size of its tensors", size, size <= limit, f"at most {limit} bytes")
    return tensors, {name: value for name, value in content.items() if isinstance(value, str)}


OLD_NAMES = {  # spellings of older files, and today's
    r"0\.query": "0.to_q", r"0\.key": "0.to_k", r"0\.value": "0.to_v", r"0\.proj_attn": "0.to_out.0",
    r"^(text_encoder|cond_stage_model\.transformer)\.(?!text_model\.)": r"\1.text_model."}  # fmt: skip
LORA_NAMES = {  # kohya's and PEFT's names -> diffusers' with underscores, and .up, .down or .alpha
    r"\.": "_", r"^lora_unet": "unet", r"^(lora_te|text_encoder)_(text_model_)?": "text_encoder_text_model_",
    r"_lora_(down|A)_weight$": ".down", r"_lora_(up|B)_weight$": ".up", r"_alpha$": ".alpha"}  # fmt: skip
UNNEEDED = re.compile(  # schedules, averaged weights, and what training or comparing texts with images takes
    r"^(betas|\w*alphas_cumprod\w*|posterior_\w+|logvar|lvlb_weights|scale(_factor)?|v_pred)$|^model_ema\."
    r"|^first_stage_model\.loss\.|\bposition_ids$|\btext_projection\b|\blogit_scale$")  # fmt: skip
FAMILIES = {  # other models: a pattern for "NAME" or, from two dimensions on, "NAME SECOND_SIZE"
    "a LoHa, a LoKr or a DoRA": r"\.hada_w1|\.lokr_w1|dora_scale|\.lora_mid\.|lora_magnitude_vector",
    "a ControlNet or a textual inversion": r"^(control_model\.|controlnet_|string_to_param|emb_params)",
    "Stable Diffusion 2": r"^cond_stage_model\.model\.|attn2[._]to_k\.\S*weight 1024$",
    "Stable Diffusion XL": r"^conditioner\.|attn2[._]to_k\.\S*weight 2048$|^lora_te[12]_",
    "FLUX or Stable Diffusion 3": r"double_blocks[._]|joint_blocks[._]",
    "an inpainting or InstructPix2Pix UNet": r"(input_blocks\.0\.0|^conv_in)\.weight [89]$",
    "a model with zero terminal SNR": r"^ztsnr$",
    "a LoRA": r"lora[_.]",
    "a VAE": r"^(?!first_stage_model\.|vae\.).*coder\.(conv_in|mid)",
    "a UNet": r"^(input|down)_blocks\."}  # fmt: skip
DIFFUSERS_CONFIG = {  # diffusers' names in config.json: ours; attention_head_dim is the number of heads
    "scheduler": {"num_train_timesteps": "timesteps", "prediction_type": "prediction",
        "beta_start": "beta_start", "beta_end": "beta_end"},
    "text_encoder": {"vocab_size": "vocab_size", "max_position_embeddings": "text_length",
        "hidden_size": "text_dim", "num_hidden_layers": "text_layers", "num_attention_heads": "text_heads"},
    "vae": {"latent_channels": "latent_channels", "block_out_channels": "vae_channels",
        "layers_per_block": "vae_blocks", "norm_num_groups": "norm_groups", "scaling_factor": "latent_scale"},
    "unet": {"block_out_channels": "unet_channels", "layers_per_block": "unet_blocks",
        "attention_head_dim": "unet_heads", "norm_num_groups": "norm_groups",
        "cross_attention_dim": "text_dim", "down_block_types": "unet_attention"}}  # fmt: skip


def read_file(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any], list[mmap.mmap]]:
    """The tensors of a file, the fields in its metadata, its memory map. Refuses FAMILIES not in `kind`."""
    with reading(path):
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy on write: the file stays as is
        stub = data[8:9] != b"{" and re.match(rb"version https://git-lfs|\s*<", data)
        check("this", "a Git LFS pointer or a web page", not stub, "the file itself (try `git lfs pull`)")
        tensors, metadata = read_safetensors(data) if data[8:9] == b"{" else read_pickle(path, data)
        for name, tensor in tensors.items():
            check("a name", repr(name), isinstance(name, str) and len(name) < 500, "a short string")
            name = f"{name} {tensor.shape[1]}" if getattr(tensor, "ndim", 0) > 1 else name
            for family, pattern in FAMILIES.items() if CONFIG_KEY not in metadata else []:
                check("this", family, family in kind or not re.search(pattern, name), f"{kind} of SD v1")
        about = metadata.get(CONFIG_KEY, metadata.get("lora_adapter_metadata", "{}"))  # a Config, or PEFT's
        return tensors, dict(json.loads(about)), [data]


def read_folder(folders: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Any], list[mmap.mmap]]:
    """The tensors of parts in diffusers' layout, under part.name, the fields of Config, and the maps."""
    suffixes = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    tensors, sizes, maps = {}, {}, []  # type: ignore[var-annotated]
    for part, folder in folders.items():
        files = [file for end in suffixes for stem in stems if (file := folder / (stem + end)).is_file()]
        if part != "scheduler":
            check(str(folder), "without weights", files, f"a {part} in diffusers' layout")
            found, _, data = read_file(files[0], "a VAE or a UNet")
            tensors |= {f"{part}.{name}": tensor for name, tensor in found.items()}
            maps += data
        file = folder / ("scheduler_config.json" if part == "scheduler" else "config.json")
        with reading(file):
            settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            for name, known in (("rescale_betas_zero_snr", False), ("beta_schedule", "scaled_linear")):
                check(name, settings.get(name), (settings.get(name) or known) == known, str(known))
            for name, value in settings.items():
                value = ["CrossAttn" in kind for kind in value] if name == "down_block_types" else value
                if ours := DIFFUSERS_CONFIG[part].get(name):
                    first = sizes.setdefault(ours, value)
                    check(name, value, value == first, f"{first}, as for another part")
    return tensors, sizes, maps


def pick_tensors(path: Path, tensors: dict, model: StableDiffusion, names: dict[str, str]) -> dict[str, Any]:
    """Our name of each tensor -> the file's, in our shape. Raises ValueError; warns of tensors left over."""
    for old, new in OLD_NAMES.items():
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    state, wrong = {}, []
    for name, theirs in names.items():
        tensor, shape = tensors.pop(theirs, None), model.get_parameter(name).shape
        if not isinstance(tensor, Tensor):
            wrong.append(f"{theirs} is missing")
        elif tensor.shape[:2] != shape[:2] or tensor.numel() != shape.numel():  # a 1x1 kernel adds ones
            wrong.append(f"{theirs} has shape {tuple(tensor.shape)} and not {tuple(shape)}")
        else:
            state[name] = tensor.detach().reshape(shape)
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} bad tensors: {', '.join(wrong[:3])[:300]}; use a whole one")
    if unused := [name for name in tensors if not UNNEEDED.search(name)]:
        warnings.warn(f"{path}: {len(unused)} tensors are not used: {', '.join(unused[:3])}", stacklevel=2)
    return state


def merge_lora(model: StableDiffusion, state: dict[str, Tensor], path: Path, scale: float) -> None:
    """W += scale * alpha / rank * up @ down for each layer of a LoRA, where convolutions count as matrices
    (Hu et al. 2021, sec. 4.1, arXiv:2106.09685). Changes `state`; warns of tensors that fit no layer."""
    tensors, about, _ = read_file(path, "a LoRA")
    with reading(path):
        for old, new in LORA_NAMES.items():
            tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
        names = names_in(DIFFUSERS, model).items()
        layers = {theirs.removesuffix(".weight").replace(".", "_"): ours for ours, theirs in names}
        layers = {layer: ours for layer, ours in layers.items() if f"{layer}.up" in tensors}
        check("this", "without layers of SD v1", layers, "a LoRA of SD v1")
        for layer, ours in layers.items():
            up, down = (tensors.pop(f"{layer}.{end}").float().flatten(1) for end in ("up", "down"))
            alpha = about.get(f"{ours.split('.')[0]}.lora_alpha", len(down))  # in PEFT's metadata
            ratio, weight = float(tensors.pop(f"{layer}.alpha", alpha)) / len(down), state[ours]
            size = (len(up), down.shape[1])
            check(layer, size, math.prod(size) == weight.numel(), f"of {weight.numel()} weights")
            delta = (scale * ratio * up @ down).unflatten(1, weight.shape[1:])  # (out, in)
            state[ours] = (weight + delta.to(weight.device)).to(weight.dtype)
            check(layer, "infinite with its LoRA", state[ours].isfinite().all(), "finite; lower its scale")
    if rest := list(tensors):
        warnings.warn(f"{path}: {len(rest)} tensors fit no layer: {', '.join(rest[:3])}", stacklevel=3)


def pick_device(name: Any) -> torch.device:
    """The device called `name`, or for None the fastest one. Raises ValueError if it is not there."""
    name = name or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # PyTorch raises many kinds
        raise ValueError(f"device {name} is not available: {one_line(error)}; try --device cpu") from error
    return torch.device(name)


def load(path: str | Path, device: Any = "cpu", dtype: torch.dtype = torch.float32, offload: bool = False,
         vae: str | Path | None = None, loras: Mapping[Any, float] = {}) -> StableDiffusion:  # fmt: skip
    """Loads a Stable Diffusion v1 checkpoint: CompVis's .safetensors or .ckpt, or a diffusers folder. `vae`,
    such a file or folder, takes its VAE's place; `loras` are merged, {path: scale}. With `offload`, each part
    of the model is on `device` only while it runs. Raises ValueError."""
    path, device = Path(os.path.expanduser(path)), pick_device(device)
    check(str(path), "missing", path.exists(), "downloaded, as weights/README.md says")
    folders = {part: path / part for part in DIFFUSERS_CONFIG}
    tensors, sizes, maps = read_folder(folders) if path.is_dir() else read_file(path, "a checkpoint")
    sizes |= {"prediction": "v_prediction"} if "v_pred" in tensors else {}
    with reading(path), torch.device("meta"):
        model = StableDiffusion(Config(**sizes))
    state = pick_tensors(path, tensors, model, names_in(DIFFUSERS if path.is_dir() else COMPVIS, model))
    if vae:
        vae = Path(os.path.expanduser(vae))
        tensors, own, _ = read_folder({"vae": vae}) if vae.is_dir() else read_file(vae, "a VAE")
        dialect = DIFFUSERS if any("mid_block" in name for name in tensors) else COMPVIS
        prefix = PREFIXES["vae"].split()[dialect]
        tensors = {prefix + name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        state |= pick_tensors(vae, tensors, model, names_in(dialect, model, ["vae"]))
        with reading(vae):
            scale = own.get("latent_scale", model.config.latent_scale)
            model.config = replace(model.config, latent_scale=scale)
    tensors, home = {}, torch.device("cpu") if offload else device  # originals are freed one by one
    for name, tensor in state.items():
        if tensor.dtype != dtype or home.type != "cpu":
            layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format  # faster
            state[name] = tensor.to(home, dtype, memory_format=layout)
            for data in maps if hasattr(mmap, "MADV_DONTNEED") else []:  # frees the original's pages
                data.madvise(mmap.MADV_DONTNEED)
    model.name = path.name if path.is_dir() else re.sub(r"\.(safetensors|ckpt)$", "", path.name)
    for file, scale in loras.items():
        merge_lora(model, state, Path(os.path.expanduser(file)), scale)
        model.name += f" + {Path(file).stem}:{scale:g}"
    model.load_state_dict(state, assign=True)
    model.offload_device = device if offload else None
    return model.eval()


def save(model: StableDiffusion, path: str | Path) -> None:
    """Writes a .safetensors in CompVis's layout with the Config as metadata, atomically; raises OSError."""
    position_ids = PREFIXES["text_encoder"].split()[COMPVIS] + "embeddings.position_ids"
    tensors = {position_ids: torch.arange(model.config.text_length)[None]}
    for name, theirs in names_in(COMPVIS, model).items():
        tensor = model.get_parameter(name).detach()
        convolution = tensor.ndim == 2 and (name.startswith("vae.") or ".proj_" in name)  # 1x1 in CompVis
        tensors[theirs] = tensor[:, :, None, None] if convolution else tensor
    tensors |= {"v_pred": torch.empty(0)} if model.config.prediction == "v_prediction" else {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", CONFIG_KEY: json.dumps(asdict(model.config))}}
    dtypes, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": dtypes[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # aligns the tensors
    with atomic_write(Path(os.path.expanduser(path))) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


# -------------------------------------------------------------------------------------------- 10 command line

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PNG_NAMES = {"Steps": "steps", "CFG scale": "guidance", "Seed": "seed", "Width": "width", "Height": "height",
    "Denoising strength": "strength", "Hires upscale": "upscale"}  # in a PNG's text: options  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options for an image; raises ValueError."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.usage, option = "python sd.py --prompt TEXT [options]", parser.add_argument
    option("--prompt", metavar="TEXT", help="what to generate an image of, or @FILE with one per line")
    option("--negative", metavar="TEXT", default="", help="what to avoid")
    option("--weights", metavar="PATH", default=DEFAULT_WEIGHTS, type=Path, help="checkpoint (emoji model)")
    option("--vae", metavar="PATH", type=Path, help="an autoencoder instead of the checkpoint's")
    option("--lora", metavar="FILE[:SCALE]", action="append", default=[], help="a LoRA; may be repeated (:1)")
    option("--out", metavar="FILE", default="out.png", type=Path, help="or a free name like it (out.png)")
    option("--steps", metavar="N", default=50, type=int, help="denoising steps, 1 to 1000 (50)")
    option("--guidance", metavar="G", default=7.5, type=float, help="how closely to follow the prompt (7.5)")
    option("--sampler", metavar="S", default="ddpm", choices=SAMPLERS, help="ddpm, ddim or dpm++ (ddpm)")
    option("--seed", metavar="N", type=int, help="repeats an image; image i has seed + i (random)")
    option("--n", metavar="N", default=1, type=int, help="number of images (1)")
    option("--width", metavar="W", type=int, help="pixels, a multiple of 8 (the image's or model's)")
    option("--height", metavar="H", type=int, help="likewise")
    option("--image", metavar="FILE", type=Path, help="an image to start from")
    option("--strength", metavar="S", type=float, help="how much of it to change, over 0 to 1 (0.8)")
    option("--mask", metavar="FILE", type=Path, help="redraw the image only where this is white")
    option("--upscale", metavar="F", type=float, help="enlarge by this factor, redraw at strength (0.35)")
    option("--settings", metavar="PNG", type=Path, help="take the options that made this image")
    option("--device", metavar="D", help="cpu, cuda, cuda:1, mps, ... (the fastest there is)")
    option("--dtype", metavar="D", choices=FLOATS, help="fp32, fp16 or bf16 (fp32 on a CPU, else fp16)")
    option("--offload", action="store_true", help="keep each model on the device only while it runs")
    option("--compile", action="store_true", help="compile the UNet: slow start, faster steps")
    if settings := parser.parse_known_args(arguments)[0].settings:
        parser.set_defaults(**read_settings(settings))
    args, unknown = parser.parse_known_args(arguments)
    check("the option or word", " ".join(unknown[:1]), not unknown, "one that --help shows")
    check("--prompt", "missing", args.prompt is not None, "given")
    if isinstance(args.prompt, str) and args.prompt.startswith("@"):
        with reading(args.prompt[1:], "use text in UTF-8"):
            lines = Path(os.path.expanduser(args.prompt[1:])).read_text(encoding="utf-8-sig").splitlines()
        args.prompt = [line.strip() for line in lines if line.strip()]
    loras = [lora if re.search(r":-?\d*\.?\d+$", lora) else f"{lora}:1" for lora in args.lora]
    args.lora = {file: float(scale) for file, _, scale in (lora.rpartition(":") for lora in loras)}
    return args


def read_settings(path: Path) -> dict[str, Any]:
    """The options in the text that sd.py or AUTOMATIC1111's web UI wrote into a PNG. Raises ValueError."""
    with reading(path), Image.open(os.path.expanduser(path)) as image:
        text, steps, last = f"\n{image.info['parameters']}".rpartition("\nSteps: ")
        check("its text", "without steps", steps, "that of sd.py or AUTOMATIC1111's web UI")
    prompt, _, negative = text.partition("\nNegative prompt: ")
    last = re.sub(r"Size: (\d+)x(\d+)", r"Width: \1, Height: \2", f"Steps: {last}").replace(", RNG: CPU", "")
    found = dict(re.findall(r'([\w ]{1,40}): ("(?:\\.|[^"\\])*"|[^,]*)(?:, |$)', last))
    options = {ours: found.pop(theirs) for theirs, ours in PNG_NAMES.items() if theirs in found}
    if found.get("Sampler") in SAMPLER_NAMES:
        options["sampler"] = SAMPLER_NAMES[found.pop("Sampler")]
    if other := ", ".join(f"{key}: {value}" for key, value in found.items()):
        warnings.warn(f"{path}: not taken over: {other}", stacklevel=2)
    return options | {"prompt": [prompt[1:]], "negative": negative}


def reuse_memory() -> None:
    """Makes the process keep freed memory: asking again costs a tenth of a step and a fifth of decoding."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**27) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older glibc allows 2**25
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def save_image(image: Image.Image, path: str | Path) -> Path:
    """Saves a PNG as the first of out.png, out-1.png, ... that is free; returns its name. Raises OSError."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", image.info.get("parameters", ""))
    path, i = Path(os.path.expanduser(path)), 0
    while os.path.lexists(name := path.with_stem(f"{path.stem}-{i}" if i else path.stem)):
        i += 1
    try:
        with atomic_write(name, overwrite=False) as file:
            image.save(file, "png", pnginfo=info)
    except FileExistsError:  # another process was faster
        return save_image(image, path)
    return name


def generate_files(arguments: list[str]) -> None:
    """Generates and saves images by the options of a command line; raises OSError or ValueError."""
    args = parse(arguments)
    check("prompt", "broken", not re.search("[\ud800-\udfff]", args.negative + "".join(args.prompt)), "UTF-8")
    check("out", args.out, args.out.suffix.lower() == ".png", "a name that ends in .png")
    NamedTemporaryFile(prefix=args.out.stem, dir=os.path.expanduser(args.out.parent)).close()  # writable?
    used = args.strength is None or args.image or args.upscale
    check("strength", "given", used, "used with --image or --upscale only")
    check("upscale", args.upscale, args.upscale is None or 1 < args.upscale <= 4, "over 1 and at most 4")
    check("upscale", "given", not (args.upscale and args.image), "left out: --width and --height enlarge it")
    if args.strength is None:
        args.strength = 0.35 if args.upscale else Settings.strength
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    replace(settings).resolve(Config(vae_channels=(32,)))  # fails early; with one level, any size fits
    device = pick_device(args.device)
    dtype = args.dtype or ("fp32" if device.type == "cpu" else "fp16")
    model = load(args.weights, device, FLOATS[dtype], args.offload, args.vae, args.lora)
    settings.resolve(model.config)
    if not 0.25 <= settings.width * settings.height / model.config.image_size**2 <= 2.25:
        warnings.warn(f"the model was trained at about {model.config.image_size} pixels a side", stacklevel=1)
    about = f"sd.py: {args.weights.name} on {device} in {dtype}, {settings.width}x{settings.height},"
    print(about, f"{args.steps} steps of {args.sampler}, seed {settings.seed}", file=sys.stderr)
    if args.compile:
        model.unet.compile(mode="reduce-overhead")  # with CUDA graphs, where there is CUDA
    for i, prompt in enumerate(prompt for prompt in settings.prompt for _ in range(settings.n)):
        one = replace(settings, prompt=prompt, seed=settings.seed + i, n=1)  # each is saved when it is done
        [image] = model.generate(**vars(one), progress=sys.stderr.isatty())
        if args.upscale:
            text = f"{image.info['parameters']}, Denoising strength: {args.strength:.15g}"
            unit = model.config.downscale
            width, height = (round(side * args.upscale / unit) * unit for side in image.size)
            one = replace(one, image=image, width=width, height=height, strength=args.strength)
            [image] = model.generate(**vars(one), progress=sys.stderr.isatty())
            image.info["parameters"] = f"{text}, Hires upscale: {args.upscale:.15g}"
        print(save_image(image, args.out), flush=True)


def main(run: Callable = generate_files, program: str = "sd.py", smaller: str = "size, --offload") -> int:
    """Runs a command line; returns its exit status: 0, 2 after a user's mistake, 130 when interrupted."""
    reuse_memory()
    warnings.showwarning = lambda message, *_: print(f"{program}: note: {one_line(message)}", file=sys.stderr)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged images
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # likewise
    try:
        return run(sys.argv[1:]) or 0
    except KeyboardInterrupt:
        sys.unraisablehook = lambda _: None  # what a half-made progress bar raises when it is deleted
        return 130
    except (OSError, ValueError, argparse.ArgumentError, RuntimeError, MemoryError) as error:
        wrong = one_line(error)
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            wrong = f"out of memory; try a smaller {smaller} or --dtype bf16"
        elif "--compile" in sys.argv and type(error).__module__.startswith("torch._"):
            reason, *_ = str(error).split("\n\n")  # the rest is for developers
            wrong = f"cannot compile: {one_line(reason)}; leave out --compile"
        elif isinstance(error, RuntimeError):
            raise
    print(f"{program}: error: {wrong[:450]}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
