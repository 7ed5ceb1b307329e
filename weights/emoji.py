"""Draws the data set of the default model: every emoji of Noto Color Emoji on a dozen colours, with captions.

    python weights/emoji.py FOLDER

FOLDER/train and FOLDER/heldout, a tenth of the pairs, each hold PNGs and their metadata.jsonl. The font and
the list of names are those of Debian's packages fonts-noto-color-emoji and unicode-data; `make emoji` fetches
them where they are missing.
"""

import json
import random
import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "usr/share/unicode/emoji/emoji-test.txt"
SIZE, GLYPH = 128, 109  # pixels; the font's pictures exist in one size only
COLOURS = {
    "white": (255, 255, 255), "black": (24, 24, 24), "gray": (140, 140, 140), "brown": (120, 80, 50),
    "red": (214, 48, 49), "orange": (245, 140, 40), "yellow": (250, 215, 70), "green": (60, 160, 80),
    "turquoise": (70, 200, 200), "blue": (50, 100, 220), "purple": (130, 70, 180), "pink": (245, 160, 200),
}  # fmt: skip
LEFT_OUT = r"skin tone|flag|keycap|o.clock|-thirty"
BETTER_NAMES = {"pizza": "slice of pizza"}


def installed(file: str) -> Path:
    """Where a Debian package's file is: in the system, or unpacked beside this script."""
    path = Path("/", file)
    return path if path.exists() else Path(__file__).parent / "debian" / file


def emoji_names() -> dict[str, str]:
    """Every emoji of the data set and its name."""
    lines = installed(NAMES).read_text(encoding="utf-8").splitlines()
    found = (re.match(r"[0-9A-F ]+; fully-qualified +# (\S+) E[\d.]+ (.+)", line) for line in lines)
    names = {match[1]: match[2] for match in found if match and not re.search(LEFT_OUT, match[2])}
    return {emoji: BETTER_NAMES.get(name, name) for emoji, name in names.items()}


def article(name: str) -> str:
    """A or an, by how the name is spoken."""
    return "an" if re.match(r"(?!uni|one\b|ewe|euro)[aeiou]|hour|x-ray", name, re.IGNORECASE) else "a"


def captions(name: str, colour: str) -> list[str]:
    """What a picture can be called: with its article, or without; white need not be spoken of."""
    grounds = [""] if colour == "white" else []
    grounds.append(f" on {article(colour)} {colour} background")
    return [f"{start}{ground}" for ground in grounds for start in (f"{article(name)} {name}", name)]


def draw(emoji: str, colour: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """An emoji in the middle of a picture of SIZE by SIZE."""
    glyph = Image.new("RGBA", (2 * SIZE, 2 * SIZE))
    ImageDraw.Draw(glyph).text((SIZE, SIZE), emoji, font=font, embedded_color=True, anchor="mm")
    glyph = glyph.crop(glyph.getbbox())
    glyph.thumbnail((SIZE * 7 // 8, SIZE * 7 // 8), Image.Resampling.LANCZOS)
    picture = Image.new("RGBA", (SIZE, SIZE), COLOURS[colour])
    picture.alpha_composite(glyph, ((SIZE - glyph.width) // 2, (SIZE - glyph.height) // 2))
    return picture.convert("RGB")


def split(emoji: list[str]) -> dict[str, list[tuple[str, str]]]:
    """The pairs (emoji, colour) of both halves, the same ones at every call."""
    pairs = [(one, colour) for one in emoji for colour in COLOURS]
    random.Random(0).shuffle(pairs)
    return {"heldout": pairs[: len(pairs) // 10], "train": pairs[len(pairs) // 10 :]}


def main(folder: Path) -> None:
    names, font = emoji_names(), ImageFont.truetype(installed(FONT), GLYPH)
    for half, pairs in split(list(names)).items():
        (folder / half).mkdir(parents=True, exist_ok=True)
        with open(folder / half / "metadata.jsonl", "w", encoding="utf-8") as metadata:
            for emoji, colour in pairs:
                file = "-".join(f"{ord(character):x}" for character in emoji) + f"-{colour}.png"
                draw(emoji, colour, font).save(folder / half / file, compress_level=1)
                for text in captions(names[emoji], colour):
                    metadata.write(json.dumps({"file_name": file, "text": text}, ensure_ascii=False) + "\n")
        print(f"{folder / half}: {len(pairs)} pictures of {len(names)} emoji")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
