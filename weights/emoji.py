"""Draws the data set of the default model: every emoji of Noto Color Emoji on twelve colors, with captions.

    python weights/emoji.py FOLDER

FOLDER/train and FOLDER/heldout, which has a tenth of the pairs of emoji and color, hold PNGs and a
metadata.jsonl. FOLDER/names has a metadata.jsonl of the same training images with their names only. The font,
the names and the keywords come from Debian's packages fonts-noto-color-emoji, unicode-data and
unicode-cldr-core; `make emoji` fetches them where they are missing.
"""

import json
import random
import re
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont

FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "usr/share/unicode/emoji/emoji-test.txt"
KEYWORDS = "usr/share/unicode/cldr/common/annotations/en.xml"
SIZE, GLYPH = 128, 109  # pixels; the font has its glyphs in one size only
COLORS = {
    "white": (255, 255, 255), "black": (24, 24, 24), "gray": (140, 140, 140), "brown": (120, 80, 50),
    "red": (214, 48, 49), "orange": (245, 140, 40), "yellow": (250, 215, 70), "green": (60, 160, 80),
    "turquoise": (70, 200, 200), "blue": (50, 100, 220), "purple": (130, 70, 180), "pink": (245, 160, 200),
}  # fmt: skip
LEFT_OUT = r"skin tone|flag|keycap|o.clock|-thirty"
BETTER_NAMES = {"pizza": "slice of pizza"}
MORE_KEYWORDS = {  # words of daily life that Unicode's keywords lack
    "dog face": "puppy", "cat face": "kitten", "steaming bowl": "soup noodles", "pot of food": "soup dinner",
    "fork and knife with plate": "meal dinner", "snowflake": "winter", "snowman": "winter",
    "sun": "summer day", "beach with umbrella": "summer", "cherry blossom": "spring", "fallen leaf": "fall",
    "tornado": "storm", "cloud with lightning and rain": "storm", "evergreen tree": "forest",
    "national park": "forest river lake", "motorway": "street", "sauropod": "dinosaur", "T-Rex": "dinosaur",
    "rhinoceros": "rhino", "herb": "grass", "person running": "run", "person surfing": "surf",
    "thinking face": "think", "microphone": "sing", "briefcase": "work job office", "flexed biceps": "strong",
    "waving hand": "hi bye", "camera": "photo", "thumbs down": "bad", "artist palette": "paint",
    "luggage": "suitcase", "purse": "wallet", "socks": "sock", "bottle with popping cork": "champagne",
    "tumbler glass": "whiskey", "shopping bags": "shop", "old woman": "grandmother", "old man": "grandfather",
    "woman feeding baby": "mom", "man feeding baby": "dad", "hatching chick": "easter", "lion": "animal zoo",
    "elephant": "animal zoo", "input numbers": "number", "people hugging": "friends", "soccer ball": "sport",
    "tractor": "farm", "t-shirt": "clothes",
}  # fmt: skip


def installed(file: str) -> Path:
    """The path of a file of a Debian package: in the system, or unpacked beside this script."""
    path = Path("/", file)
    return path if path.exists() else Path(__file__).parent / "debian" / file


def emoji_names() -> dict[str, str]:
    """Each emoji of the data set and its name."""
    lines = installed(NAMES).read_text(encoding="utf-8").splitlines()
    found = (re.match(r"[0-9A-F ]+; fully-qualified +# (\S+) E[\d.]+ (.+)", line) for line in lines)
    names = {match[1]: match[2] for match in found if match and not re.search(LEFT_OUT, match[2])}
    return {emoji: BETTER_NAMES.get(name, name) for emoji, name in names.items()}


def article(name: str) -> str:
    """The indefinite article, by pronunciation."""
    return "an" if re.match(r"(?!uni|one\b|ewe|euro)[aeiou]|hour|x-ray", name, re.IGNORECASE) else "a"


def emoji_keywords() -> dict[str, list[str]]:
    """Each emoji of the data set and its keywords, such as "pet" of the dog face; a few have none."""
    entries = ElementTree.parse(installed(KEYWORDS)).iter("annotation")
    found = {entry.get("cp"): str(entry.text).split(" | ") for entry in entries if not entry.get("type")}
    keywords = {}
    for emoji, name in emoji_names().items():
        words = found.get(emoji.replace("\ufe0f", ""), []) + MORE_KEYWORDS.get(name, "").split()
        keywords[emoji] = [word for word in words if word != name]
    return keywords


def keyword_pairs() -> dict[str, list[tuple[str, str]]]:
    """Up to four pairs of keywords of each emoji, a tenth of them held out; the same at every call."""
    rng, found = random.Random(0), set()
    for words in emoji_keywords().values():
        pairs = list(combinations(sorted(words), 2))
        found.update(rng.sample(pairs, min(4, len(pairs))))
    pairs = [(one, other) if rng.random() < 0.5 else (other, one) for one, other in sorted(found)]
    rng.shuffle(pairs)
    return {"heldout": pairs[: len(pairs) // 10], "train": pairs[len(pairs) // 10 :]}


def emoji_texts() -> dict[str, list[str]]:
    """Each emoji with its name, keywords and pairs of keywords, with and without article. Training draws one
    of them: the name stands there four times and keywords of at most three emoji twice, to be drawn more
    often. A name is no other emoji's keyword."""
    names, keywords, texts = emoji_names(), emoji_keywords(), {}
    pairs, taken = keyword_pairs()["train"], set(names.values())
    count = Counter(word for words in keywords.values() for word in words)
    for emoji, words in keywords.items():
        free = [word for word in words if word not in taken]
        found = 4 * [names[emoji]] + free + [word for word in free if count[word] <= 3]
        found += [" ".join(pair) for pair in pairs if set(words).issuperset(pair)]
        texts[emoji] = found + [f"{article(text)} {text}" for text in found]
    return texts


def captions(texts: list[str], color: str) -> list[str]:
    """The captions of an image; a white background goes without mention three times of four."""
    backgrounds = [""] * 3 if color == "white" else []
    backgrounds.append(f" on {article(color)} {color} background")
    return [text + background for text in texts for background in backgrounds]


def draw(emoji: str, color: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """An emoji in the middle of an image of SIZE by SIZE pixels."""
    glyph = Image.new("RGBA", (2 * SIZE, 2 * SIZE))
    ImageDraw.Draw(glyph).text((SIZE, SIZE), emoji, font=font, embedded_color=True, anchor="mm")
    glyph = glyph.crop(glyph.getbbox())
    glyph.thumbnail((SIZE * 7 // 8, SIZE * 7 // 8), Image.Resampling.LANCZOS)
    image = Image.new("RGBA", (SIZE, SIZE), COLORS[color])
    image.alpha_composite(glyph, ((SIZE - glyph.width) // 2, (SIZE - glyph.height) // 2))
    return image.convert("RGB")


def split(emoji: list[str]) -> dict[str, list[tuple[str, str]]]:
    """The pairs (emoji, color) of both halves, the same at every call."""
    pairs = [(one, color) for one in emoji for color in COLORS]
    random.Random(0).shuffle(pairs)
    return {"heldout": pairs[: len(pairs) // 10], "train": pairs[len(pairs) // 10 :]}


def file_name(emoji: str, color: str) -> str:
    """The name of an image's file."""
    return "-".join(f"{ord(character):x}" for character in emoji) + f"-{color}.png"


def write_captions(
    folder: Path, images: str, pairs: list[tuple[str, str]], texts: dict[str, list[str]]
) -> None:
    """Writes folder/metadata.jsonl; `images` is the path from there to the images, with a / at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for emoji, color in pairs:
        for text in captions(texts[emoji], color):
            entry = {"file_name": images + file_name(emoji, color), "text": text}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{folder}: {len(pairs)} images, {len(lines)} captions")


def main(folder: Path) -> None:
    """Writes the images and their captions."""
    names, texts, font = emoji_names(), emoji_texts(), ImageFont.truetype(installed(FONT), GLYPH)
    halves = split(list(names))
    for half, pairs in halves.items():
        write_captions(folder / half, "./", pairs, texts)
        for emoji, color in pairs:
            image = draw(emoji, color, font)
            image.save(folder / half / file_name(emoji, color), compress_level=1)
    only_names = {emoji: [name, f"{article(name)} {name}"] for emoji, name in names.items()}
    write_captions(folder / "names", "../train/", halves["train"], only_names)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
