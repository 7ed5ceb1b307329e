"""Measures the default model: `python tests/emoji_quality.py [--weights FILE] [--sheet FILE]`.

It asks for full names, on backgrounds that were held out, and on white for keywords, words of daily life, and
pairs of keywords that no caption had; image i of each kind has seed i. An image is right if the nearest of
all emoji on its background, by pixels at 32x32, is called so. The sheet shows the first 64 of a seeded
shuffle of words of daily life and of keywords of one word in lower case, and one word with eight seeds.
"""

import argparse
import random
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sd  # noqa: E402
from weights import emoji  # noqa: E402
from weights.objectives import sheet  # noqa: E402

EVERYDAY = """
airplane angel angry animal ant apple baby ball balloon banana bathtub beach bear bed bee beer bell bike
bird birthday boat bomb bone book brain bread bridge broken bus butterfly cake camera candle candy car
carrot castle cat cheese cherry chicken chocolate christmas church clock cloud clown coffee computer cookie
cool corn cow crab crown cry dance dinosaur dog dolphin dragon dress drink drum duck ear earth egg elephant
eye farmer fire fish flower football forest fox friends frog fruit game ghost gift guitar gun hamburger
hammer hand happy hat heart home horse hospital hot house ice jeans key king kiss kitten knife lamp laugh
leaf lemon lightning lion lock love mail man money monkey moon mountain mouse mouth movie mushroom music
night nose ocean octopus onion orange owl panda party peace pen penguin phone piano pig pizza plane plant
poop potato present princess puppy rabbit rain rainbow rice ring robot rocket rose run sad school scissors
shark sheep ship shirt shoe skull sleep smile snail snake snow snowman soccer soup spider star storm
strawberry summer sun sunset sushi sword taxi tea telephone television tennis tiger tomato tooth train tree
truck turtle umbrella unicorn vegetable volcano watch water watermelon wedding whale wind wine winter witch
wolf woman work world zombie
"""


def small(image: Image.Image) -> np.ndarray:
    """The pixels of the image at 32x32, to compare it by."""
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.float32).ravel()


@cache
def known_words() -> dict[str, set[str]]:
    """Each emoji's keywords and the words of its name, in lower case."""
    names, keywords = emoji.emoji_names(), emoji.emoji_keywords()
    return {one: {word.lower() for word in [*keywords[one], *names[one].split()]} for one in names}


@cache
def all_emoji(color: str) -> np.ndarray:
    """The emoji on a background, in the order of `known_words`, to compare with."""
    font = ImageFont.truetype(emoji.installed(emoji.FONT), emoji.GLYPH)
    return np.stack([small(emoji.draw(one, color, font)) for one in known_words()])


def nearest(image: Image.Image, color: str = "white") -> str:
    """The emoji that an image on this background shows."""
    distances = ((all_emoji(color) - small(image)) ** 2).sum(axis=1)
    return list(known_words())[distances.argmin()]


def background(image: Image.Image) -> str:
    """The color nearest to the median of the image's edge."""
    pixels = np.asarray(image, dtype=np.float32)
    sides = (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])
    edge = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    return min(emoji.COLORS, key=lambda color: np.abs(edge - emoji.COLORS[color]).sum())


def called(*words: str) -> set[str]:
    """The emoji that all these words belong to."""
    return {one for one, known in known_words().items() if {word.lower() for word in words} <= known}


def psnr(model: sd.StableDiffusion, image: Image.Image) -> float:
    """The peak signal-to-noise ratio of the VAE's reconstruction, in dB."""
    [decoded] = sd.to_images(model.decode(model.encode(sd.to_tensor(image))))
    difference = np.asarray(decoded, dtype=np.float64) - np.asarray(image)
    return 10 * np.log10(255**2 / (difference**2).mean())


def labeled(image: Image.Image, text: str) -> Image.Image:
    """The image with its prompt below it."""
    fonts = [ImageFont.load_default(size) for size in range(16, 3, -1)]
    font = next((font for font in fonts if font.getlength(text) < image.width), fonts[-1])
    result = Image.new("RGB", (image.width, image.height + 24), "white")
    result.paste(image)
    ImageDraw.Draw(result).text((image.width // 2, image.height + 8), text, "black", font, anchor="mm")
    return result


def draw(model: sd.StableDiffusion, prompts: list[str], **settings) -> list[Image.Image]:
    """An image of each prompt, image i from seed i."""
    images = []
    for i in tqdm(range(0, len(prompts), 8), leave=False):
        images += model.generate(prompts[i : i + 8], seed=i, progress=False, **settings)
    return images


Asked = tuple[str, str, set[str]]  # a prompt, the background that it asks for, and the emoji that are right


def held_out_names() -> list[Asked]:
    """The full name of each emoji on a background that it was not trained on."""
    backgrounds: dict[str, str] = {}
    for one, color in emoji.split(list(emoji.emoji_names()))["heldout"]:
        backgrounds.setdefault(one, color)
    names = emoji.emoji_names()
    return [(emoji.captions([names[one]], color)[-1], color, {one}) for one, color in backgrounds.items()]


def held_out_pairs() -> list[Asked]:
    """Pairs of keywords that no caption had, not even as a name, as red and apple do."""
    captions = {text for texts in emoji.emoji_texts().values() for text in texts}
    pairs = emoji.keyword_pairs()["heldout"]
    pairs = [(one, other) for one, other in pairs if not captions & {f"{one} {other}", f"{other} {one}"}]
    return [(" ".join(pair), "white", called(*pair)) for pair in pairs]


def rare_keywords() -> list[Asked]:
    """The keywords of at most three emoji, shuffled."""
    keywords = sorted({word for words in emoji.emoji_keywords().values() for word in words})
    random.Random(0).shuffle(keywords)
    asked = [(word, "white", called(word)) for word in keywords]
    return [(word, color, right) for word, color, right in asked if len(right) <= 3]


def report(kind: str, images: list[Image.Image], asked: list[Asked]) -> None:
    """Prints how many images show what was asked for, and the prompts of some that do not."""
    pairs = list(zip(images, asked))
    wrong = [prompt for image, (prompt, color, right) in pairs if nearest(image, color) not in right]
    print(f"{kind:<48} {1 - len(wrong) / len(images):6.1%} of {len(images)}")
    print(f"    not: {', '.join(wrong[:20])}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", default=sd.DEFAULT_WEIGHTS)
    parser.add_argument("--count", type=int, default=300, help="of each kind, at most (300)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--sampler", default="ddpm")
    parser.add_argument("--sheet", type=Path, default=ROOT / "sheet.png")
    args = parser.parse_args()
    model, words, rare = sd.load(args.weights), EVERYDAY.split(), rare_keywords()
    settings = {"steps": args.steps, "guidance": args.guidance, "sampler": args.sampler}
    for kind, asked in [
        ("full names (wanted 97 %)", held_out_names()),
        ("keywords of at most three emoji (85 %)", rare),
        ("everyday words (90 %)", [(word, "white", called(word)) for word in words]),
        ("held-out pairs of keywords (60 %)", held_out_pairs()),
    ]:
        asked = asked[: args.count]
        images = draw(model, [prompt for prompt, *_ in asked], **settings)
        report(kind, images, asked)
        if kind.startswith("full names"):
            share = np.mean([background(image) == color for image, (_, color, _) in zip(images, asked)])
            print(f"{'their backgrounds (99 %)':<48} {share:6.1%}")

    fruits = {nearest(image) for image in draw(model, 20 * ["fruit"], **settings)} & called("fruit")
    print(f"{'different fruits of 20 seeds (6)':<48} {len(fruits):4}")
    font = ImageFont.truetype(emoji.installed(emoji.FONT), emoji.GLYPH)
    originals = [emoji.draw(one, color, font) for _, color, [one] in held_out_names()[: args.count]]
    reached = np.mean([psnr(model, image) for image in originals])
    print(f"{'PSNR of the VAE (28.4 dB)':<48} {reached:6.2f} dB")

    shown = sorted({*words, *(word for word, *_ in rare if re.fullmatch("[a-z]+", word))})
    random.Random(0).shuffle(shown)
    shown = shown[:64] + 8 * ["fruit"]
    images = [labeled(image, word) for image, word in zip(draw(model, shown, **settings), shown)]
    sheet(images).save(args.sheet)


if __name__ == "__main__":
    main()
