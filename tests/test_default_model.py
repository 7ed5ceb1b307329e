"""The model that is used when no weights are named."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from emoji_quality import background, emoji, small
from PIL import Image, ImageFont
from safetensors import safe_open

import sd

NAMED = [
    ("red apple", "white"), ("slice of pizza", "green"), ("grinning face", "blue"), ("dog face", "pink"),
    ("red heart", "yellow"), ("man cook", "turquoise"), ("octopus", "gray"), ("snowman", "purple"),
]  # fmt: skip
needs_font = pytest.mark.skipif(
    not emoji.installed(emoji.FONT).is_file() or not emoji.installed(emoji.NAMES).is_file(),
    reason="fonts-noto-color-emoji and unicode-data are not installed, and `make emoji` has not fetched them",
)


@pytest.fixture(scope="module")
def images():
    prompts = [emoji.captions(*named)[i % 2] for i, named in enumerate(NAMED)]  # with article, without
    return sd.load(sd.DEFAULT_WEIGHTS).generate(prompts, seed=0, progress=False)


def test_file_is_small_and_has_the_config_of_the_recipe():
    assert sd.DEFAULT_WEIGHTS.stat().st_size <= 16e6
    with safe_open(sd.DEFAULT_WEIGHTS, "pt") as file:
        weights = [name for name in file.keys() if not name.endswith("position_ids")]  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in weights} == {"F16"}
        config = sd.Config(**json.loads(file.metadata()["sd.py"]))
    recipe = sd.Config(**json.loads((ROOT / "weights" / "emoji.json").read_text(encoding="utf-8")))
    assert replace(config, latent_scale=recipe.latent_scale) == recipe  # which training measures


def test_backgrounds_have_the_color_named(images):
    assert [background(image) for image in images] == [color for _, color in NAMED]


@needs_font
def test_emoji_are_those_named(images):
    """For most images, the nearest of all emoji on that background is the one named."""
    names, font = emoji.emoji_names(), ImageFont.truetype(emoji.installed(emoji.FONT), emoji.GLYPH)
    right = 0
    for (name, color), image in zip(NAMED, images):
        known = {other: small(emoji.draw(one, color, font)) for one, other in names.items()}
        assert name in known
        right += name == min(known, key=lambda other: ((known[other] - small(image)) ** 2).sum())
    assert right >= 6


def test_command_line_uses_it(run_sd, tmp_path):
    result = run_sd("--prompt", "a red apple", "--seed", 0)
    assert result.returncode == 0 and "emoji.safetensors" in result.stderr and "128x128" in result.stderr
    image = Image.open(tmp_path / "out.png")
    assert image.size == (128, 128) and image.mode == "RGB" and background(image) == "white"
    assert "a red apple" in image.info["parameters"] and np.asarray(image).std() > 30
