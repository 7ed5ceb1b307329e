"""The model that is used when no weights are named."""

import json
from dataclasses import replace

import figures
import numpy as np
import pytest
import torch
from conftest import ROOT, relative_error
from emoji_quality import background, called, emoji, nearest
from PIL import Image
from safetensors import safe_open

import sd

NAMED = [
    ("red apple", "white"), ("slice of pizza", "green"), ("grinning face", "blue"), ("dog face", "pink"),
    ("red heart", "yellow"), ("man cook", "turquoise"), ("octopus", "gray"), ("snowman", "purple"),
]  # fmt: skip
needs_font = pytest.mark.skipif(
    not all(emoji.installed(file).is_file() for file in (emoji.FONT, emoji.NAMES, emoji.KEYWORDS)),
    reason="fonts-noto-color-emoji, unicode-data and unicode-cldr-core are not installed",
)


@pytest.fixture(scope="module")
def images():
    texts = [name if i % 2 else f"{emoji.article(name)} {name}" for i, (name, _) in enumerate(NAMED)]
    prompts = [emoji.captions([text], color)[0] for text, (_, color) in zip(texts, NAMED)]
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
    shown = [emoji.emoji_names()[nearest(image, color)] for (_, color), image in zip(NAMED, images)]
    assert sum(one == name for one, (name, _) in zip(shown, NAMED)) >= 7


@needs_font
def test_words_of_daily_life_are_drawn():
    """For most words, the nearest of all emoji has the word in its name or among its keywords."""
    prompts = ["dog", "house", "car", "happy", "rain", "kitten", "a fish", "a tree"]
    images = sd.load(sd.DEFAULT_WEIGHTS).generate(prompts, seed=0, progress=False)
    right = [nearest(image) in called(prompt.split()[-1]) for image, prompt in zip(images, prompts)]
    assert sum(right) >= 7


def test_attention_of_the_tour_is_that_of_the_modules():
    """The values that it weights give what cross-attention returns, at each layer and step."""
    model, errors = sd.load(sd.DEFAULT_WEIGHTS), []

    def compare(module, inputs, output):
        shares, (_, context) = figures.attention_map(module, *inputs), inputs
        values = module.v(context).unflatten(-1, (module.heads, -1)).transpose(1, 2)
        mixed = (shares @ values).transpose(1, 2).flatten(2)
        errors.append(relative_error(module.out(mixed), output))

    for name, module in model.unet.named_modules():
        if name.endswith("cross_attention"):
            module.register_forward_hook(compare)
    figures.word_maps(model, "a red apple", seed=0, steps=2)
    assert max(errors) < 1e-5 and len(errors) == 2 * 7


def test_maps_of_words_are_those_of_their_tokens(monkeypatch):
    """Where token j gets j of the attention, a word gets the sum of its tokens; not the negative prompt."""

    def numbered(module, x, context):
        shares = torch.arange(float(context.shape[1])).repeat(len(x), module.heads, x.shape[1], 1)
        shares[: len(x) // 2] = torch.nan
        return shares

    model = sd.load(sd.DEFAULT_WEIGHTS)
    monkeypatch.setattr(figures, "attention_map", numbered)
    words, expected, position = [("red", 1), ("blackberries", 3), ("a", 1)], [], 1
    assert [len(ids) for _, ids in model.tokenizer.words("red blackberries a")] == [n for _, n in words]
    for word, tokens in words:
        expected.append((word, sum(range(position, position + tokens))))
        position += tokens
    maps = figures.word_maps(model, "red blackberries a", seed=0, steps=1)
    assert [(word, shares.mean().item()) for word, shares in maps] == expected
    assert {shares.shape for _, shares in maps} == {(16, 16)}


def test_command_line_uses_it(run_sd, tmp_path):
    result = run_sd("--prompt", "a red apple", "--seed", 0)
    assert result.returncode == 0 and "emoji.safetensors" in result.stderr and "128x128" in result.stderr
    image = Image.open(tmp_path / "out.png")
    assert image.size == (128, 128) and image.mode == "RGB" and background(image) == "white"
    assert "a red apple" in image.info["parameters"] and np.asarray(image).std() > 30
