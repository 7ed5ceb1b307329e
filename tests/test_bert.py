"""BERT in CLIP's place: its tokenizer, text encoder and files (sections 2, 4 and 8), against transformers'
BertTokenizer and BertModel, and the pipeline with it (section 9)."""

import json
import random
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import regex
import torch
import torch.nn.functional as F
from conftest import ROOT, measured, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from test_models import LIMITS, randomize
from test_tokenizer import HARD_CASES, KNOWN, LONG, MERGES, POOLS, random_texts
from tokenizers import normalizers, pre_tokenizers
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizer

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


NEEDED = set(map(chr, range(128))) | set("αβγδεζηθικλμνξοπρςστυφχψω\u1b44\u302e")


@cache
def vocabulary() -> tuple[str, ...]:
    """[PAD] first and a gap before the other special tokens, as BERT's; then CLIP's words, the characters that
    the cases below need, and of the others a half: alone, inside a word, both or neither."""
    rng = random.Random(0)
    words = ["".join(line.split()) for line in MERGES[:4000]]
    whole = [word.removesuffix("</w>") for word in words if word.endswith("</w>")]
    rest = [f"##{word.removesuffix('</w>')}" for word in words]
    letters = sorted({c for text in KNOWN_TO_BERT for c in without_marks(text).lower()})
    letters = [letter for letter in letters if letter in NEEDED or rng.random() < 0.5]
    pieces = [f"##{letter}" for letter in letters if letter in NEEDED or rng.random() < 0.5]
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
    "no characters, and perhaps later ones": "a\ufdd0b \uffff \U0001fffe a\u0378b",
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


# ----------------------------------------------------------------------------------------------- text encoder

WORDS = ("[PAD]", *SPECIAL, "cat", "a", "photo", "of", "##s", "dog", ",")
SMALL = sd.Config(
    image_size=64, vocab_size=len(WORDS), vocabulary=WORDS, text_width=48, text_layers=3, text_heads=4,
    vae_widths=(16, 32), vae_blocks=1, unet_widths=(16, 32), unet_attends=(True, False), unet_blocks=1,
    unet_heads=4, norm_groups=8,
)  # fmt: skip
BERT = {
    "vocab_size": len(WORDS), "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def random_ids(batch: int, tokens: int) -> torch.Tensor:
    """Each text of another length, and padding behind it."""
    ids = torch.randint(1, len(WORDS), (batch, tokens))
    for text, length in zip(ids, torch.randint(2, tokens + 1, (batch,))):
        text[length:] = 0
    return ids


def random_bert(kind=BertModel, **sizes) -> torch.nn.Module:
    """Rounded, so that a position and a segment add up exactly in float32."""
    options = {"add_pooling_layer": False} if kind is BertModel else {}
    model = randomize(kind(BertConfig(**BERT | sizes), **options))
    for parameter in model.parameters():
        parameter.data = (parameter * 2**12).round() / 2**12
    return model


def write_folder(folder: Path, model: torch.nn.Module, words=WORDS) -> Path:
    """As from the hub."""
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "bert", random_bert())


def with_bert(folder: Path, config: sd.Config = SMALL) -> sd.StableDiffusion:
    """A random model, but for the text encoder, which is the folder's."""
    fields, weights = sd.read_bert(folder)
    model = sd.StableDiffusion(replace(config, **fields))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and not any(name.startswith("text_encoder.") for name in missing)
    return model.eval()


def test_shapes():
    block = sd.BERTBlock(24, 3)
    assert block(torch.randn(2, 5, 24), torch.ones(2, 1, 1, 5, dtype=torch.bool)).shape == (2, 5, 24)
    encoder = sd.BERTTextEncoder(SMALL)
    for batch, tokens in ((1, 77), (3, 5)):
        assert encoder(random_ids(batch, tokens)).shape == (batch, tokens, 48)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("batch, tokens", [(1, 77), (4, 77), (3, 6), (1, 2)])
@torch.no_grad()
def test_parity(folder, dtype, batch, tokens):
    ours = with_bert(folder).text_encoder.to(dtype)
    theirs = BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=dtype).eval()
    ids = random_ids(batch, tokens)
    expected = theirs(ids, attention_mask=(ids != 0).long()).last_hidden_state
    error = measured(f"BERT, {dtype}: relative error", relative_error(ours(ids), expected))
    assert error <= LIMITS[dtype]


@torch.no_grad()
def test_a_token_sees_all_but_the_padding():
    encoder = randomize(sd.BERTTextEncoder(SMALL)).double()
    ids = torch.randint(1, len(WORDS), (1, 9))
    padded = F.pad(ids, (0, 5))
    torch.testing.assert_close(encoder(padded)[:, :9], encoder(ids))
    for place in range(9):
        changed = ids.clone()
        changed[:, place] = ids[:, place] % (len(WORDS) - 1) + 1
        assert (encoder(changed) - encoder(ids)).abs().amax(dim=(0, 2)).min() > 1e-6


@torch.no_grad()
def test_a_text_is_the_same_alone_and_in_a_batch():
    encoder, ids = randomize(sd.BERTTextEncoder(SMALL)).double(), random_ids(4, 20)
    for i in range(4):
        assert relative_error(encoder(ids[i : i + 1]), encoder(ids)[i : i + 1]) < 1e-12


def test_every_weight_has_a_gradient():
    encoder = randomize(sd.BERTTextEncoder(SMALL)).double()
    output = encoder(torch.arange(4 * 77).view(4, 77) % len(WORDS))  # every id, and every position
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in encoder.named_parameters():
        rows = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[None]
        assert rows.isfinite().all() and rows.abs().amax(dim=1).min() > 1e-6, name


def test_clips_names_are_as_they_were():
    """Own checkpoints have them; BERT's are the same."""
    names = [
        [name for name, _ in encoder(replace(SMALL, text_layers=1)).named_parameters()]
        for encoder in (sd.CLIPTextEncoder, sd.BERTTextEncoder)
    ]
    layer = ["norm1", "attention.qkv", "attention.out", "norm2", "fc1", "fc2"]
    owners = [*(f"layers.0.{part}" for part in layer), "norm"]
    expected = ["token_embedding.weight", "position_embedding.weight"]
    expected += [f"{owner}.{kind}" for owner in owners for kind in ("weight", "bias")]
    assert names == [expected, expected]


# ------------------------------------------------------------------------------------------------- checkpoint


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_fields(folder):
    before = torch.get_rng_state()
    fields, weights = sd.read_bert(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert fields == {
        "vocab_size": len(WORDS), "vocabulary": WORDS, "text_length": 77, "text_width": 48, "text_layers": 3,
        "text_heads": 4,
    }  # fmt: skip
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def as_google_named_them(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms have a gamma and a beta, and the numbers of the positions are saved."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        weights = {key.replace(new, name): value for key, value in weights.items()}
    return weights | {"bert.embeddings.position_ids": torch.arange(128)[None]}


@pytest.mark.parametrize("save, name", [
    (save_file, "model.safetensors"), (torch.save, "pytorch_model.bin"), (save_file, "pytorch_model.bin"),
])  # fmt: skip
@pytest.mark.parametrize("rename", [dict, as_google_named_them])
def test_every_way_to_name_the_weights(save, name, rename, tmp_path):
    """The whole of what was trained, behind "bert." and beside the heads, and BERT alone are the same."""
    whole = random_bert(BertForPreTraining)
    plain = write_folder(tmp_path / "plain", whole.bert)
    other = write_folder(tmp_path / "other", whole)
    (other / "model.safetensors").unlink()
    weights = {key: value.clone() for key, value in rename(whole.state_dict()).items()}
    assert sum(key.startswith("bert.") for key in weights) > 50 and "cls.predictions.bias" in weights
    save(weights, other / name)
    (fields, ours), (others, theirs) = sd.read_bert(plain), sd.read_bert(other)
    assert fields == others
    assert_same(ours, theirs)


def test_q_k_and_v_are_joined_and_the_first_segment_is_added(folder):
    bert, (_, ours) = BertModel.from_pretrained(folder).state_dict(), sd.read_bert(folder)
    place = "encoder.layer.1.attention.self"
    joined = torch.cat([bert[f"{place}.{name}.weight"] for name in ("query", "key", "value")])
    assert torch.equal(ours["text_encoder.layers.1.attention.qkv.weight"], joined)
    positions = bert["embeddings.position_embeddings.weight"][:77]
    expected = positions + bert["embeddings.token_type_embeddings.weight"][0]
    assert torch.equal(ours["text_encoder.position_embedding.weight"], expected)


def test_a_small_table_of_positions(tmp_path):
    folder = write_folder(tmp_path / "bert", random_bert(max_position_embeddings=20))
    model = with_bert(folder)
    assert model.config.text_length == 20 and len(model.tokenizer("cat")) == 20


@pytest.mark.parametrize("heads", [1, 6])
def test_heads_are_as_config_json_says(heads, tmp_path):
    fields, _ = sd.read_bert(write_folder(tmp_path / "bert", random_bert(num_attention_heads=heads)))
    assert fields["text_heads"] == heads


def test_line_ends_do_not_matter(folder):
    before, _ = sd.read_bert(folder)
    for text in ("\r\n".join(WORDS) + "\r\n", "\n".join(WORDS)):
        (folder / "vocab.txt").write_bytes(text.encode())
        assert sd.read_bert(folder)[0] == before


def test_a_token_may_hold_what_else_ends_a_line(tmp_path):
    words = (*WORDS, "\u2028", "a\x85b", "\xa0")
    folder = write_folder(tmp_path / "bert", random_bert(vocab_size=len(words)), words)
    assert sd.read_bert(folder)[0]["vocabulary"] == words


def test_half_precision(folder):
    _, before = sd.read_bert(folder)
    write_folder(folder, BertModel.from_pretrained(folder, add_pooling_layer=False).half())
    fields, after = sd.read_bert(folder)
    assert fields["vocabulary"] == WORDS and {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(relative_error(after[name], before[name]) < 2e-3 for name in before)


WEIGHTS, OTHER = "model.safetensors", "pytorch_model.bin"


def put(name: str, content: str | bytes):
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def change_weights(name: str, value=None):
    """Puts in a value, or takes out what is there."""

    def change(folder: Path) -> None:
        weights = random_bert().state_dict() | {name: value}
        torch.save({name: value for name, value in weights.items() if value is not None}, folder / OTHER)
        (folder / WEIGHTS).unlink()

    return change


def remove(name: str):
    return lambda folder: (folder / name).unlink()


NORM = "encoder.layer.1.output.LayerNorm.bias"
POSITIONS, SEGMENTS = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
MISTAKES = {  # what is done to a good folder, the file that the message names, what else it says
    "no folder": (shutil.rmtree, "vocab.txt", "No such file.*bert-base-uncased"),
    "no vocab.txt": (remove("vocab.txt"), "vocab.txt", "No such file.*bert-base-uncased"),
    "no config.json": (remove("config.json"), "config.json", "No such file.*bert-base-uncased"),
    "no weights": (remove(WEIGHTS), WEIGHTS, "No such file.*bert-base-uncased"),
    "empty vocab.txt": (put("vocab.txt", ""), "vocab.txt", "PAD.*bert-base-uncased"),
    "vocab.txt of others": (put("vocab.txt", "a\nb\n"), "vocab.txt", "PAD.*bert-base-uncased"),
    "vocab.txt not UTF-8": (put("vocab.txt", b"\xff"), "vocab.txt", "bert-base-uncased"),
    "a token too few": (
        put("vocab.txt", "\n".join(WORDS[:-1])),
        WEIGHTS,
        "12 tokens and vocab.txt 11;.*bert",
    ),
    "a token too many": (put("vocab.txt", "\n".join([*WORDS, "x"])), WEIGHTS, "12 tokens and vocab.txt 13;"),
    "a token twice": (put("vocab.txt", "\n".join([*WORDS[:-1], "cat"])), WEIGHTS, "and vocab.txt 11;"),
    "config.json is no JSON": (put("config.json", "{"), "config.json", "bert-base-uncased"),
    "config.json is a list": (put("config.json", "[]"), "config.json", "bert-base-uncased"),
    "config.json without heads": (put("config.json", "{}"), "config.json", "num_attention_heads"),
    "heads that do not divide": (put("config.json", '{"num_attention_heads": 5}'), WEIGHTS, "5 heads"),
    "no heads": (put("config.json", '{"num_attention_heads": 0}'), WEIGHTS, "zero"),
    "heads in words": (put("config.json", '{"num_attention_heads": "4"}'), WEIGHTS, "str"),
    "empty weights": (put(WEIGHTS, ""), WEIGHTS, "empty"),
    "damaged weights": (put(WEIGHTS, "x" * 99), WEIGHTS, "damaged"),
    "no positions": (change_weights(POSITIONS), OTHER, "position_embedding"),
    "no segments": (change_weights(SEGMENTS), OTHER, "token_type"),
    "segments of another width": (change_weights(SEGMENTS, torch.zeros(2, 7)), OTHER, "size"),
    "a norm missing": (change_weights(NORM), OTHER, "norm2.bias is missing"),
    "a number for a tensor": (change_weights(NORM, 3), OTHER, "norm2.bias is no tensor"),
    "not finite": (change_weights(NORM, torch.full((48,), torch.nan)), OTHER, "NaN.*norm2.bias"),
}


@pytest.mark.parametrize("change, named, said", MISTAKES.values(), ids=MISTAKES)
def test_mistake(folder, change, named, said):
    change(folder)
    with pytest.raises((OSError, ValueError), match=said) as caught:
        sd.read_bert(folder)
    assert str(folder / named) in str(caught.value) and len(str(caught.value).splitlines()) == 1


# --------------------------------------------------------------------------------------------------- pipeline


def test_clip_unless_there_is_a_vocabulary():
    models = [sd.StableDiffusion(config) for config in (SMALL, replace(SMALL, vocabulary=(), vocab_size=600))]
    parts = [(type(model.tokenizer), type(model.text_encoder)) for model in models]
    assert parts == [(sd.WordPiece, sd.BERTTextEncoder), (sd.Tokenizer, sd.CLIPTextEncoder)]
    assert sd.Config().vocabulary == ()


@pytest.mark.filterwarnings("error::UserWarning")
def test_saved_and_loaded(folder, tmp_path):
    """The file needs nothing beside it: the vocabulary is inside."""
    model = with_bert(folder)
    model.save(tmp_path / "own.safetensors")
    shutil.rmtree(folder)
    loaded = sd.StableDiffusion.load(tmp_path / "own.safetensors")
    assert loaded.config == model.config and loaded.config.vocabulary == WORDS
    assert_same(loaded.state_dict(), model.state_dict())
    quick = {"negative": "dogs", "steps": 3, "seed": 0, "sampler": "dpm++", "progress": False}
    [picture], [same] = (each.generate("a photo of cats", **quick) for each in (model, loaded))
    [other] = loaded.generate("a photo of dogs", **quick)
    assert picture.size == (64, 64) and same.tobytes() == picture.tobytes() != other.tobytes()


def test_a_context_is_the_librarys(folder):
    """From a text, not from ids."""
    model, bert = with_bert(folder), BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    texts = ["", "A photo, of cats", "dog " * 75]
    tokens = BertTokenizer.from_pretrained(folder)(
        texts, padding="max_length", max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        assert relative_error(model.embed(texts), bert(**tokens).last_hidden_state) < 1e-5
    with pytest.warns(UserWarning, match="over 75 tokens; dropped: dog ,"):
        model.embed(["dog " * 76 + ","])


def test_trained_with_in_clips_place(folder, tmp_path):
    """The denoiser learns beside the folder's encoder, which the model that is made has inside; a mistake in
    the folder ends with one line."""
    (tmp_path / "data").mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "data" / f"{colour}.png")
        (tmp_path / "data" / f"{colour}.txt").write_text("a photo of cats")
    sizes = {name: value for name, value in asdict(SMALL).items() if not name.startswith("vocab")}

    def train(steps: int, *words, width: int = 48) -> subprocess.CompletedProcess:
        config = json.dumps(sizes | {"vocab_size": 600, "text_width": width})
        command = [sys.executable, ROOT / "sd.py", "train", "data", "--out", "own.safetensors"]
        command += ["--config", config, "--text-encoder", "bert", "--batch-size", 2, "--steps", steps, *words]
        return subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)

    mistakes = {"no/vocab.txt": ["--bert", "no"], "its width is 48": ["--bert", folder]}
    for named, words in mistakes.items():
        result = train(1, *words, width=96)
        assert result.returncode == 2 and result.stdout == "", result.stderr
        assert result.stderr.startswith("sd.py: error: ") and named in result.stderr.splitlines()[0]
        assert result.stderr.count("\n") == 1 and not (tmp_path / "own.safetensors").exists()

    result = train(2, "--bert", folder)
    assert (result.returncode, result.stderr) == (0, "")
    first = sd.StableDiffusion.load(tmp_path / "own.safetensors")
    bert = with_bert(folder)
    shutil.rmtree(folder)
    result = train(4, "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    model = sd.StableDiffusion.load(tmp_path / "own.safetensors")
    assert model.config == first.config and model.config.vocabulary == WORDS
    assert_same(model.text_encoder.state_dict(), bert.text_encoder.state_dict())
    assert not torch.equal(model.unet.conv_in.weight, first.unet.conv_in.weight)
    model.generate("a photo of dogs", steps=2, progress=False)


LIES = {
    "a token too few": WORDS[:-1],
    "a token too many": [*WORDS, "x"],
    "no special tokens": [f"word{i}" for i in range(len(WORDS))],
    "numbers": list(range(len(WORDS))),
    "lists": [[word] for word in WORDS],
    "text": "word",
    "a number": 12,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_own_file_with_a_vocabulary_that_lies(lie, tmp_path):
    path, weights = tmp_path / "own.safetensors", sd.StableDiffusion(SMALL).state_dict()
    sd.write_safetensors(path, weights, {sd.OWN_MARK: json.dumps(asdict(SMALL))})
    assert sd.StableDiffusion.load(path).config == SMALL
    sd.write_safetensors(path, weights, {sd.OWN_MARK: json.dumps(asdict(SMALL) | {"vocabulary": lie})})
    with pytest.raises(ValueError, match=path.name):
        sd.StableDiffusion.load(path)
