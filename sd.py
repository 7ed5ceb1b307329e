"""Stable Diffusion v1 in one file: from a prompt to a picture, to be read from top to bottom.

    python sd.py --prompt "a photograph of an astronaut riding a horse" --weights v1-5-pruned-emaonly.ckpt

The prompt is cut into tokens (2), which a transformer turns into a context (4). A denoiser (6) looks at the
context and at a latent, a picture eight times smaller that starts as noise, and says what of it is noise;
a sampler (7) takes some of that away, again and again. A decoder (5) turns the clean latent into a picture.
Training (10) makes the denoiser's and the autoencoder's weights, from pictures with captions.

    1 configuration     2 tokenizer     3 building blocks    4 text encoder
    5 autoencoder       6 denoiser      7 diffusion          8 checkpoints
    9 pipeline         10 training     11 command line

Shapes stand at the end of a line: B batch, T tokens, D width, C channels, H W pixels, h w the latent's.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752
Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239
"""

import argparse
import atexit
import ctypes
import glob
import json
import math
import mmap
import os
import pickle
import random
import re
import signal
import statistics
import sys
import unicodedata
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain, count, islice, pairwise
from pathlib import Path

import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
DEFAULT_WEIGHTS = HERE / "weights" / "emoji.safetensors"


# -------------------------------------------------------------------------------------------- 1 configuration
# Every size in this file comes from here, so that a small model is the same code with other numbers.


@dataclass(frozen=True)
class Config:
    """The sizes of a model; by default Stable Diffusion v1's (CompVis, v1-inference.yaml)."""

    image_size: int = 512  # width and height of a picture, in pixels, when none are asked for

    vocab_size: int = 49408
    vocabulary: tuple[str, ...] = ()  # BERT's tokens, in the order of their ids; for CLIP none
    text_length: int = 77  # tokens, start and end included
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12

    latent_channels: int = 4
    latent_scale: float = 0.18215  # brings the latents to unit variance (Rombach et al. 2022, app. G)
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)  # channels at each resolution, the picture's own first
    vae_blocks: int = 2  # residual blocks at each resolution on the way down; one more on the way up

    unet_widths: tuple[int, ...] = (320, 640, 1280, 1280)
    unet_attends: tuple[bool, ...] = (True, True, True, False)  # which resolutions look at the text
    unet_blocks: int = 2  # likewise
    unet_heads: int = 8
    norm_groups: int = 32

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """The Config that `json.dumps(asdict(config))` wrote, or with some of its fields only."""
        fields = dict(json.loads(text))
        tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**fields | tuples)

    @property
    def downscale(self) -> int:
        """How many pixels of the picture, across, make one of the latent."""
        return 2 ** (len(self.vae_widths) - 1)


# ------------------------------------------------------------------------------------------------ 2 tokenizer
# Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) as in OpenAI's CLIP: text becomes words,
# words become bytes, and pairs that were common in CLIP's texts grow together again.

# A byte is written as one character: its own where that is visible, else the next free one from U+0100 on.
VISIBLE = [byte for byte in range(256) if byte > ord(" ") and chr(byte).isprintable()]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_SYMBOLS = {byte: chr(byte) for byte in VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}

START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = re.compile(f"({re.escape(START)}|{re.escape(END)})")
# <|ENDOFTEXT|> is three words, as a special token is one in its own case only.
WORD = regex.compile(
    r"(<\|)(startoftext|endoftext)(\|>)|('s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+)"
)


class Tokenizer:
    """CLIP's tokenizer. A `vocab_size` below CLIP's 49,408 uses the first, most common merges only."""

    def __init__(self, vocab_size: int = Config.vocab_size, length: int = Config.text_length):
        self.length = length
        symbols = list(BYTE_SYMBOLS.values())
        symbols += [symbol + "</w>" for symbol in symbols]  # a word's last one
        merges = (HERE / "tokenizer_vocab" / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split()) for line in merges[: max(0, vocab_size - len(symbols) - 2)]]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.ids = {token: id for id, token in enumerate([*symbols, *map("".join, pairs), START, END])}
        self.start, self.end, self.pad = self.ids[START], self.ids[END], self.ids[END]

    def __call__(self, text: str) -> list[int]:
        """`text` as `length` ids: a start, at most `length - 2` tokens, an end, and pads."""
        ids = [id for _, word_ids in self.words(text) for id in word_ids][: self.length - 2]
        return [self.start, *ids, self.end] + [self.pad] * (self.length - 2 - len(ids))

    def dropped(self, text: str) -> list[str]:
        """The words of `text` that do not fit, whole or in part, into `length` ids."""
        words = list(self.words(text))
        ends = accumulate(len(ids) for _, ids in words)
        return [word for (word, _), end in zip(words, ends) if end > self.length - 2]

    def words(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """The words of `text`, normalised, each with its ids; special tokens are words of one id."""
        for part in SPECIAL.split(text):
            if part in (START, END):
                yield part, [self.ids[part]]
                continue
            part = unicodedata.normalize("NFC", part)
            part = "".join(character.lower() for character in part)  # one by one: no final sigma
            for word in filter(None, chain.from_iterable(WORD.findall(part))):
                yield word, [self.ids[token] for token in self.tokens(word)]

    def tokens(self, word: str) -> list[str]:
        """The bytes of `word`, joined pair by pair, always the first pair in the merges."""
        tokens = [BYTE_SYMBOLS[byte] for byte in word.encode("utf-8", errors="replace")]
        tokens[-1] += "</w>"
        while len(tokens) > 1:
            pair = min(pairwise(tokens), key=lambda pair: self.ranks.get(pair, math.inf))
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


BERT_SPECIAL = r"\[(?:PAD|UNK|CLS|SEP|MASK)\]"
# Words by themselves: punctuation and Chinese characters, as in Hugging Face's without U+2B820 to U+2B91F.
ALONE = r"\p{P}$+<=>^`|~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002b81f\U0002b920-\U0002ceaf"


class WordPiece(Tokenizer):
    """Uncased BERT's (Devlin et al. 2018, arXiv:1810.04805). KeyError if `vocabulary` has no [CLS], say."""

    def __init__(self, vocabulary: Iterable[str], length: int = Config.text_length):
        self.length = length
        self.ids = {token: id for id, token in enumerate(vocabulary)}
        self.pad, self.start, self.end, _ = (self.ids[f"[{name}]"] for name in ("PAD", "CLS", "SEP", "UNK"))

    def words(self, text: str) -> Iterator[tuple[str, list[int]]]:
        for part in re.split(f"({BERT_SPECIAL})", text):
            if not re.fullmatch(BERT_SPECIAL, part):
                part = unicodedata.normalize("NFD", regex.sub(r"(?![\t\n\r\p{Cn}])[\p{C}\ufffd]", "", part))
                part = "".join(character.lower() for character in regex.sub(r"\p{Mn}", "", part))
            for word in regex.findall(rf"{BERT_SPECIAL}|[{ALONE}]|[^\s{ALONE}]+", part):
                yield word, [self.ids[token] for token in self.tokens(word)]

    def tokens(self, word: str) -> list[str]:
        """`word` in the longest pieces there are, left to right, "##" before all but the first; or [UNK]."""
        pieces, begin, end = [], 0, len(word)
        while begin < end <= 100:
            if (piece := "##" * (begin > 0) + word[begin:end]) in self.ids:
                pieces.append(piece)
                begin, end = end, len(word)
            else:
                end -= 1
        return pieces if begin == len(word) else ["[UNK]"]


# ------------------------------------------------------------------------------------------ 3 building blocks
# What more than one of the three models is made of. Pictures and latents are (B, C, H, W), text is (B, T, D);
# where attention looks at a picture, the pixels are its tokens.


def attend_in_pieces(q: Tensor, k: Tensor, v: Tensor, queries: int = 128) -> Tensor:
    """(B, heads, T, -1), (B, heads, S, -1) twice -> (B, heads, T, -1): attention in plain products, so many
    `queries` at a time. On a CPU that takes half the time of the fused one in bfloat16."""
    batch, width = len(q), q.shape[-1]
    q, k, v = (y.flatten(0, 1) for y in (q, k, v))
    k = k.transpose(1, 2) * width**-0.5  # (B * heads, -1, S)
    pieces = [(piece @ k).softmax(dim=-1) @ v for piece in q.split(queries, dim=1)]
    return torch.cat(pieces, dim=1).unflatten(0, (batch, -1))


class Attention(nn.Module):
    """Every token gathers from others what it asks for (Vaswani et al. 2017, sec. 3.2.2, arXiv:1706.03762):
    self-attention asks the tokens themselves, cross-attention a context of `context_width`."""

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = True):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads cannot share a width of {width}")
        self.heads = heads
        if context_width is None:
            self.qkv = nn.Linear(width, 3 * width, bias)  # one product, as they share their input
        else:
            self.q = nn.Linear(width, width, bias)
            self.kv = nn.Linear(context_width, 2 * width, bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, causal: bool = False, seen=None) -> Tensor:
        """(B, T, D) and, for cross-attention, (B, S, context_width) -> (B, T, D); `causal` hides later
        tokens, a bool `seen` (B, 1, 1, T) those where it is False."""
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, T, D) each
        else:
            q, (k, v) = self.q(x), self.kv(context).chunk(2, dim=-1)  # (B, T, D), (B, S, D) each
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, T, -1)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not causal and seen is None:
            x = attend_in_pieces(q, k, v)
        else:
            x = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, T, D)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut (He et al. 2015, arXiv:1512.03385); the denoiser's see the time."""

    def __init__(self, channels: int, out_channels: int, groups: int, eps: float, time_width: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        if time_width:
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


def resolutions(widths: tuple[int, ...], count: int, block: Callable, resample: Callable) -> nn.Sequential:
    """`count` blocks at each of `widths`, and `resample(width)` from one resolution to the next. A block of
    the i-th is `block(i, channels, width)`, which turns `channels` into `width`."""
    layers, channels = nn.Sequential(), widths[0]
    for i, width in enumerate(widths):
        blocks = (block(i, channels_in, width) for channels_in in [channels] + (count - 1) * [width])
        layers.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks))))
        if i < len(widths) - 1:
            layers[-1].add_module("resample", resample(width))
        channels = width
    return layers


# --------------------------------------------------------------------------------------------- 4 text encoder
# CLIP ViT-L/14's text transformer (Radford et al. 2021, sec. 2.4, arXiv:2103.00020): ids to vectors.


class TextBlock(nn.Module):
    """A transformer layer that norms before it works; a token sees only itself and those before it."""

    def __init__(self, width: int, heads: int, eps: float = 1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        x = x + self.attention(self.norm1(x), causal=True)
        hidden = self.fc1(self.norm2(x))  # (B, T, 4D)
        return x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # a quick GELU (arXiv:1606.08415, sec. 2)


class BERTBlock(TextBlock):
    """A transformer layer that norms after it works; a token sees all that are `seen`."""

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """(B, T, D), (B, 1, 1, T) -> (B, T, D)"""
        x = self.norm1(x + self.attention(x, seen=seen))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class Embedding(nn.Embedding):
    """A table of vectors. On the meta device it has no numbers: to draw them, PyTorch would first spend a
    second on importing what it compiles with."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class CLIPTextEncoder(nn.Module):
    """Turns token ids into the context that the denoiser looks at."""

    def __init__(self, config: Config, block: type[TextBlock] = TextBlock, eps: float = 1e-5):
        super().__init__()
        self.token_embedding = Embedding(len(config.vocabulary) or config.vocab_size, config.text_width)
        self.position_embedding = Embedding(config.text_length, config.text_width)
        blocks = (block(config.text_width, config.text_heads, eps) for _ in range(config.text_layers))
        self.layers = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(config.text_width, eps)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64, T at most text_length -> (B, T, text_width), the last layer's output, normed"""
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, T, D)
        return self.norm(self.layers(x))


class BERTTextEncoder(CLIPTextEncoder):
    """BERT (Devlin et al. 2018, arXiv:1810.04805) in CLIP's place; padding, id 0, is not seen."""

    def __init__(self, config: Config):
        super().__init__(config, BERTBlock, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64, T at most text_length -> (B, T, text_width), the last layer's output"""
        x = self.norm(self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]])  # (B, T, D)
        for layer in self.layers:
            x = layer(x, seen=(ids != 0)[:, None, None])
        return x


# ---------------------------------------------------------------------------------------------- 5 autoencoder
# Squeezes a picture into a latent and back (Rombach et al. 2022, sec. 3.1; Kingma and Welling 2013,
# arXiv:1312.6114). Both halves are straight lines: each is written as the list of its layers.

VAE_EPS = 1e-6


class ImageAttention(Attention):
    """Self-attention of one head over all pixels, beside a shortcut."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1)
        self.norm = nn.GroupNorm(groups, channels, VAE_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        return x + super().forward(tokens).transpose(1, 2).view_as(x)


def vae_half(channels: int, widths: tuple[int, ...], out_channels: int, groups: int, **body: nn.Module):
    """Half of the autoencoder, (B, channels, H, W) -> (B, out_channels, h, w) or back, around its `body`."""
    return nn.Sequential(OrderedDict(
        conv_in=nn.Conv2d(channels, widths[0], 3, padding=1),
        **body,
        norm_out=nn.GroupNorm(groups, widths[-1], VAE_EPS),
        activation=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], out_channels, 3, padding=1),
    ))  # fmt: skip


class VAE(nn.Module):
    """The autoencoder: pictures in [-1, 1] to latents `config.downscale` times smaller, and back. A picture
    gives a normal distribution of latents, by its moments."""

    def __init__(self, config: Config):
        super().__init__()
        widths, blocks, groups = config.vae_widths, config.vae_blocks, config.norm_groups
        channels = config.latent_channels

        def block(i: int, channels: int, width: int) -> nn.Module:
            return ResidualBlock(channels, width, groups, VAE_EPS)

        def middle() -> nn.Module:  # next to the latent, on both sides
            first, last = (block(0, widths[-1], widths[-1]) for _ in range(2))
            return nn.Sequential(first, ImageAttention(widths[-1], groups), last)

        def halve(width: int) -> nn.Module:  # SD pads on the right and at the bottom only
            return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))

        down = resolutions(widths, blocks, block, halve)
        up = resolutions(widths[::-1], blocks + 1, block, Upsample)
        self.encoder = vae_half(3, widths, 2 * channels, groups, down=down, middle=middle())
        self.quant = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant = nn.Conv2d(channels, channels, 1)
        self.decoder = vae_half(channels, widths[::-1], 3, groups, middle=middle(), up=up)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance, each (B, latent_channels, h, w), not scaled"""
        mean, logvar = self.quant(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent: Tensor) -> Tensor:
        """(B, latent_channels, h, w), not scaled -> (B, 3, H, W), about [-1, 1]"""
        return self.decoder(self.post_quant(latent))


# ------------------------------------------------------------------------------------------------- 6 denoiser
# A U-Net (Ronneberger et al. 2015, arXiv:1505.04597) that looks at the text (Rombach et al. 2022, sec. 3.3).
# On the way up each block also gets a skip: what a layer of the same size on the way down gave.


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """(B,) timesteps -> (B, width): cosines and sines of falling frequency (Vaswani et al. 2017, sec. 3.5)"""
    place = torch.arange(width // 2, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * place / len(place))  # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SpatialTransformer(nn.Module):
    """A transformer layer over a latent's pixels: they look at each other and at the text."""

    def __init__(self, channels: int, config: Config):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.norm1 = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, config.unet_heads, bias=False)
        self.norm2 = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, config.unet_heads, config.text_width, bias=False)
        self.norm3 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 8 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w), (B, T, text_width) -> (B, C, h, w)"""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, hw, C)
        tokens = tokens + self.self_attention(self.norm1(tokens))
        tokens = tokens + self.cross_attention(self.norm2(tokens), context)
        hidden, gate = self.fc1(self.norm3(tokens)).chunk(2, dim=-1)  # (B, hw, 4C) each
        tokens = tokens + self.fc2(hidden * F.gelu(gate))  # GEGLU (Shazeer 2020, eq. 6, arXiv:2002.05202)
        return x + self.proj_out(tokens).transpose(1, 2).view_as(x)


class UNetBlock(nn.Module):
    """A residual block, which sees the time, and, where it `attends`, a transformer, which sees the text."""

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
        widths, attends, blocks = config.unet_widths, config.unet_attends, config.unet_blocks
        self.width = width = widths[0]
        self.time_mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        # The skips' channels: conv_in's, then those of each block and each halving; the last has none.
        skips = [width] + [channels for channels in widths for _ in range(blocks + 1)][:-1]

        def down(i: int, channels: int, width: int) -> nn.Module:
            return UNetBlock(channels, width, attends[i], config)

        def up(i: int, channels: int, width: int) -> nn.Module:
            return UNetBlock(channels + skips.pop(), width, attends[-1 - i], config)

        def halve(width: int) -> nn.Module:
            return nn.Conv2d(width, width, 3, stride=2, padding=1)

        self.down = resolutions(widths, blocks, down, halve)
        middle = (UNetBlock(widths[-1], widths[-1], attends, config) for attends in (True, False))
        self.middle = nn.ModuleList(middle)
        self.up = resolutions(widths[::-1], blocks + 1, up, Upsample)
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, config.latent_channels, 3, padding=1)

    def forward(self, latent: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Noisy latent (B, C, h, w), timesteps (B,), context (B, T, D) -> predicted noise (B, C, h, w)"""
        time = self.time_mlp(timestep_embedding(t, self.width).to(latent.dtype))  # (B, time_width)
        x = self.conv_in(latent)
        skips = [x]
        for resolution in self.down:
            for block in resolution.blocks:
                x = block(x, time, context)
                skips.append(x)
            if hasattr(resolution, "resample"):
                x = resolution.resample(x)
                skips.append(x)
        for block in self.middle:
            x = block(x, time, context)
        for resolution in self.up:
            for block in resolution.blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), time, context)
            if hasattr(resolution, "resample"):
                x = resolution.resample(x, skips[-1].shape[-2:])  # the skip's size, also where that is odd
        return self.conv_out(F.silu(self.norm_out(x)))


# ------------------------------------------------------------------------------------------------ 7 diffusion
# Forward: a latent x_0 drowns in noise, x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, and a_t, alphas_cumprod,
# falls from nearly 1 at t = 0 to nearly 0 at t = 999 (Ho et al. 2020, eq. 4). Reverse: a sampler starts from
# noise and steps from one timestep to an earlier one, each time with the noise that the denoiser predicts.


def noise_schedule(config: Config) -> Tensor:
    """alphas_cumprod (timesteps,) in float64, of betas that are linear in their square root"""
    start, end = config.beta_start**0.5, config.beta_end**0.5
    return (1 - torch.linspace(start, end, config.timesteps, dtype=torch.float64) ** 2).cumprod(0)


def add_noise(latent: Tensor, noise: Tensor, alphas_cumprod: float | Tensor) -> Tensor:
    """The forward process (Ho et al. 2020, eq. 4): (B, C, h, w) twice, alphas_cumprod one or (B, 1, 1, 1)"""
    return alphas_cumprod**0.5 * latent + (1 - alphas_cumprod) ** 0.5 * noise


class Sampler:
    """A reverse process: `timesteps`, noisiest first, and `step(i, latent, noise_pred, draw)`, which takes a
    latent (B, C, h, w) from the i-th of them to the next; `draw` makes fresh noise for it. `levels[i]` is
    alphas_cumprod where step i starts, `levels[i + 1]` where it ends; 1 is no noise."""

    ends_noisy = False

    def __init__(self, config: Config, steps: int, strength: float = 1.0):
        """Spreads `steps` over the schedule and keeps the last ones, a share `strength` but at least one."""
        schedule = noise_schedule(config)
        self.timesteps = self.spacing(steps, config.timesteps)[-max(1, int(steps * strength)) :]
        self.levels = schedule[self.timesteps].tolist() + [schedule[0].item() if self.ends_noisy else 1.0]

    def spacing(self, steps: int, timesteps: int) -> list[int]:
        """Evenly spaced, starting one above the bottom, as SD has it: 981, 961, ..., 1 for 50 of 1000."""
        stride = timesteps // steps
        offset = min(1, timesteps - 1 - (steps - 1) * stride)
        return [offset + i * stride for i in reversed(range(steps))]

    def predict_clean(self, i: int, latent: Tensor, noise_pred: Tensor) -> Tensor:
        """x_0 as the predicted noise has it, by the forward process solved for it."""
        return (latent - (1 - self.levels[i]) ** 0.5 * noise_pred) / self.levels[i] ** 0.5


class DDPM(Sampler):
    """Ancestral sampling (Ho et al. 2020, alg. 2) as DDIM with eta 1 (Song et al. 2020, arXiv:2010.02502)."""

    eta = 1.0

    def step(self, i: int, latent: Tensor, noise_pred: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        now, after = self.levels[i], self.levels[i + 1]
        variance = self.eta**2 * (1 - after) / (1 - now) * (1 - now / after)  # Song et al. 2020, eq. 16
        clean = self.predict_clean(i, latent, noise_pred)
        mean = after**0.5 * clean + (1 - after - variance) ** 0.5 * noise_pred  # eq. 12
        return mean + variance**0.5 * draw() if self.eta else mean


class DDIM(DDPM):
    """The same without fresh noise; SD's leaves the little noise of the schedule's first timestep."""

    eta, ends_noisy = 0.0, True


class DPMPlusPlus(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2, arXiv:2211.01095): a step also looks back at the last x_0."""

    def spacing(self, steps: int, timesteps: int) -> list[int]:
        """Evenly spaced from the top, which suits few steps: 999, 949, ..., 50 for 20 of 1000."""
        spaced = np.linspace(0, timesteps - 1, steps + 1).round().astype(int)[:0:-1]
        return list(dict.fromkeys(spaced.tolist()))  # 1000 steps round to 999 timesteps

    def step(self, i: int, latent: Tensor, noise_pred: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        now, after = self.levels[i], self.levels[i + 1]
        h = self.log_snr(i + 1) - self.log_snr(i)
        clean = ahead = self.predict_clean(i, latent, noise_pred)
        if 0 < i < len(self.timesteps) - 1:
            # Halfway through the step, as x_0 has been changing from the last to this.
            ahead = clean + h / (self.log_snr(i) - self.log_snr(i - 1)) / 2 * (clean - self.last_clean)
        self.last_clean = clean
        return ((1 - after) / (1 - now)) ** 0.5 * latent - after**0.5 * math.expm1(-h) * ahead

    def log_snr(self, i: int) -> float:
        """The log of the signal-to-noise ratio at level i, halved; infinite where there is no noise."""
        level = self.levels[i]
        return math.log(level / (1 - level)) / 2 if level < 1 else math.inf


SAMPLERS = {"ddpm": DDPM, "ddim": DDIM, "dpm++": DPMPlusPlus}


# ---------------------------------------------------------------------------------------------- 8 checkpoints
# A file of any kind comes in as a dict of tensors over a memory map: nothing is read before it is used, and
# nothing that a pickle names is run. Rules turn the names of both dialects, CompVis's single file and
# diffusers' folder, into those of the classes above; the shapes say which Config they belong to.

STORED_AS = {  # in .safetensors and in pickles
    torch.float64: ("F64", "DoubleStorage"), torch.float32: ("F32", "FloatStorage"),
    torch.float16: ("F16", "HalfStorage"), torch.bfloat16: ("BF16", "BFloat16Storage"),
    torch.int64: ("I64", "LongStorage"), torch.int32: ("I32", "IntStorage"),
    torch.int16: ("I16", "ShortStorage"), torch.int8: ("I8", "CharStorage"),
    torch.uint8: ("U8", "ByteStorage"), torch.bool: ("BOOL", "BoolStorage"),
    torch.float8_e4m3fn: ("F8_E4M3",), torch.float8_e5m2: ("F8_E5M2",),
}  # fmt: skip
STORED_DTYPES = {name: dtype for dtype, names in STORED_AS.items() for name in names}
ZIP_MAGIC, PICKLE_MAGIC, LEGACY_MAGIC = b"PK\3\4", b"\x80", 0x1950A86A20F9469CFC6C
OWN_MARK = "sd.py"  # where our own files carry their Config in the metadata


def one_line(message: Warning | Exception | str) -> str:
    """A message without line breaks; an exception that says nothing is named."""
    return " ".join(str(message).split()) or type(message).__name__


def first_few(items: list[str]) -> str:
    """The first three and how many more."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


@contextmanager
def blamed(what: object, advice: str = "") -> Iterator[None]:
    """Whatever fails inside becomes a FileNotFoundError or ValueError of one line: what is wrong with what,
    and what to do."""
    try:
        yield
    except torch.OutOfMemoryError:  # of a device: the file is as it should be
        raise
    except Exception as error:  # a damaged file can fail in every way there is
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        reason = getattr(error, "strerror", None) or one_line(error)  # an OSError's without the file again
        raise kind(f"{what}: {reason}{advice and '; '}{advice}") from error


@contextmanager
def written_whole(path: Path) -> Iterator:
    """A binary file to write, which is at `path` once it is complete and on disk, or never."""
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.part")  # names have a greatest length
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def mapped(data: mmap.mmap, begin: int, size: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor over `size` bytes of the map; copied only where the file did not align them."""
    if size == 0:
        return torch.empty(0, dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=begin)
    return (flat.clone() if begin % dtype.itemsize else flat).view(dtype)


def read_safetensors(data: mmap.mmap) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata: 8 bytes of length, a JSON header, then every tensor's bytes without a gap."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    tensors, end = {}, start
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = STORED_DTYPES[entry["dtype"]], entry["shape"]
        begin, stop = (start + offset for offset in entry["data_offsets"])
        size = math.prod(shape) * dtype.itemsize
        if begin != end or stop != begin + size or stop > len(data) or min(shape, default=0) < 0:
            raise ValueError(f"{name} does not fit its place, bytes {begin} to {stop} of {len(data)}")
        tensors[name], end = mapped(data, begin, size, dtype).view(shape), stop
    if end != len(data):
        raise ValueError(f"the tensors end at byte {end} and the file at {len(data)}")
    return tensors, metadata


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes what `read_safetensors` reads, atomically."""
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype, *_ = STORED_AS[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # aligns the tensors
    with written_whole(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


class Foreign:
    """Stands for what a pickle names besides tensors, such as a training loop's callbacks; does nothing."""

    __init__ = __setstate__ = __setitem__ = append = extend = add = lambda self, *args, **kwargs: None

    def __call__(self, *args, **kwargs):
        return self


class TensorUnpickler(pickle._Unpickler):  # the one in Python: in C, one damaged byte can ask for gigabytes
    """Unpickles tensors in plain containers; of what else the file names, nothing is imported or called.

    `storage(key, size, dtype)` gives the flat tensor, of `size` bytes, that the pickle calls `key`."""

    KNOWN = {f"torch.{name}": dtype for name, dtype in STORED_DTYPES.items()} | {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": lambda flat, at, *view: flat.as_strided(*view[:2], at),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    }

    def __init__(self, file, storage: Callable[[str, int, torch.dtype], Tensor]):
        super().__init__(file, encoding="latin-1")
        self.storage = storage

    def find_class(self, module: str, name: str):
        return self.KNOWN.get(f"{module}.{name}") or type(name, (Foreign,), {"__module__": module})

    def persistent_load(self, pid: tuple):
        if pid[0] == "module":  # old files pack a class with its source
            return pid[1]
        _storage, dtype, key, _device, numel = pid[:5]
        return self.storage(key, numel * dtype.itemsize, dtype)


def read_zip_pickle(path: Path, data: mmap.mmap):
    """The object that torch.save writes: a zip of a pickle and, uncompressed, a record for each storage."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}

        def storage(key: str, size: int, dtype: torch.dtype) -> Tensor:
            record = records[f"data/{key}"]
            if record.file_size < size or record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{record.filename} does not hold {size} bytes, uncompressed")
            # A record's header is 30 bytes, the last four of them the sizes of the name and more behind it.
            behind = np.frombuffer(data, "<u2", 2, record.header_offset + 26).sum(dtype=int)
            return mapped(data, record.header_offset + 30 + int(behind), size, dtype)

        return TensorUnpickler(archive.open(records["data.pkl"]), storage).load()


def read_legacy_pickle(data: mmap.mmap):
    """The object that torch.save wrote up to version 1.5: pickles of a magic number, a version, the machine,
    the object and the keys of its storages, then each storage's length, in 8 bytes, and its bytes."""
    sizes, places = {}, {}

    def measured(key: str, size: int, dtype: torch.dtype) -> Tensor:
        sizes[key] = size
        return torch.empty(size // dtype.itemsize, device="meta")

    if TensorUnpickler(data, measured).load() != LEGACY_MAGIC:
        raise ValueError("it is a pickle, but not one of PyTorch's")
    TensorUnpickler(data, measured).load()
    TensorUnpickler(data, measured).load()
    start = data.tell()
    TensorUnpickler(data, measured).load()  # for the sizes: a storage begins where the one before it ends
    for key in TensorUnpickler(data, measured).load():
        places[key] = data.tell() + 8
        data.seek(places[key] + sizes[key])
    data.seek(start)
    return TensorUnpickler(data, lambda key, size, dtype: mapped(data, places[key], size, dtype)).load()


def read_file(path: Path) -> tuple[dict, dict[str, str], mmap.mmap]:
    """The tensors in a file, by its own names, its metadata, and the map; what kind it is, its content says.

    Raises OSError for a file that cannot be opened, ValueError for one that is no checkpoint or is damaged.
    """
    if path.stat().st_size == 0:
        raise ValueError("the file is empty; download it again")
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # copy on write: the file stays
    if data[:23] == b"version https://git-lfs":
        raise ValueError("this is a Git LFS pointer, not the checkpoint; get that with `git lfs pull`")
    is_safetensors = data[8:9] == b"{"
    if data[:256].lstrip()[:1] == b"<" and not is_safetensors:
        raise ValueError("this is a web page, not a checkpoint; download the file that the page links to")
    with blamed("no checkpoint or a damaged one", "download it again"):
        if is_safetensors:
            return *read_safetensors(data), data
        if data[:4] != ZIP_MAGIC and data[:1] != PICKLE_MAGIC:
            raise ValueError("it starts like no kind of checkpoint")
        content = read_zip_pickle(path, data) if data[:4] == ZIP_MAGIC else read_legacy_pickle(data)
        content = content.get("state_dict", content)
        return {name: value for name, value in content.items() if isinstance(name, str)}, {}, data


# What a diffusers folder says in its config.json files and shapes do not: its name for it, and ours.
DIFFUSERS_FIELDS = {
    "text_encoder": {"num_attention_heads": "text_heads"},
    "vae": {"scaling_factor": "latent_scale"},
    "unet": {"norm_num_groups": "norm_groups", "attention_head_dim": "unet_heads"},  # means heads
}


def read_folder(path: Path) -> tuple[dict, dict, list[mmap.mmap]]:
    """The tensors in a diffusers folder, by their own names behind their part's, those fields of Config that
    its config.json files tell and shapes do not, and the maps."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    ends = (".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin")
    tensors, fields, maps = {}, {}, []
    for part, known in DIFFUSERS_FIELDS.items():
        files = (path / part / (stem + end) for end in ends for stem in stems)
        file, config = next(filter(Path.is_file, files), None), path / part / "config.json"
        if file is None:
            raise ValueError(f"{part}/ holds no weights; name a whole diffusers folder, or a checkpoint file")
        with blamed(f"{part}/{file.name}"):
            named, _, data = read_file(file)
        with blamed(f"{part}/{config.name}", "download it again"):
            settings = json.loads(config.read_text()) if config.is_file() else {}
            fields |= {field: settings[name] for name, field in known.items() if name in settings}
        tensors |= {f"{part}.{name}": value for name, value in named.items()}
        maps.append(data)
    return tensors, fields, maps


def level_by_level(place: re.Match) -> str:
    """unet.input_blocks.4.1. -> unet.down_blocks.1.attentions.0. and the like: CompVis numbers the blocks
    straight through, diffusers resolution by resolution."""
    way, number, part, resample = place.groups()
    side = "down" if way == "in" else "up"
    level, block = divmod(int(number) - (way == "in"), Config.unet_blocks + 1)  # the input's 0 is conv_in
    layer = f"{'attentions' if int(part) else 'resnets'}.{block}"
    return f"unet.{side}_blocks.{level}.{f'{side}samplers.0.conv' if resample else layer}."


# Our names, and the dialects' for the same; where one begins with another, the longer stands first.
NAMES = {
    "norm1": "layer_norm1 in_layers.0 attention.output.LayerNorm",
    "norm2": "layer_norm2 out_layers.0 output.LayerNorm",
    "norm": "final_layer_norm group_norm LayerNorm", "norm_out": "conv_norm_out out.0", "conv_out": "out.2",
    "conv1": "in_layers.2", "conv2": "out_layers.3", "shortcut": "skip_connection nin_shortcut conv_shortcut",
    "time": "emb_layers.1 time_emb_proj", "time_mlp": "time_embed",
    "time_mlp.0": "time_embedding.linear_1", "time_mlp.2": "time_embedding.linear_2",
    "attention": "self_attn attention.self", "attention.out": "attention.output.dense",
    "self_attention": "attn1", "cross_attention": "attn2",
    "q": "q_proj to_q query", "k": "k_proj to_k key", "v": "v_proj to_v value",
    "out": "out_proj to_out.0 proj_attn", "fc1": "mlp.fc1 ff.net.0.proj intermediate.dense",
    "fc2": "mlp.fc2 ff.net.2 output.dense", "layers": "layer", "weight": "gamma", "bias": "beta",
    "token_embedding": "word_embeddings", "position_embedding": "position_embeddings",
    "quant": "quant_conv", "post_quant": "post_quant_conv",
    "unet.middle.0.residual": "unet.middle_block.0 unet.mid_block.resnets.0",
    "unet.middle.0.transformer": "unet.middle_block.1 unet.mid_block.attentions.0",
    "unet.middle.1.residual": "unet.middle_block.2 unet.mid_block.resnets.1",
    "middle.0": "mid.block_1 mid_block.resnets.0", "middle.1.out": "mid.attn_1.proj_out",
    "middle.1": "mid.attn_1 mid_block.attentions.0", "middle.2": "mid.block_2 mid_block.resnets.1",
    "down": "down_blocks", "up": "up_blocks", "blocks": "block resnets",
    "resample": "downsample.conv downsamplers.0.conv upsample upsamplers.0",
}  # fmt: skip
WORDS = {theirs: ours for ours, words in NAMES.items() for theirs in words.split()}

# What makes both dialects' names ours, in this order: (a pattern, what replaces it).
RULES = [
    (r"^model\.diffusion_model\.", "unet."),
    (r"^first_stage_model\.", "vae."),
    (r"^cond_stage_model\.transformer\.", "text_encoder."),
    (r"^text_encoder\.(text_model\.|bert\.)?((embeddings|encoder)\.)?", "text_encoder."),
    (r"\.transformer_blocks\.0\.", "."),
    (r"^unet\.input_blocks\.0\.0\.", "unet.conv_in."),
    (r"^unet\.(in|out)put_blocks\.(\d+)\.(\d)\.(op\.|conv\.)?", level_by_level),
    # CompVis counts the decoder's levels from the picture's size down
    (r"^vae\.decoder\.up\.(\d+)\.", lambda up: f"vae.decoder.up.{len(Config.vae_widths) - 1 - int(up[1])}."),
    (rf"(?<![^.])({'|'.join(map(re.escape, WORDS))})(?=\.|$)", lambda word: WORDS[word[1]]),
    (r"^(unet\..+\.blocks\.\d+)\.", r"\1.residual."),
    (r"^(unet\..+)\.attentions\.(\d+)\.", r"\1.blocks.\2.transformer."),
    (r"^(vae\.encoder\..+\.resample)\.", r"\1.1."),
]

# The names of what is known and not needed: schedules, averaged weights, what served training, and what CLIP
# compares texts and pictures with.
UNNEEDED = (
    r"^(betas|\w*alphas_cumprod\w*|posterior_\w+|logvar|lvlb_weights|scale(_factor)?)$"
    r"|^model_ema\.|^vae\.loss\.|\bposition_ids$|\btext_projection\b|\blogit_scale$"
)

# What else comes under the same endings: (what it is, what gives it away in our names and shapes).
FAMILIES = [
    ("a LoRA", r"lora[_.]|\.alpha "),
    ("a ControlNet", r"^control_model\.|^controlnet_"),
    ("Stable Diffusion XL", r"^conditioner\.|cross_attention\.k\.weight \[\d+, 2048\]"),
    ("Stable Diffusion 2", r"^cond_stage_model\.model\.|cross_attention\.k\.weight \[\d+, 1024\]"),
    ("FLUX or Stable Diffusion 3", r"double_blocks\.|joint_blocks\."),
    ("a textual inversion", r"^string_to_param|^emb_params"),
    ("an inpainting UNet (9 input channels)", r"(input_blocks\.0\.0|unet\.conv_in)\.weight \[\d+, 9,"),
    ("an InstructPix2Pix UNet (8 input channels)", r"^unet\.conv_in\.weight \[\d+, 8,"),
    ("a model with BERT in CLIP's place", r"^text_encoder\.token_type_embeddings\."),
    ("a VAE alone", r"\A(?!.*^unet\.).*coder\.conv_in"),
    ("a UNet alone", r"\A(?!.*^unet\.).*^(input_blocks|down)\."),
    ("something without a UNet", r"\A(?!.*^unet\.)"),
]


def rename(name: str) -> str:
    """Our name for a tensor that either dialect names `name`."""
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def listed(tensors: dict) -> str:
    """A line for each of them: its name and its shape."""
    return "\n".join(f"{name} {list(getattr(value, 'shape', ()))}" for name, value in tensors.items())


def infer_config(shapes: str) -> Config:
    """The Config that lines of (our) names and shapes tell; what they do not tell is as in SD v1. A size is
    what most of the tensors that have it say, so that a bad one is reported and not believed."""

    def size(pattern: str) -> int:
        return int(statistics.mode(re.findall(rf"(?m)^{pattern}.* \[(\d+)", shapes) or ["0"]))

    def number(pattern: str) -> int:
        return len(set(re.findall(rf"(?m)^{pattern}", shapes)))

    def widths(place: str) -> tuple[int, ...]:
        levels = (rf"{place}\.{i}\.blocks\.\d+" for i in range(number(rf"{place}\.(\d+)")))
        return tuple(size(rf"{level}\.(?:residual\.)?(?:conv\d|norm2)") for level in levels)

    text_width, unet_widths = size(r"text_encoder\.layers\.\d+\.norm"), widths(r"unet\.down")
    attends = (number(rf"unet\.down\.{i}\.blocks\.\d+\.transformer") > 0 for i in range(len(unet_widths)))
    found = {
        "vocab_size": size(r"text_encoder\.token_embedding"),
        "text_length": size(r"text_encoder\.position_embedding"),
        "text_width": text_width,
        "text_layers": number(r"text_encoder\.layers\.(\d+)"),
        "text_heads": text_width * Config.text_heads // Config.text_width,  # CLIP's heads have one size
        "latent_channels": size(r"(?:vae\.post_quant|unet\.conv_out)"),
        "vae_widths": widths(r"vae\.encoder\.down"),
        "vae_blocks": number(r"vae\.encoder\.down\.\d+\.blocks\.(\d+)"),
        "unet_widths": unet_widths,
        "unet_attends": tuple(attends),
        "unet_blocks": number(r"unet\.down\.\d+\.blocks\.(\d+)"),
    }
    return Config(**{field: value for field, value in found.items() if value})


def read_model(path: Path) -> tuple[Config, dict, list[mmap.mmap]]:
    """The Config of any checkpoint, its tensors by our names, and the maps that they are in; raises as
    `StableDiffusion.load` does."""
    fields = {}
    if path.is_dir():
        tensors, fields, maps = read_folder(path)
    elif not path.is_file():
        raise FileNotFoundError("no such file or folder; weights/README.md says where to get one")
    else:
        tensors, metadata, *maps = read_file(path)
        if OWN_MARK in metadata:
            with blamed("its Config", "use a file that StableDiffusion.save wrote"):
                return Config.from_json(metadata[OWN_MARK]), tensors, maps
    tensors = {rename(name): value for name, value in tensors.items()}
    shapes = listed(tensors)
    for family, pattern in FAMILIES:
        if re.search(pattern, shapes, re.MULTILINE | re.DOTALL):
            raise ValueError(f"this is {family}; use a whole Stable Diffusion v1 checkpoint")
    tensors = {name: value for name, value in tensors.items() if not re.search(UNNEEDED, name)}
    return replace(infer_config(shapes), **fields), tensors, maps


def fit(
    tensors: dict, maps: list[mmap.mmap], model: nn.Module, device: torch.device | str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The state dict of `model`, taken out of `tensors`: q, k and v that are one of ours are joined, a 1x1
    convolution becomes a linear layer or the reverse. What needs no conversion stays in the file; of what
    does, the `maps` keep nothing in memory, and convolutions get the layout in which they are fastest.

    Raises ValueError for tensors that are missing, misshapen or not finite.
    """
    state, wrong = {}, []
    for name, target in model.state_dict().items():
        owner, layer, kind = name.rsplit(".", 2)
        joined = layer in ("qkv", "kv") and name not in tensors
        sources = [f"{owner}.{letter}.{kind}" for letter in layer] if joined else [name]
        shape = torch.Size([target.shape[0] // len(sources), *target.shape[1:]])
        parts = [tensors.pop(source, None) for source in sources]
        for source, part in zip(sources, parts):
            if part is None:
                wrong.append(f"{source} is missing")
            elif not isinstance(part, Tensor):
                wrong.append(f"{source} is no tensor but {type(part).__module__}.{type(part).__qualname__}")
            elif part.shape[:2] != shape[:2] or part.numel() != shape.numel():  # 1x1s end in ones
                wrong.append(f"{source} has shape {tuple(part.shape)} and not {tuple(shape)}")
        if not wrong:
            stays = parts[0].dtype == dtype and torch.device(device).type == "cpu"
            layout = torch.preserve_format if stays or len(shape) < 4 else torch.channels_last
            parts = [part.reshape(shape).to(device, dtype, memory_format=layout) for part in parts]
            state[name] = torch.cat(parts) if joined else parts[0]
            for data in maps:  # what was copied need not be in memory twice
                if (joined or not stays) and hasattr(data, "madvise"):  # Windows has no such call
                    data.madvise(mmap.MADV_DONTNEED)
    if wrong:
        raise ValueError(f"{first_few(wrong)}; use a complete checkpoint")
    exact = torch.promote_types(dtype, torch.float32)
    # A sum shows NaN and infinity in one pass and without memory.
    wrong = [name for name, tensor in state.items() if not tensor.sum(dtype=exact).isfinite()]
    if wrong:
        raise ValueError(f"NaN or infinity in {first_few(wrong)}; download it again, or use another dtype")
    return state


def read_bert(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The fields of Config that a folder like bert-base-uncased's tells, and its weights as they stand in a
    StableDiffusion's state dict, in float32. Raises OSError or ValueError, in one line."""
    advice, vocab, settings = "try bert-base-uncased's folder", folder / "vocab.txt", folder / "config.json"
    files = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    file = next(filter(Path.is_file, files), files[0])
    with blamed(f"{vocab} is not a BERT's", advice):
        vocabulary = tuple(WordPiece(vocab.read_text("utf-8").rstrip("\n").split("\n")).ids)
    with blamed(f"{settings} is not a BERT's", advice):
        heads = json.loads(settings.read_text())["num_attention_heads"]
    with blamed(f"{file} is not a BERT's", advice):
        tensors = {rename(f"text_encoder.{name}"): value for name, value in read_file(file)[0].items()}
        place, types = "text_encoder.position_embedding.weight", "text_encoder.token_type_embeddings.weight"
        tensors[place] = tensors[place][: Config.text_length] + tensors[types][0]  # a prompt is of one type
        config = replace(infer_config(listed(tensors)), vocabulary=vocabulary, text_heads=heads)
        if config.vocab_size != len(vocabulary):
            raise ValueError(f"it has {config.vocab_size} tokens and vocab.txt {len(vocabulary)}")
        with torch.device("meta"):
            encoder = nn.ModuleDict({"text_encoder": BERTTextEncoder(config)})
        fields = {name: value for name, value in asdict(config).items() if name.startswith(("text", "vocab"))}
        return fields, fit(tensors, [], encoder, "cpu", torch.float32)


# ------------------------------------------------------------------------------------------------- 9 pipeline
# The story from a prompt to a picture: `generate` tells it.


def open_picture(source: str | Path | Image.Image, ground: str = "white") -> Image.Image:
    """A picture in RGB, upright, on `ground` where transparent; OSError or ValueError for what is none."""
    advice = "use a still PNG, JPEG or the like"
    with blamed(f"{source}: not a picture that can be used", advice), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = source if isinstance(source, Image.Image) else Image.open(source)
        if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: and a preview
            raise ValueError(f"it is animated, {image.n_frames} frames")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA"))
        return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """A picture of W by H -> (1, 3, H, W) in [-1, 1]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def to_pictures(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] -> B pictures"""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def pick_device(name: str | None) -> torch.device:
    """The device named, or the fastest there is; ValueError where it is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with blamed(f"device {name} is not there", "try --device cpu"):
        torch.zeros(1, device=name).item()
    return torch.device(name)


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def reuse_memory() -> None:
    """Keeps memory that is freed for what is computed next: to have it anew from Linux, page by page, is a
    tenth of a denoising step's time on a CPU. As it holds for the whole process, only a program may do it."""
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(-3, 2**27)  # M_MMAP_THRESHOLD, in bytes: what is larger is still given back
        LIBC.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def join_processes() -> tuple[int, int]:
    """This process's rank and how many there are, if torchrun started them; else 0 and 1."""
    if "RANK" not in os.environ:
        return 0, 1
    distributed.init_process_group()
    atexit.register(distributed.destroy_process_group)
    return distributed.get_rank(), distributed.get_world_size()


class StableDiffusion(nn.Module):
    """Tokenizer, text encoder, autoencoder and denoiser, and what they do together."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        tokenizer, model = (WordPiece, BERTTextEncoder) if config.vocabulary else (Tokenizer, CLIPTextEncoder)
        self.tokenizer = tokenizer(config.vocabulary or config.vocab_size, config.text_length)
        self.text_encoder = model(config)
        self.vae = VAE(config)
        self.unet = UNet(config)
        self.offload_device: torch.device | None = None

    @classmethod
    def load(cls, path: str | Path, device="cpu", dtype=torch.float32, offload=False) -> "StableDiffusion":
        """A model from any SD v1 checkpoint: CompVis's .safetensors or .ckpt, a diffusers folder, `save`'s.

        With `offload` each of the three models is on `device` only while it works. Weights that need no
        conversion stay in the file, mapped. Raises OSError or ValueError, in one line, for any other file.
        """
        with blamed(path):
            config, tensors, maps = read_model(Path(path))
            with torch.device("meta"), blamed("its sizes", "use a whole Stable Diffusion v1 checkpoint"):
                model = cls(config)
            home = "cpu" if offload else device
            model.load_state_dict(fit(tensors, maps, model, home, dtype), assign=True)
        if tensors:
            warnings.warn(f"{path}: {len(tensors)} tensors not used: {first_few([*tensors])}", stacklevel=2)
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
        """Inside, `model` is on the device. Yields its dtype; offloaded weights leave there afterwards."""
        kept = [(parameter, parameter.data) for parameter in model.parameters()]
        try:
            for parameter, data in kept:
                parameter.data = data.to(self.device)
            yield kept[0][1].dtype
        finally:
            if self.offload_device:
                for parameter, data in kept:
                    parameter.data = data
            if hasattr(LIBC, "malloc_trim"):  # what comes next needs memory in other sizes
                LIBC.malloc_trim(0)

    def embed(self, texts: list[str]) -> Tensor:
        """B texts -> context (B, T, text_width). Warns of words that do not fit."""
        for text in dict.fromkeys(texts):
            if words := self.tokenizer.dropped(text):
                room = self.config.text_length - 2
                warnings.warn(f"a prompt has over {room} tokens; dropped: {' '.join(words)}", stacklevel=4)
        ids = torch.tensor([self.tokenizer(text) for text in texts], device=self.device)  # (B, T)
        with self.working(self.text_encoder):
            return self.text_encoder(ids)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w), scaled: the mean or, with noise like it, a sample"""
        moments = self.in_finite_dtype(lambda x: torch.cat(self.vae.encode(x), dim=1), image)  # (B, 2C, h, w)
        mean, logvar = moments.chunk(2, dim=1)
        latent = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return latent * self.config.latent_scale

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w), scaled -> (B, 3, H, W), about [-1, 1]"""
        latents = (latent / self.config.latent_scale).split(1)  # one by one, as memory peaks here
        return torch.cat([self.in_finite_dtype(self.vae.decode, latent) for latent in latents])

    def in_finite_dtype(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`work`, of the VAE, on `x`; the VAE turns float32 once it overflows, as SD's do in fp16."""
        with self.working(self.vae) as dtype:
            result = work(x.to(self.device, dtype))
            if dtype.itemsize < torch.float32.itemsize and not result.isfinite().all():
                self.vae.float()
                result = work(x.to(self.device, torch.float32))
        return result.float()

    def predict_noise(self, latent: Tensor, t: int, context: Tensor, guidance: float) -> Tensor:
        """(B, C, h, w), context (B, T, D) -> (B, C, h, w); of a context (2B, T, D) the first half is what to
        be guided away from (classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598)."""
        copies = len(context) // len(latent)
        timesteps = torch.full((len(context),), t, device=latent.device)
        noise_pred = self.unet(latent.to(context.dtype).repeat(copies, 1, 1, 1), timesteps, context).float()
        if copies == 1:
            return noise_pred
        unconditional, conditional = noise_pred.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def settle(self, *, steps, guidance, sampler, seed, n, width, height, image, strength, mask):
        """The width, height, image and mask that `generate` draws with, given such arguments; OSError or
        ValueError where it would not."""
        image = image if image is None else open_picture(image)
        mask = mask if mask is None else open_picture(mask, ground="black")
        unit, timesteps = self.config.downscale, self.config.timesteps
        possible = range(unit, 2**14 + 1, unit)  # in pixels; far beyond, numbers overflow before memory does
        sizes = [size // unit * unit for size in image.size] if image else 2 * [self.config.image_size]
        width, height = (size if given is None else given for given, size in zip((width, height), sizes))
        rules = [
            ("steps", steps, 1 <= steps <= timesteps, f"from 1 to {timesteps}"),
            ("guidance", guidance, math.isfinite(guidance), "a finite number, 1 for none"),
            ("sampler", sampler, sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
            ("n", n, n >= 1, "1 or more"),
            ("seed", seed, 0 <= seed <= 2**64 - n, f"from 0 to {2**64 - n}"),
            ("width", width, width in possible, f"a multiple of {unit} from {unit} to {possible[-1]}"),
            ("height", height, height in possible, f"a multiple of {unit} from {unit} to {possible[-1]}"),
            ("strength", strength, 0 < strength <= 1, "over 0 and at most 1"),
            ("mask", "given", mask is None or image is not None, "used with an image only"),
        ]
        for name, value, holds, wanted in rules:
            if not holds:
                raise ValueError(f"{name} is {value} and must be {wanted}")
        if mask and mask.size != image.size:
            raise ValueError(f"mask is {mask.size} and its image {image.size} pixels; make them of one size")
        return width, height, image, mask

    @torch.no_grad()
    def generate(
        self, prompt: str | list[str], negative: str = "", *, steps: int = 50, guidance: float = 7.5,
        sampler: str = "ddpm", seed: int | None = None, n: int = 1, width: int | None = None,
        height: int | None = None, image: str | Path | Image.Image | None = None, strength: float = 0.8,
        mask: str | Path | Image.Image | None = None, progress: bool = True,
    ) -> list[Image.Image]:  # fmt: skip
        """Draws `n` pictures of each prompt; picture i is the one of `seed + i`, whatever is drawn beside it.

        steps: 1 to 1000, of sampler "ddpm", "ddim" or "dpm++". guidance: how far to go to the prompt and from
        `negative`; 1: no guidance. width, height: pixels, multiples of 8, else the image's or the Config's.
        An image is changed, by `strength` in (0, 1], and with a mask of its size only where that is white.
        Raises OSError or ValueError for arguments out of range, images of no use, pictures not finite.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seed = random.randrange(2**32) if seed is None else int(seed)  # NumPy's integers, too
        width, height, image, mask = self.settle(
            steps=steps, guidance=guidance, sampler=sampler, seed=seed, n=n * len(prompts), width=width,
            height=height, image=image, strength=strength, mask=mask,
        )  # fmt: skip
        prompts = [text for text in prompts for _ in range(n)]
        unit = self.config.downscale
        shape = (self.config.latent_channels, height // unit, width // unit)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]

        def draw() -> Tensor:  # on the CPU, picture by picture, so that device and batch make no difference
            plain = {"dtype": torch.float32, "device": "cpu"}  # whatever PyTorch's defaults were set to
            noise = [torch.randn(shape, generator=generator, **plain) for generator in generators]
            return torch.stack(noise).to(self.device)  # (B, C, h, w)

        unconditional = [] if guidance == 1 else len(prompts) * [negative]
        context = self.embed(unconditional + prompts)  # (B or 2B, T, D)
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
            white = torch.from_numpy(np.array(mask))[None] >= 128  # (1, H, W)
            redrawn = F.max_pool2d(white.float(), unit).bool().to(self.device)  # (1, h, w)

        with self.working(self.unet):
            bar = tqdm(process.timesteps, disable=None if progress else True)  # None: if no terminal
            for i, t in enumerate(bar):
                if mask:
                    latent = torch.where(redrawn, latent, add_noise(original, noise, process.levels[i]))
                noise_pred = self.predict_noise(latent, t, context, guidance)
                latent = process.step(i, latent, noise_pred, draw)
        if mask:
            latent = torch.where(redrawn, latent, original)

        images = self.decode(latent)  # (B, 3, H, W)
        if not images.isfinite().all():
            raise ValueError(f"the picture is not finite in {context.dtype}; try bf16, fp32 or other weights")
        pictures = to_pictures(images)
        return [Image.composite(picture, image, mask) for picture in pictures] if mask else pictures


# ------------------------------------------------------------------------------------------------ 10 training
# First the autoencoder learns to give pictures back, then the denoiser learns in its latents. An objective
# reads a data set, draws batches from it, and is a module whose forward is the loss; `train` does the rest.
# Whatever is random follows from the seed and the step: a training that was stopped goes on as if it had not
# been, and of several processes each draws the whole batch and takes its share.

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
EDGE_WEIGHT, KL_WEIGHT = 0.5, 1e-3
BAD_STEPS = 10  # in a row, before training gives up


def read_captions(folder: Path) -> dict[Path, list[str]]:
    """The pictures of a data set, each with its captions: from metadata.jsonl (file_name, text), COCO's
    captions_*.json, or a NAME.txt beside each NAME.png. Raises OSError or ValueError where there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; name one that holds pictures and captions")
    files = sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/**", recursive=True)))  # follows links
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    places, captions = {path.name: path for path in pictures}, {}
    # A list names its pictures itself; a text belongs to the picture beside it.
    lists = [path for path in files if path == folder / "metadata.jsonl"]
    lists = lists or [path for path in files if path.match("captions_*.json")]
    texts = [(path.with_suffix(".txt"), path) for path in pictures if path.with_suffix(".txt").is_file()]
    for source, picture in [(source, None) for source in lists] or texts:
        with blamed(f"{source}: not captions that can be used", "README.md shows how they are written"):
            content = source.read_text(encoding="utf-8-sig")  # Windows' begins with a mark
            if picture:
                pairs = [(picture, content.strip())]
            elif source.suffix == ".jsonl":
                entries = map(json.loads, filter(str.strip, content.split("\n")))
                pairs = [(folder / entry["file_name"], entry["text"]) for entry in entries]
            else:
                content = json.loads(content)
                # A KeyError shall say what is missing.
                names = {f"image {image['id']}": image["file_name"] for image in content["images"]}
                named = ((names[f"image {entry['image_id']}"], entry) for entry in content["annotations"])
                pairs = [(places.get(name, folder / name), entry["caption"]) for name, entry in named]
            for path, text in pairs:
                if not isinstance(text, str):
                    raise TypeError(f"{path.name} is called {text}, which is no text")
                captions.setdefault(path, []).append(text)
    if not captions:
        raise ValueError(f"{folder}: no pictures with captions; README.md says how they are laid out")
    return captions


def read_pictures(paths: Collection[Path], side: int) -> Iterator[tuple[Path, Tensor]]:
    """Each path with its picture, (3, H, W) uint8, whose shorter side is made `side`. Those that cannot be
    read are left out and named at the end; raises ValueError where they are more than half."""
    failed = []
    for path in tqdm(paths, "reading", disable=None):
        try:
            image = open_picture(path)
        except (OSError, ValueError) as error:
            failed.append(one_line(error))
            continue
        size = [round(length * side / min(image.size)) for length in image.size]
        pixels = np.array(image.resize(size, Image.Resampling.LANCZOS))
        yield path, torch.from_numpy(pixels).permute(2, 0, 1)
    if len(failed) > len(paths) / 2:
        raise ValueError(f"{len(failed)} of {len(paths)} pictures cannot be used; mend {first_few(failed)}")
    if failed:
        warnings.warn(f"{len(failed)} of {len(paths)} pictures left out: {', '.join(failed)}", stacklevel=2)


def cut(picture: Tensor, side: int, place: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """A square (3, side, side) of (3, H, W); `place` says how far down and right, 0 to 1."""
    top, left = (round(share * (length - side)) for share, length in zip(place, picture.shape[1:]))
    return picture[:, top : top + side, left : left + side]


class Reconstruction(nn.Module):
    """The VAE's objective: pictures come back as they were (L1, also on the steps between neighbours) and
    latents stay near a standard normal (a little KL). SD's own adds a perceptual distance, LPIPS, and later
    a discriminator of patches (Esser et al. 2020, arXiv:2012.09841), for textures that L1 leaves soft."""

    def __init__(self, model: StableDiffusion, args: argparse.Namespace):
        super().__init__()
        self.model, self.args = model.requires_grad_(False), args
        model.vae.requires_grad_(True)
        self.pictures = [picture for _, picture in read_pictures(read_captions(args.data), args.resolution)]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Squares of pictures (B, 3, H, W) in [-1, 1] and noise (B, C, h, w)"""
        picks = torch.randint(len(self.pictures), (count,), generator=generator).tolist()
        places = torch.rand(count, 2, generator=generator).tolist()
        cuts = [cut(self.pictures[i], self.args.resolution, place) for i, place in zip(picks, places)]
        images = torch.stack(cuts)
        flips = torch.rand(count, generator=generator) < (0.5 if self.args.flip else 0)
        images[flips] = images[flips].flip(-1)
        side = self.args.resolution // self.model.config.downscale
        noise = torch.randn(count, self.model.config.latent_channels, side, side, generator=generator)
        return images / 127.5 - 1, noise

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = (moment.float() for moment in self.model.vae.encode(image))  # (B, C, h, w) each
        error = self.model.vae.decode(mean + (0.5 * logvar).exp() * noise).float() - image  # (B, 3, H, W)
        edges = sum(error.diff(dim=dim).abs().mean() for dim in (-1, -2))
        kl = (mean**2 + logvar.exp() - 1 - logvar).mean() / 2  # Kingma and Welling 2013, app. B
        return error.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl

    @torch.no_grad()
    def finish(self) -> None:
        """Measures on the data set what brings the latents to unit variance, for the Config."""
        self.model.config = replace(self.model.config, latent_scale=1.0)  # for `encode` not to scale them
        batch = (tensor.to(self.model.device) for tensor in self.draw(64, torch.Generator().manual_seed(0)))
        pairs = zip(*(tensor.split(1) for tensor in batch))  # one by one, as memory peaks here
        latents = torch.cat([self.model.encode(image, noise) for image, noise in pairs])
        self.model.config = replace(self.model.config, latent_scale=1 / latents.std().item())

    @torch.no_grad()
    def samples(self) -> list[Image.Image]:
        """Pictures, each followed by what becomes of it."""
        pictures = []
        for image in self.draw(16, torch.Generator().manual_seed(0))[0].split(1):
            pictures += to_pictures(image) + to_pictures(self.model.decode(self.model.encode(image)))
        return pictures


class NoisePrediction(nn.Module):
    """The UNet's objective: to tell the noise in a latent (Ho et al. 2020, alg. 1, eq. 14). `--min-snr`
    keeps the timesteps of little noise from outweighing the others (Hang et al. 2023, sec. 3.4,
    arXiv:2303.09556)."""

    def __init__(self, model: StableDiffusion, args: argparse.Namespace):
        super().__init__()
        self.model, self.args = model.requires_grad_(False), args
        model.unet.requires_grad_(True)
        model.text_encoder.requires_grad_(args.train_text_encoder)
        self.register_buffer("alphas_cumprod", noise_schedule(model.config).float().to(model.device))
        captions, self.ids, self.moments = read_captions(args.data), [], []
        self.prompts = [text for texts in captions.values() for text in texts][:16]
        if args.prompts:
            with blamed(args.prompts, "write a prompt on each line, in UTF-8"):
                lines = args.prompts.read_text(encoding="utf-8-sig").splitlines()
                self.prompts = [*filter(str.strip, lines)]
                if not self.prompts:
                    raise ValueError("there is no prompt in it")
        pictures = read_pictures(captions, args.resolution)
        while chunk := list(islice(pictures, 16)):
            images = torch.stack([cut(picture, args.resolution) for _, picture in chunk])
            ids = [torch.tensor([model.tokenizer(text) for text in captions[path]]) for path, _ in chunk]
            for version in (images, images.flip(-1)) if args.flip else (images,):
                with torch.no_grad():
                    version = version.to(model.device) / 127.5 - 1  # (B, 3, H, W)
                    self.moments += torch.cat(model.vae.encode(version), dim=1).cpu()  # (2C, h, w) each
                self.ids += ids
        self.no_text = torch.tensor(model.tokenizer(""))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Latents, scaled, and noise (B, C, h, w) each, timesteps (B,), ids (B, T)"""
        picks = torch.randint(len(self.moments), (count,), generator=generator).tolist()
        moments = torch.stack([self.moments[pick] for pick in picks])  # (B, 2C, h, w)
        mean, logvar = moments.chunk(2, dim=1)
        latent = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        t = torch.randint(self.model.config.timesteps, (count,), generator=generator)
        choices = (self.ids[pick] for pick in picks)  # (captions of the picture, T) each
        ids = torch.stack([texts[torch.randint(len(texts), (), generator=generator)] for texts in choices])
        ids[torch.rand(count, generator=generator) < self.args.drop_text] = self.no_text  # for guidance
        return latent * self.model.config.latent_scale, torch.randn(mean.shape, generator=generator), t, ids

    def forward(self, latent: Tensor, noise: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        level = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        noise_pred = self.model.unet(add_noise(latent, noise, level), t, self.model.text_encoder(ids))
        weight = (self.args.min_snr * (1 - level) / level).clamp(max=1)  # min(SNR, gamma) / SNR
        return (weight * (noise_pred.float() - noise) ** 2).mean()

    def finish(self) -> None:
        """Nothing is left to do."""

    def samples(self) -> list[Image.Image]:
        """Pictures of the prompts."""
        settings = {"steps": 20, "sampler": "dpm++", "seed": self.args.seed, "progress": False}
        settings |= {"width": self.args.resolution, "height": self.args.resolution}
        return [self.model.generate(prompt, **settings)[0] for prompt in self.prompts]


OBJECTIVES = {"vae": Reconstruction, "unet": NoisePrediction}


def new_model(config: Config, seed: int) -> StableDiffusion:
    """A model with random weights. At first no residual block and no transformer of the denoiser adds
    anything, and it predicts no noise."""
    torch.manual_seed(seed)
    model = StableDiffusion(config)
    for name, parameter in model.unet.named_parameters():
        if re.search(r"\b(conv2|proj_out|conv_out)\.", name):
            nn.init.zeros_(parameter)
    return model


def first_model(args: argparse.Namespace) -> StableDiffusion:
    """The model that training starts from: --init's, or a new one of --config; and with --text-encoder bert,
    BERT in place of its text encoder. With --resume it is what was saved."""
    if source := args.out if args.resume and args.out.exists() else args.init:
        model = deepcopy(StableDiffusion.load(source))  # in memory, so that the file may be replaced
    else:
        with blamed(f"config {args.config}", "give fields of Config as JSON, or a file.json of them"):
            is_file = args.config.endswith(".json")
            text = Path(args.config).read_text(encoding="utf-8-sig") if is_file else args.config
            model = new_model(Config.from_json(text), args.seed)
            if model.config.vocab_size < (least := len(model.tokenizer.ids)):
                raise ValueError(f"vocab_size is {model.config.vocab_size} and must be {least} or more")
    if args.text_encoder == "clip" or model.config.vocabulary:
        return model
    fields, weights = read_bert(args.bert)
    if fields["text_width"] != model.config.text_width:
        raise ValueError(f"{args.bert}: its width is {fields['text_width']}; put that text_width in --config")
    weights |= {name: value for name, value in model.state_dict().items() if name not in weights}
    with torch.device("meta"):
        model = StableDiffusion(replace(model.config, **fields))
    model.load_state_dict(weights, strict=False, assign=True)  # but for CLIP's
    return model


def sheet(pictures: list[Image.Image], columns: int = 8) -> Image.Image:
    """Pictures of one size in rows."""
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        grid.paste(picture, (i % columns * width, i // columns * height))
    return grid


def draw_curve(losses: Tensor, width: int = 800, height: int = 400) -> Image.Image:
    """The losses (N,) over the steps, on a logarithmic axis; a column is the median of its steps."""
    columns = [column.nanmedian() for column in losses.tensor_split(min(len(losses), width))]
    curve = torch.stack(columns).log10().nan_to_num(0.0, 0.0, 0.0)
    low, high = curve.min().item(), curve.max().item()
    heights = (high - curve) / max(high - low, 1e-9) * (height - 1)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.line([(i * width / len(curve), y) for i, y in enumerate(heights.tolist())], "navy")
    text = f"{len(losses)} steps, loss from {10**high:.4g} down to {10**low:.4g}"
    pen.text((width // 2, 4), text, "black")
    return picture


class Trainer:
    """An objective's weights on their way: their average, the optimizer, the losses so far, the files."""

    def __init__(self, objective: nn.Module, args: argparse.Namespace):
        self.objective, self.args, self.losses = objective, args, []
        self.state_file = args.out.with_suffix(".state")
        named = [(name, weight) for name, weight in objective.named_parameters() if weight.requires_grad]
        self.weights = [weight for _, weight in named]
        self.average = [weight.detach().clone() if args.ema else weight.detach() for weight in self.weights]
        groups = {args.weight_decay: [], 0.0: []}
        for name, weight in named:  # biases, norms and embeddings do not decay
            groups[args.weight_decay if weight.ndim > 1 and "embedding" not in name else 0.0].append(weight)
        groups = [{"params": weights, "weight_decay": decay} for decay, weights in groups.items()]
        self.optimizer = torch.optim.AdamW(groups, fused=True)  # fused: makes no copies of all weights

    def update(self, loss: float) -> None:
        """One step of the optimizer and of the average, by the gradients that the weights have; none where
        they or the loss are not finite. Raises ValueError when that happens ten times in a row."""
        args, step = self.args, len(self.losses)
        norm = nn.utils.clip_grad_norm_(self.weights, args.clip)
        self.losses.append(loss if norm.isfinite() else math.nan)
        if math.isfinite(self.losses[-1]):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.optimizer.step()
            kept = min(args.ema, (1 + step) / (10 + step))  # at first there is little to average over
            get_ema_multi_avg_fn(kept)(self.average, self.weights, None)
        elif any(map(math.isfinite, self.losses[-BAD_STEPS:])) or step + 1 < BAD_STEPS:
            warnings.warn(f"step {step + 1} left out: its loss or gradient is not finite", stacklevel=2)
        else:
            raise ValueError(f"{BAD_STEPS} steps in a row are not finite; lower --lr, or use --dtype fp32")
        self.optimizer.zero_grad()

    def rate(self, step: int) -> float:
        """The learning rate: up in a line over the warm-up, then down in a cosine."""
        steps, warmup = self.args.steps, self.args.warmup
        if step < warmup:
            return self.args.lr * (step + 1) / warmup
        return self.args.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the average weights."""
        own = [weight.data for weight in self.weights]
        for weight, average in zip(self.weights, self.average):
            weight.data = average
        yield
        for weight, data in zip(self.weights, own):
            weight.data = data

    def save(self) -> None:
        """Writes what `resume` reads, first, so that a kill in between loses nothing, then the model with the
        average weights, and the losses."""
        state = {"weights": self.weights, "average": self.average, "optimizer": self.optimizer.state_dict()}
        rows = [("step", "loss"), *enumerate(self.losses, 1)]
        with blamed(f"{self.args.out} cannot be saved", "make room there, and add --resume"):
            with written_whole(self.state_file) as file:
                torch.save(state | {"losses": self.losses}, file)
            with self.averaged():
                self.objective.finish()
                self.objective.model.save(self.args.out)
            with written_whole(self.args.out.with_suffix(".loss.csv")) as file:
                file.writelines(f"{step},{loss}\n".encode() for step, loss in rows)
            with written_whole(self.args.out.with_suffix(".loss.png")) as file:
                draw_curve(torch.tensor(self.losses)).save(file, "png")

    def resume(self) -> None:
        """Takes up where `save` was called last."""
        with blamed(f"{self.state_file}: cannot be resumed from", "give the same options, or another --out"):
            state = torch.load(self.state_file, "cpu", mmap=True, weights_only=True)
            for weights, kind in ((self.weights, "weights"), (self.average, "average")):
                for weight, saved in zip(weights, state[kind], strict=True):
                    weight.data.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            for weight, moments in self.optimizer.state.items():
                for name, kept in moments.items():  # into memory, laid out as the weight is on this device
                    like = weight if kept.shape == weight.shape else kept
                    moments[name] = torch.empty_like(like).copy_(kept)
            self.losses = state["losses"]


def train(args: argparse.Namespace) -> int:
    """Trains one part of a model; `args` are those of `python sd.py train --help`. Returns the exit status,
    128 and more where a signal asked to stop. Raises OSError or ValueError for what cannot be used."""
    rank, processes = join_processes()
    device = pick_device(args.device)
    if args.out.exists() and not args.resume:
        raise ValueError(f"{args.out} is there already; go on with it by --resume, or name another --out")
    model = first_model(args).to(device)
    args.resolution = args.resolution or model.config.image_size
    if args.resolution % (unit := model.config.downscale):
        raise ValueError(f"resolution is {args.resolution}, which is not a multiple of {unit}")
    objective = OBJECTIVES[args.part](model, args)
    # On a CPU channels_last is no faster.
    objective.to(memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)
    trainer = Trainer(objective, args)
    if args.resume:
        trainer.resume()
    if args.compile:
        objective.compile()
    loss_of = nn.parallel.DistributedDataParallel(objective) if processes > 1 else objective
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))

    batch_size = args.batch_size * processes
    per_step, done = args.accumulate * batch_size, len(trainer.losses)
    quiet = None if rank == 0 else True  # None: if no terminal
    bar = tqdm(total=args.steps * per_step, initial=done * per_step, unit=" pictures", disable=quiet)
    if rank == 0 and done >= args.steps:  # it may have been killed between its last state and the model
        trainer.save()
    for step in range(done + 1, args.steps + 1):
        generator = torch.Generator().manual_seed(args.seed * 2**32 + step)
        report = torch.zeros(2, device=device)  # the loss, and whether to stop
        for left in reversed(range(args.accumulate)):
            batch = [tensor[rank::processes].to(device) for tensor in objective.draw(batch_size, generator)]
            # Gradients are exchanged once a step, with its last batch.
            exchange = loss_of.no_sync() if processes > 1 and left else nullcontext()
            with exchange, torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                loss = loss_of(*batch) / args.accumulate
            loss.backward()
            report[0] += loss.detach() / processes
        report[1] = len(signals)
        if processes > 1:
            distributed.all_reduce(report)
        loss, stopped = report.tolist()
        trainer.update(loss)
        bar.update(per_step)
        bar.set_postfix(loss=loss, lr=trainer.rate(step - 1), refresh=False)
        if rank == 0 and args.sample_every and step % args.sample_every == 0:
            with trainer.averaged(), written_whole(args.out.with_suffix(f".{step}.png")) as file:
                sheet(objective.samples()).save(file, "png")
        if rank == 0 and (stopped or step == args.steps or step % args.save_every == 0):
            trainer.save()
        if rank == 0 and stopped:
            print(f"sd.py: stopped after step {step}; to go on, add --resume", file=sys.stderr)
        if stopped:
            return 128 + max(signals, default=signal.SIGTERM)
    return 0


# -------------------------------------------------------------------------------------------- 11 command line

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WEBUI_QUOTED = r'[,:"\n]'
MODEL_SUFFIX = r"\.(safetensors|ckpt)$"
WEBUI_SAMPLERS = {"ddpm": "DDPM", "ddim": "DDIM", "dpm++": "DPM++ 2M"}


class Parser(argparse.ArgumentParser):
    """Raises a ValueError for arguments that are wrong."""

    def __init__(self, usage: str):
        help_format = lambda prog: argparse.HelpFormatter(prog, max_help_position=24, width=80)
        super().__init__(usage=usage, allow_abbrev=False, formatter_class=help_format)

    def error(self, message: str):
        raise ValueError(f"{message}; see --help")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options for a picture."""
    parser = Parser("python sd.py --prompt TEXT [options], or python sd.py train --help")
    option = parser.add_argument
    option("--prompt", metavar="TEXT", required=True, help="what to draw")
    option("--negative", metavar="TEXT", default="", help="what to keep out of it")
    option("--weights", metavar="PATH", default=DEFAULT_WEIGHTS, type=Path,
           help="checkpoint or diffusers folder (the emoji model)")  # fmt: skip
    option("--out", metavar="FILE", default=Path("out.png"), type=Path,
           help="a PNG; out-1.png, ... where it exists (out.png)")  # fmt: skip
    option("--steps", metavar="N", default=50, type=int, help="denoising steps, 1 to 1000 (50)")
    option("--guidance", metavar="G", default=7.5, type=float, help="how far to follow the prompt (7.5)")
    option("--sampler", metavar="S", default="ddpm", choices=SAMPLERS, help="ddpm, ddim or dpm++ (ddpm)")
    option("--seed", metavar="N", type=int, help="repeats a picture; picture i is of seed + i (random)")
    option("--n", metavar="N", default=1, type=int, help="how many pictures (1)")
    option("--width", metavar="W", type=int, help="pixels, a multiple of 8 (the image's or model's)")
    option("--height", metavar="H", type=int, help="likewise")
    option("--image", metavar="FILE", type=Path, help="a picture to start from")
    option("--strength", metavar="S", type=float, help="how much of it to change, over 0 to 1 (0.8)")
    option("--mask", metavar="FILE", type=Path, help="redraw the image only where this is white")
    option("--device", metavar="D", help="cpu, cuda, cuda:1, mps, ... (the fastest there is)")
    option("--dtype", metavar="D", choices=DTYPES, help="fp32, fp16 or bf16 (fp32 on a CPU, else fp16)")
    option("--offload", action="store_true", help="keep each model on the device only at work")
    option("--compile", action="store_true", help="compile the denoiser: slow start, faster steps")
    return parser.parse_args(arguments)


def parse_train(arguments: list[str]) -> argparse.Namespace:
    """The options for training; raises ValueError for one out of range."""
    parser = Parser("python sd.py train DATA --out FILE [options]")
    option = parser.add_argument
    option("data", metavar="DATA", type=Path, help="folder of pictures with captions")
    option("--out", metavar="FILE", required=True, type=Path, help="the model; what resuming needs beside it")
    option("--part", metavar="P", default="unet", choices=OBJECTIVES, help="to train: vae or unet (unet)")
    option("--init", metavar="PATH", type=Path, help="checkpoint to start from (random weights)")
    option("--config", metavar="JSON", default="{}", help="else fields of Config, or a file of them (SD v1)")
    option("--steps", metavar="N", default=10000, type=int, help="of the optimizer (10000)")
    option("--batch-size", metavar="B", default=16, type=int, help="pictures at once, per process (16)")
    option("--accumulate", metavar="A", default=1, type=int, help="batches per step (1)")
    option("--resolution", metavar="R", type=int, help="pixels, a multiple of 8 (the model's)")
    option("--flip", action="store_true", help="mirrored pictures, too")
    option("--lr", metavar="LR", default=1e-4, type=float, help="highest learning rate (1e-4)")
    option("--warmup", metavar="N", default=100, type=int, help="steps up to it; then down, a cosine (100)")
    option("--weight-decay", metavar="W", default=0.01, type=float, help="of layers' matrices only (0.01)")
    option("--clip", metavar="C", default=1.0, type=float, help="greatest norm of the gradient (1.0)")
    option("--ema", metavar="E", default=0.999, type=float, help="decay of the average; 0: none (0.999)")
    option("--drop-text", metavar="P", default=0.1, type=float, help="share without text, for guidance (0.1)")
    option("--min-snr", metavar="G", default=math.inf, type=float, help="gamma of min-SNR weights (none)")
    option("--text-encoder", metavar="T", default="clip", choices=["clip", "bert"], help="or bert (clip)")
    option("--bert", metavar="PATH", default=HERE / "weights" / "bert-base-uncased", type=Path,
           help="its folder (weights/bert-base-uncased)")  # fmt: skip
    option("--train-text-encoder", action="store_true", help="with the UNet")
    option("--save-every", metavar="N", default=1000, type=int, help="steps (1000)")
    option("--sample-every", metavar="N", default=0, type=int, help="steps from sheet to sheet (0: none)")
    option("--prompts", metavar="FILE", type=Path, help="for the sheets, a prompt a line (captions)")
    option("--seed", metavar="N", default=0, type=int, help="of all that is random (0)")
    option("--device", metavar="D", help="cpu, cuda, ... (the fastest there is)")
    option("--dtype", metavar="D", default="fp32", choices=["fp32", "bf16"], help="to compute in (fp32)")
    option("--compile", action="store_true", help="slow start, faster steps")
    option("--resume", action="store_true", help="go on where the same command stopped")
    args = parser.parse_args(arguments)
    rules = [
        ("over 0", lambda value: value > 0, "steps batch_size accumulate save_every resolution clip min_snr"),
        ("over 0 and finite", lambda value: 0 < value < math.inf, "lr"),
        ("0 or more, and finite", lambda value: 0 <= value < math.inf, "sample_every warmup weight_decay"),
        ("from 0 to below 1", lambda value: 0 <= value < 1, "ema drop_text"),
        ("from 0 to 2**31 - 1", lambda value: 0 <= value < 2**31, "seed"),
    ]
    for wanted, holds, names in rules:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                parser.error(f"{name.replace('_', '-')} is {value} and must be {wanted}")
    if args.out.suffix != ".safetensors" or not os.access(f"{args.out.parent}/.", os.W_OK):
        parser.error(f"out is {args.out} and must be a .safetensors in a folder that can be written to")
    return args


def free_names(path: Path) -> Iterator[Path]:
    """Those of out.png, out-1.png, ... that are not there."""
    names = chain([path], (path.with_stem(f"{path.stem}-{i}") for i in count(1)))
    return (name for name in names if not os.path.lexists(name))


def claim(path: Path) -> Path:
    """The first free name like `path`. Now it is there, empty: no other process takes it."""
    for name in free_names(path):
        with suppress(FileExistsError):
            name.touch(exist_ok=False)
            return name


def save_picture(picture: Image.Image, path: Path, parameters: str) -> Path:
    """Saves a PNG with `parameters` in it under the first free name like `path`, which is returned."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters)
    name = claim(path)
    try:
        with blamed(f"{name} cannot be saved", "make room there"), written_whole(name) as file:
            picture.save(file, "png", pnginfo=info)
    except BaseException:
        name.unlink()
        raise
    return name


def webui_parameters(args: argparse.Namespace, seed: int, width: int, height: int) -> str:
    """What made a picture, in the form that AUTOMATIC1111's web UI writes and reads."""
    settings = {
        "Steps": args.steps, "Sampler": WEBUI_SAMPLERS[args.sampler], "CFG scale": args.guidance,
        "Seed": seed, "Size": f"{width}x{height}", "Model": re.sub(MODEL_SUFFIX, "", args.weights.name),
    }  # fmt: skip
    if args.image:
        settings["Denoising strength"] = args.strength
    pairs = []
    for name, value in settings.items():
        value = str(value).removesuffix(".0") if isinstance(value, float) else str(value)
        pairs.append(f"{name}: {json.dumps(value) if re.search(WEBUI_QUOTED, value) else value}")
    negative = f"\nNegative prompt: {args.negative}" if args.negative else ""
    return f"{args.prompt}{negative}\n{', '.join(pairs)}"


def run(args: argparse.Namespace) -> int:
    """Draws and saves the pictures; returns the exit status."""
    for name in ("prompt", "negative"):
        if re.search("[\ud800-\udfff]", getattr(args, name)):  # what Python makes of other bytes
            raise ValueError(f"{name} is not valid UTF-8; write it anew")
    device = pick_device(args.device)
    dtype = args.dtype or ("fp32" if device.type == "cpu" else "fp16")
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"out is {args.out} and must end in .png")
    with blamed(f"out is {args.out}", "name another"):
        claim(args.out).unlink()  # found out now, not once the picture is there
    if args.strength is not None and args.image is None:
        raise ValueError("strength is given and must be used with an image only")
    args.strength = 0.8 if args.strength is None else args.strength
    settings = ("steps", "guidance", "sampler", "width", "height", "image", "strength", "mask")
    settings = {name: getattr(args, name) for name in settings}
    seed = random.randrange(2**32) if args.seed is None else args.seed
    rank, processes = join_processes()
    names = max(args.n, 0) * [args.out]
    if processes > 1:  # all go by the same seed, and each picture has the name that one process would give it
        shared = [seed, list(islice(free_names(args.out), len(names)))]
        distributed.broadcast_object_list(shared)
        seed, names = shared
    with warnings.catch_warnings(record=True) as notes:
        model = StableDiffusion.load(args.weights, device, DTYPES[dtype], args.offload)
    settled = model.settle(seed=seed, n=args.n, **settings)
    width, height, settings["image"], settings["mask"] = settled  # opened once for all
    if args.compile:
        model.unet.compile(mode="reduce-overhead")  # with CUDA graphs, where there is CUDA
    about = f"sd.py: {args.weights.name} on {device} in {dtype}, {width}x{height}, "
    about += f"{args.steps} steps of {args.sampler}, guidance {args.guidance:g}, seed {seed}"
    if rank == 0:
        print(about, file=sys.stderr)
        for note in notes:
            warnings.warn(note.message, stacklevel=2)
    for i in range(rank, args.n, processes):  # one by one, so that each is saved when it is done
        [picture] = model.generate(args.prompt, args.negative, seed=seed + i, **settings)
        print(save_picture(picture, names[i], webui_parameters(args, seed + i, width, height)))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    reuse_memory()
    warnings.showwarning = lambda message, *_: print(f"sd.py: note: {one_line(message)}", file=sys.stderr)
    try:
        if arguments[:1] == ["train"]:
            return train(parse_train(arguments[1:]))
        return run(parse(arguments))
    except (OSError, ValueError) as error:
        print(f"sd.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if "--compile" in arguments and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            reason, *_ = str(error).split("\n\n")  # what follows is for developers
            wrong = f"cannot compile: {one_line(reason)}; leave out --compile"
        elif isinstance(error, MemoryError) or "allocate" in str(error):  # as every device says it
            smaller = "--batch-size, --ema 0" if arguments[:1] == ["train"] else "size, --offload"
            wrong = f"out of memory; try a smaller {smaller} or --dtype bf16"
        else:
            raise
        print(f"sd.py: error: {wrong}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
