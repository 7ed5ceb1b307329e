"""Draws the data set of the default model: every emoji of Noto Color Emoji on twelve colors, with captions.

    python weights/emoji.py FOLDER

FOLDER/train and FOLDER/heldout, which has a tenth of the pairs of emoji and color, hold PNGs and a
metadata.jsonl. The font and the list of names come from Debian's packages fonts-noto-color-emoji and
unicode-data; `make emoji` fetches them where they are missing.
"""

import json
import random
import re
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "usr/share/unicode/emoji/emoji-test.txt"
SIZE, GLYPH = 128, 109  # pixels; the font has its glyphs in one size only
COLORS = {
    "white": (255, 255, 255), "black": (24, 24, 24), "gray": (140, 140, 140), "brown": (120, 80, 50),
    "red": (214, 48, 49), "orange": (245, 140, 40), "yellow": (250, 215, 70), "green": (60, 160, 80),
    "turquoise": (70, 200, 200), "blue": (50, 100, 220), "purple": (130, 70, 180), "pink": (245, 160, 200),
}  # fmt: skip
LEFT_OUT = r"skin tone|flag|keycap|o.clock|-thirty"
BETTER_NAMES = {"pizza": "slice of pizza"}


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


def captions(name: str, color: str) -> list[str]:
    """The captions of an image, with and without articles; a white background may go without mention."""
    backgrounds = [""] if color == "white" else []
    backgrounds.append(f" on {article(color)} {color} background")
    return [
        f"{start}{background}" for background in backgrounds for start in (f"{article(name)} {name}", name)
    ]


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


def main(folder: Path) -> None:
    """Writes both halves of the data set."""
    names, font = emoji_names(), ImageFont.truetype(installed(FONT), GLYPH)
    for half, pairs in split(list(names)).items():
        (folder / half).mkdir(parents=True, exist_ok=True)
        entries = []
        for emoji, color in pairs:
            file = "-".join(f"{ord(character):x}" for character in emoji) + f"-{color}.png"
            draw(emoji, color, font).save(folder / half / file, compress_level=1)
            entries += [{"file_name": file, "text": text} for text in captions(names[emoji], color)]
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        (folder / half / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / half}: {len(pairs)} images of {len(names)} emoji")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
