"""BERT in CLIP's place: its tokenizer (section 2), against transformers' BertTokenizer."""

import random
import unicodedata
from functools import cache

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import HARD_CASES, KNOWN, LONG, MERGES, POOLS, random_texts
from tokenizers import normalizers, pre_tokenizers
from transformers import BertTokenizer

import sd

SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# -------------------------------------------------------------------------------------------------- tokenizer


def only(**options: bool) -> normalizers.BertNormalizer:
    """The library's normalizer, doing one thing."""
    nothing = dict.fromkeys(["clean_text", "handle_chinese_chars", "strip_accents", "lowercase"], False)
    return normalizers.BertNormalizer(**nothing | options)


CLEAN, STRIP, LOWER = only(clean_text=True), only(strip_accents=True), only(lowercase=True)


def without_marks(text: str) -> str:
    return "".join(part for part in unicodedata.normalize("NFD", text) if unicodedata.category(part) != "Mn")


def is_known_to_bert(character: str) -> bool:
    """Whether the library, Python and `regex` have the same data on `character`.

    Here the library has the categories of Unicode 8 or so: it knows no mark, sign of punctuation or format
    character that came later. These are left out, and the few that changed, and those of test_tokenizer.py.
    """
    category = unicodedata.category(character)
    marks = f"{character}\u1b44\u302e{character}"  # not stripped, of a low and of a high class
    words = pre_tokenizers.BertPreTokenizer().pre_tokenize_str(f"a{character}a")
    return (
        bool(CLEAN.normalize_str(character).strip()) == (category[0] not in "CZ" and character != "\ufffd")
        and STRIP.normalize_str(marks) == without_marks(marks)
        and (len(words) == 3) == (category[0] == "P" or character in "$+<=>^`|~")
        and LOWER.normalize_str(character) == character.lower()
        and regex.match(rf"\p{{{category}}}", character) is not None
    )


KNOWN_TO_BERT = dict.fromkeys(filter(is_known_to_bert, KNOWN))


def known_to_bert(text: str) -> str:
    return "".join(character for character in text if character in KNOWN_TO_BERT)


@cache
def vocabulary() -> tuple[str, ...]:
    """[PAD] first and a gap before the other special tokens, as BERT's; then CLIP's words, and of other
    characters a half: alone, inside a word, both or neither."""
    rng = random.Random(0)
    words = ["".join(line.split()) for line in MERGES[:4000]]
    whole = [word.removesuffix("</w>") for word in words if word.endswith("</w>")]
    rest = [f"##{word.removesuffix('</w>')}" for word in words]
    letters = sorted({c for text in KNOWN_TO_BERT for c in without_marks(text).lower()})
    letters = [letter for letter in letters if letter.isascii() or rng.random() < 0.5]
    pieces = [f"##{letter}" for letter in letters if letter.isascii() or rng.random() < 0.5]
    unused = [f"[unused{i}]" for i in range(9)]
    return tuple(dict.fromkeys(["[PAD]", *unused, *SPECIAL, "##", "###", *whole, *rest, *letters, *pieces]))


@cache
def tokenizer(length: int = 77) -> sd.WordPiece:
    return sd.WordPiece(vocabulary(), length)


@cache
def library() -> BertTokenizer:
    return BertTokenizer(vocab={token: id for id, token in enumerate(vocabulary())})


def differing(texts: list[str], length: int = LONG) -> list[str]:
    """Those of `texts` that we and the library give different ids."""
    theirs = library()(texts, truncation=True, max_length=length, padding="max_length").input_ids
    ours = tokenizer(length)
    return [text for text, ids in zip(texts, theirs, strict=True) if ours(text) != ids]


BERT_POOLS = POOLS | {
    "special tokens": ["[PAD]", *SPECIAL, "[mask]", "[Cls]", "[", "]", "[[", "]]", "[unused0]", "#", "##"],
    "long words": ["a" * 99, "a" * 100, "a" * 101, "é" * 100, "the" * 33, "!" * 101, "猫" * 101],
}


@pytest.mark.parametrize("seed", range(4))
def test_random_texts(seed):
    texts = [known_to_bert(text) for text in random_texts(5000, seed, BERT_POOLS)]
    assert differing(texts) == []
    ids = [id for text in texts for _, word_ids in tokenizer().words(text) for id in word_ids]
    unknown = ids.count(tokenizer().ids["[UNK]"]) / len(ids)
    assert 0.05 < unknown < 0.5 and len(set(ids)) > 5000  # there is something to compare


def test_every_character():
    """Each alone, inside a word and behind another of its kind; the private ones are all alike."""
    characters = [c for c in KNOWN_TO_BERT if unicodedata.category(c) != "Co"]
    assert len(characters) > 135_000
    groups = [characters[i : i + 20] for i in range(0, len(characters), 20)]
    assert differing([" ".join(f"a{c}a {c} {c}{c}" for c in group) for group in groups]) == []


def test_only_recent_characters_are_unknown():
    """But for a few that Unicode has moved to another category."""
    unknown = [c for c in KNOWN if c not in KNOWN_TO_BERT]
    assert len(unknown) < 500
    old = [c for c in unknown if unicodedata.ucd_3_2_0.category(c) != "Cn"]
    assert old == ["\u0295", "\u166d", "\u1734", "\u1885", "\u1886"]


BERT_CASES = {
    "accents": "Crème brûlée, naïve façade; Ångström",
    "marks that are not accents": "क्षि 한글 ก็ ์a a\u1b44\u302eb a\u302e\u1b44b a\u302e\u200d\u1b44b",
    "a capital that lower case decomposes": "İstanbul İ",
    "pieces": "photography unbelievable antidisestablishmentarianism",
    "a start that is known, an end that is not": "aλ photoλ λphoto",
    "longest match first, without going back": "thetheth abc",
    "numbers": "2024 3.14 1,000 a1b2",
    "ascii symbols": "$+<=>^`|~ a+b c$d e~f 1<2",
    "other symbols": "a€b ©2024 x² → ★ a¬b",
    "other punctuation": "“quoted” ‘s – — … ¿qué? 「猫」 。、",
    "what decomposes to punctuation": "a\u037eb a\u1fefb a≠b a≮b",
    "chinese": "a一只猫b 漢字かな交じり文 㐀 𠀀 𪛖 𪜀 豈 﨎 你",
    "not chinese": "가나 ひらカタ 〇々 ㄅ ⼀ a𫠠b a𫤟b",
    "chinese next to what the library leaves out": "a𫠝b a𫤠b",
    "hash signs": "# ## ### a##b ##a #a",
    "special tokens": "[CLS] a [SEP] [MASK] b [PAD] [UNK] c",
    "special tokens without spaces": "a[MASK][SEP]b![PAD]!c[[MASK]]",
    "special tokens in the wrong case": "[mask] [Mask] [cLS]",
    "almost special tokens": "[ MASK] [MASK [MASK\u200b] [MA\u0301SK] MASK] [unused1] [unused]",
    "a special token from what is dropped": "[M\u0301ASK] [MA\u200bSK] [\x00CLS]",
    "accent on a special token": "[MASK]\u0301 a[MASK]\u200d",
    "a word of 100 characters": "a" * 100 + " " + "b" * 101 + " " + "é" * 100 + " " + "e\u0301" * 101,
    "a long word that would fit": "the" * 34 + " " + "the" * 33,
    "replacement character": "a\ufffdb \ufffd a\ufffcb",
    "white space and controls": "a\tb\nc\rd\x0be\x85f\x1cg\u2028h\u2029i\u3000j\xa0k\u200bl\xadm\ufeffn",
    "private characters": "a\ue000b \U000f0000",
}


@pytest.mark.parametrize("text", (BERT_CASES | HARD_CASES).values(), ids=BERT_CASES | HARD_CASES)
@pytest.mark.parametrize("length", [77, 12, LONG])
def test_hard_case(text, length):
    assert differing([text], length) == []


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(st.lists(st.text() | st.sampled_from([*BERT_CASES.values(), *SPECIAL])).map("".join))
def test_any_text(text):
    text = known_to_bert(text)
    assert differing([text]) == []


@pytest.mark.parametrize("text, words", [
    ("", []),
    (" \t\n\u200b\u0301", []),
    ("A Café, 2 猫猫[MASK]!", ["a", "cafe", ",", "2", "猫", "猫", "[MASK]", "!"]),
    ("\udc80cat\ud83d", ["cat"]),  # lone surrogates, which the library does not take
])  # fmt: skip
def test_words(text, words):
    assert [word for word, _ in tokenizer().words(text)] == words


def test_pieces():
    small = sd.WordPiece(["[PAD]", *SPECIAL, "un", "##aff", "##able", "##a", "##b", "una"], length=9)
    pad, unknown, start, end, mask, un, _, _, _, b, una = range(11)
    assert small.tokens("unbaffable") == ["un", "##b", "##aff", "##able"]
    assert small.tokens("unaffable") == ["[UNK]"]  # una, and then nothing begins with ff: no way back
    assert small("unb unc [MASK]") == [start, un, b, unknown, mask, end, pad, pad, pad]
    assert small("una " * 9) == [start, *7 * [una], end]


@pytest.mark.parametrize("text, dropped", [
    ("", []),
    ("cat " * 75, []),
    ("cat " * 76, ["cat"]),
    ("cat " * 75 + "A Réd[MASK]!", ["a", "red", "[MASK]", "!"]),
    ("cat " * 74 + "catcat dog", ["catcat", "dog"]),  # catcat is two tokens, of which one fits
])  # fmt: skip
def test_dropped_words(text, dropped):
    assert tokenizer().dropped(text) == dropped
    assert tokenizer()(text)[:76] == tokenizer(LONG)(text)[:76]
    assert len(tokenizer()(text)) == 77 and (not dropped or tokenizer()(text)[76] == tokenizer().end)


@pytest.mark.parametrize("missing", ["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
def test_a_vocabulary_without_special_tokens(missing):
    with pytest.raises(KeyError, match=missing[1:-1]):
        sd.WordPiece([token for token in vocabulary() if token != missing])
