"""The model that is used when no weights are named."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from emoji_quality import background, emoji, small
from PIL import Image, ImageFont

import sd

NAMED = [("red apple", "white"), ("slice of pizza", "green"), ("grinning face", "blue"), ("dog face", "pink"),
         ("red heart", "yellow"), ("man cook", "turquoise"), ("octopus", "gray"), ("snowman", "purple")]  # fmt: skip
needs_font = pytest.mark.skipif(
    not Path(emoji.installed(emoji.FONT)).is_file() or not Path(emoji.installed(emoji.NAMES)).is_file(),
    reason="fonts-noto-color-emoji and unicode-data are not installed, and `make emoji` has not fetched them",
)


@pytest.fixture(scope="module")
def model():
    return sd.StableDiffusion.load(sd.DEFAULT_WEIGHTS)


@pytest.fixture(scope="module")
def drawn(model):
    prompts = [emoji.captions(*named)[i % 2] for i, named in enumerate(NAMED)]  # with article, without
    return [model.generate(prompt, seed=i, progress=False)[0] for i, prompt in enumerate(prompts)]


def test_it_is_small_and_of_the_sizes_in_the_recipe(model):
    assert sd.DEFAULT_WEIGHTS.stat().st_size <= 16e6
    tensors, *_ = sd.read_file(sd.DEFAULT_WEIGHTS)
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16"}
    recipe = sd.Config.from_json((ROOT / "weights" / "emoji.json").read_text())
    assert sd.replace(model.config, latent_scale=recipe.latent_scale) == recipe


def test_backgrounds_have_the_colour_named(drawn):
    assert [background(picture) for picture in drawn] == [colour for _, colour in NAMED]


@needs_font
def test_pictures_are_of_what_is_named(drawn):
    """Of all emoji on that background, the nearest to most of them."""
    names, font = emoji.emoji_names(), ImageFont.truetype(emoji.installed(emoji.FONT), emoji.GLYPH)
    right = 0
    for (name, colour), picture in zip(NAMED, drawn):
        known = {other: small(emoji.draw(one, colour, font)) for one, other in names.items()}
        assert name in known
        right += name == min(known, key=lambda other: ((known[other] - small(picture)) ** 2).sum())
    assert right >= 6


def test_the_command_line_uses_it(run_sd, tmp_path):
    result = run_sd("--prompt", "a red apple", "--seed", 0, "--out", tmp_path / "out.png")
    assert result.returncode == 0 and "emoji.safetensors" in result.stderr and "128x128" in result.stderr
    picture = Image.open(tmp_path / "out.png")
    assert picture.size == (128, 128) and background(picture.convert("RGB")) == "white"
    assert "a red apple" in picture.info["parameters"]
    assert np.asarray(picture.convert("RGB")).std() > 30


def test_it_carries_its_config():
    _, metadata, _ = sd.read_file(sd.DEFAULT_WEIGHTS)
    assert json.loads(metadata[sd.OWN_MARK])["image_size"] == 128
