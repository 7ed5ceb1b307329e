"""Section 2: the tokenizer, against transformers' CLIPTokenizer."""

import hashlib
import random
import sys
import unicodedata
from functools import cache

import pytest
from conftest import ROOT
from tokenizers import Regex, normalizers
from transformers import CLIPTokenizer

import sd

MERGES = (ROOT / "tokenizer_vocab" / "merges.txt").read_text(encoding="utf-8").splitlines()
LONG = 300  # most random texts are shorter


def is_known(character: str) -> bool:
    """Whether the library, Python and `regex` agree on what `character` is.

    Each has the data of another version of Unicode. They differ on recent characters, and the library's NFC
    on combining marks since Unicode 10. Lone surrogates are refused by the library.
    """
    if unicodedata.category(character) in ("Cn", "Cs") or UNASSIGNED.normalize_str(character) == "":
        return False
    marks = f"{character}\u0334\u0345{character}"  # of the lowest and of the highest class
    return NFC.normalize_str(marks) == unicodedata.normalize("NFC", marks)


NFC, UNASSIGNED = normalizers.NFC(), normalizers.Replace(Regex(r"\p{Cn}"), "")  # the library's
KNOWN = dict.fromkeys(filter(is_known, map(chr, range(sys.maxunicode + 1))))


def known(text: str) -> str:
    return "".join(character for character in text if character in KNOWN)


@cache
def tokenizer(length: int = 77, vocab_size: int = 49408) -> sd.Tokenizer:
    return sd.Tokenizer(vocab_size, length)


@cache
def library(vocab_size: int = 49408) -> CLIPTokenizer:
    merges = [tuple(line.split()) for line in MERGES[: vocab_size - 514]]
    return CLIPTokenizer(vocab=tokenizer(vocab_size=vocab_size).ids, merges=merges)


def differing(texts: list[str], length: int = LONG, vocab_size: int = 49408) -> list[str]:
    """The texts to which we and the library give different ids."""
    ours = tokenizer(length, vocab_size)
    theirs = library(vocab_size)(texts, truncation=True, max_length=length, padding="max_length").input_ids
    return [text for text, ids in zip(texts, theirs, strict=True) if ours(text) != ids]


def span(ranges: str) -> list[str]:
    """The known characters of ranges of code points, ends included."""
    ends = [[int(end, 16) for end in pair.split("-")] for pair in ranges.split()]
    return list(known("".join(chr(code) for first, last in ends for code in range(first, last + 1))))


POOLS = {
    "ascii": span("20-7E"),
    "words": [line.replace(" ", "").replace("</w>", " ") for line in MERGES[:5000]],
    "latin": span("A0-24F 1E00-1EFF"),
    "greek and cyrillic": span("370-52F 1F00-1FFF"),
    "combining marks": list("aeinouAEINOU") + span("300-36F 1AB0-1ACE 20D0-20F0 FE20-FE2F"),
    "cjk": span("1100-11FF 3001-30FF 4E00-4FFF AC00-AD00 F900-FA00 FF01-FFDC"),
    "right to left": span("590-6FF 200E-200F 202A-202E 2066-2069 FB1D-FDFF"),
    "indic and thai": span("900-E7F F00-FFF"),
    "emoji": span("1F1E6-1F1FF 1F300-1FAFF 2600-27BF E0061-E007F")
    + 200 * ["\u200d", "\ufe0e", "\ufe0f", "\u20e3", "\U0001f3fb", "\U0001f3ff"],
    "controls": span("0-1F 7F-9F 2000-200D 2028-202F 2060-206F FFF9-FFFD"),
    "white space": list("a.1\x85\xa0\u1680\u180e\u202f\u3000\ufeff")
    + span("9-D 1C-20 2000-200D 2028-2029 205F-2060"),
    "contractions": [
        "it's", "It'S", "I'm", "we'RE", "they've", "he'll", "she'D", "don't", "'s", "'S", "''", "'ſ", "’s"
    ],
    "digits": [character for character in KNOWN if unicodedata.category(character).startswith("N")],
    "special tokens": [
        "<|startoftext|>", "<|endoftext|>", "<|STARTOFTEXT|>", "<|EndOfText|>", "<|", "|>", ">", "!", "\u0338"
    ],
    "everything": list(KNOWN),
}  # fmt: skip


def random_texts(count: int, seed: int, pools: dict[str, list[str]] = POOLS) -> list[str]:
    """Texts from one pool or several, some with long runs of one character."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        chosen = rng.sample(list(pools.values()), rng.choice([1, 1, 2, 3]))
        pieces = [rng.choice(rng.choice(chosen)) for _ in range(rng.randrange(40))]
        if pieces and rng.random() < 0.1:
            pieces[rng.randrange(len(pieces))] *= rng.randrange(200)
        texts.append(known(rng.choice(["", "", " "]).join(pieces)))
    return texts


HARD_CASES = {
    "empty": "",
    "white space only": " \t\r\n\u3000",
    "all kinds of white space": "a\tb\nc\vd\fe\rf\x85g\xa0h\u1680i\u2003j\u2028k\u2029l\u202fm\u205fn\u3000o",
    "resembles white space": "x\x1cy\x1fz a\u200bb\u2060c\ufeffd\u180ee",
    "nul and other controls": "a\0b\x01\x7f\x9f",
    "NFC in both ways": "e\u0301 A\u030a \u1112\u1161\u11ab o\u0323\u0302 \u0958 \ufb1d \U0001d15e \u2adc",
    "singletons of NFC": "\u212b \u2126 \u212a \uf900 \u0340",
    "compatibility characters stay": "ﬁ ﬀ ½ ² ⅷ Ａ ㌀",
    "a mark first, marks in any order": "\u0301a \u20e3 a\u0327\u0301\u0323 a\u0323\u0327\u0301 \u0345\u0301",
    "lower case of sigma, i and sharp s": "ΟΔΥΣΣΕΥΣ Σ ΑΣ. İSTANBUL ISPARTA ı STRASSE ẞ ß",
    "title case, case beyond the first plane": "ǅ Ǆ 𐐀𐐁 𞤀 𝐀",
    "contractions": "It's I'M they're WE'VE he'll she'd can't y'all'd've",
    "not quite contractions": "it’s 'em ''s 'S' s' 'sx 'rex' 'llama",
    "digits one by one": "2024 3.14 ١٢٣ ੧੨ Ⅷ ½ ²³ 〇 𝟘",
    "punctuation in one piece": "!!! ... ?!?! -- #$%& (((a))) [[b]] snake_case kebab-case __init__ a_1",
    "html, end of word mark": "&amp; &lt;b&gt; <br/> &#39; </w> a</w> </w></w>",
    "emoji joined": "👩‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 ❤️ ☺︎",
    "flags and keycaps": "🇩🇪🇫🇷🇺 1️⃣ #️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "chinese, japanese, korean": "一只猫 猫が座っている 고양이 한 마리",
    "arabic, hebrew, persian": "قِطَّة تفاحة חָתוּל سیب‌ها \u202eabc\u202c",
    "hindi, thai, tamil": "सेब แอปเปิ้ล ஆப்பிள் क्\u200dष",
    "zalgo": "Z\u0311\u0343a\u0334\u031b\u0318l\u0335\u0301\u0347g\u0338\u0360o\u0337\u0354",
    "noncharacter neighbours": "\ufffd\ufffc\ue000\U000f0000",
    "special tokens": "<|startoftext|> a <|endoftext|> b a<|endoftext|><|startoftext|>b!<|endoftext|>!",
    "special tokens in the wrong case": "<|STARTOFTEXT|> a <|EndOfText|><|endoftexT|>",
    "wrong case beside punctuation": "!!<|ENDOFTEXT|> <|ENDOFTEXT|>!! ?<|STARTOFTEXT|>? '<|ENDOFTEXT|>s",
    "a mark after a special token": "<|ENDOFTEXT|>\u0338 <|endoftext|>\u0338 e<|endoftext|>\u0301",
    "almost special tokens": "<| endoftext|> <|endoftext| > <|endoftext <|ſtartoftext|> <<|endoftext|>>",
    **{f"long run of {each}": each * 1000 for each in "a!😀"},
    "long run of marks": "e" + "\u0301" * 500,
    "long word": "pneumonoultramicroscopicsilicovolcanoconiosis" * 20,
    "long text": "a photo of a cat, " * 100,
}


@pytest.mark.parametrize("seed", range(2))
def test_random_texts(seed):
    assert differing(random_texts(5000, seed)) == []


def test_every_character():
    """Alone and inside a word. Private characters are all alike, and the random texts have some."""
    characters = [c for c in KNOWN if unicodedata.category(c) != "Co"]
    assert len(characters) > 140_000
    groups = [characters[i : i + 20] for i in range(0, len(characters), 20)]
    assert differing([" ".join(f"a{c}b {c}" for c in group) for group in groups]) == []


@pytest.mark.parametrize("text", HARD_CASES.values(), ids=HARD_CASES)
def test_hard_cases(text):
    assert differing([text], 77) == differing([text], LONG) == []


def test_hard_cases_joined_with_each_other_and_with_random_texts():
    pieces = [*HARD_CASES.values(), *random_texts(50, seed=2)]
    rng = random.Random(0)
    assert differing(["".join(rng.sample(pieces, 3)) for _ in range(1000)]) == []


@pytest.mark.parametrize("vocab_size", [514, 515, 1000, 10_000, 49_408])
def test_vocabularies_of_any_size(vocab_size):
    """Bytes and the first merges keep their ids; start and end are the last two."""
    ids, all_tokens = tokenizer(vocab_size=vocab_size).ids, list(tokenizer().ids)
    assert list(ids) == all_tokens[: vocab_size - 2] + ["<|startoftext|>", "<|endoftext|>"]
    assert list(ids.values()) == list(range(vocab_size))
    assert differing(random_texts(500, seed=4), vocab_size=vocab_size) == []


def test_lone_surrogates_become_question_marks():
    """A command line can hold them."""
    assert tokenizer()("a \udc80cat\ud83d") == tokenizer()("a ?cat?")
    assert tokenizer().dropped("cat " * 75 + "\udfff") == ["\udfff"]


def test_normalization_sorts_every_combining_mark():
    """Also those on which the library has old data: NFC and NFD of a text have the same ids."""
    marks = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.combining(chr(code))]
    assert len(marks) > 800
    for text in ["x\u0345" + "\u0334".join(marks[i : i + 10]) for i in range(0, len(marks), 10)]:
        assert tokenizer(LONG)(text) == tokenizer(LONG)(unicodedata.normalize("NFD", text))


def test_merges_are_clips():
    """The digest is of lines 2 to 48,895 of OpenAI's bpe_simple_vocab_16e6.txt, joined by newlines."""
    digest = hashlib.sha256("\n".join(MERGES).encode()).hexdigest()
    assert digest == "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


@pytest.mark.parametrize("text, ids", [
    ("", []),
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("an astronaut riding a horse on mars", [550, 18376, 6765, 320, 4558, 525, 7496]),
    ("hello world!", [3306, 1002, 256]),
    ("<|endoftext|> <|startoftext|>", [49407, 49406]),
])  # fmt: skip
def test_published_ids(text, ids):
    """As published with CLIP: start, tokens, end, and more ends up to a length of 77."""
    assert tokenizer()(text) == [49406, *ids] + [49407] * (76 - len(ids))


@pytest.mark.parametrize("text, dropped", [
    ("", []),
    ("cat " * 75, []),
    ("cat " * 76, ["cat"]),
    ("cat " * 75 + "A Red Apple!", ["a", "red", "apple", "!"]),
    ("cat " * 72 + "yqzx apple", ["apple"]),  # yqzx is three tokens
    ("cat " * 73 + "yqzx apple", ["yqzx", "apple"]),  # of which two fit
    ("cat " * 74 + "it's", ["'s"]),
    ("cat " * 74 + "<|endoftext|> <|startoftext|>", ["<|startoftext|>"]),
])  # fmt: skip
def test_dropped_words(text, dropped):
    assert tokenizer().dropped(text) == dropped
    assert tokenizer()(text) == tokenizer(LONG)(text)[:76] + [49407]


def test_words_are_dropped_only_from_texts_that_are_too_long():
    texts = random_texts(2000, seed=6)
    tokens = [len(ids) - 2 for ids in library()(texts).input_ids]
    assert min(tokens) == 0 and max(tokens) > 75
    assert [bool(tokenizer().dropped(text)) for text in texts] == [count > 75 for count in tokens]
