"""BERT (Devlin et al. 2018, arXiv:1810.04805) in CLIP's place, for models trained with --text-encoder bert.

sd.py needs this file to generate images with such a model.
"""

import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import regex
import torch
import torch.nn.functional as F
from torch import Tensor

import sd

SPECIAL = r"\[(?:PAD|UNK|CLS|SEP|MASK)\]"
# Characters that are words by themselves: punctuation and Chinese ones, as in BERT's tokenization.py, without
# U+2B820 to U+2B91F, which Hugging Face's tokenizer leaves out.
ALONE = r"\p{P}$+<=>^`|~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002b81f\U0002b920-\U0002ceaf"


class WordPiece(sd.Tokenizer):
    """Uncased BERT's tokenizer. Raises ValueError for a vocabulary without [PAD], [CLS], [SEP] or [UNK]."""

    def __init__(self, vocabulary: Iterable[str], length: int = sd.Config.text_length):
        self.length = length
        self.ids = {token: id for id, token in enumerate(map(str, vocabulary))}
        missing = [token for token in ("[PAD]", "[CLS]", "[SEP]", "[UNK]") if token not in self.ids]
        sd.check("vocabulary", f"without {', '.join(missing)}", not missing, "that of an uncased BERT")
        self.pad, self.start, self.end = (self.ids[token] for token in ("[PAD]", "[CLS]", "[SEP]"))

    def words(self, text: str) -> Iterator[tuple[str, list[int]]]:
        for part in regex.split(f"({SPECIAL})", text):
            if not regex.fullmatch(SPECIAL, part):
                part = regex.sub(r"(?![\t\n\r\p{Cn}])[\p{C}\ufffd]", "", part)  # control characters
                part = regex.sub(r"\p{Mn}", "", unicodedata.normalize("NFD", part))  # accents
                part = "".join(character.lower() for character in part)
            for word in regex.findall(rf"{SPECIAL}|[{ALONE}]|[^\s{ALONE}]+", part):
                yield word, [self.ids[token] for token in self.tokens(word)]

    def tokens(self, word: str) -> list[str]:
        """`word` in pieces, each the longest that fits, with "##" before all but the first; or [UNK]."""
        pieces, begin, end = [], 0, len(word)
        while begin < end <= 100:
            piece = ("##" if begin else "") + word[begin:end]
            if piece in self.ids:
                pieces.append(piece)
                begin, end = end, len(word)
            else:
                end -= 1
        return pieces if begin == len(word) else ["[UNK]"]


class BERTLayer(sd.TextLayer):
    """A post-norm transformer layer."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D), mask (B, 1, 1, T), False for padding -> (B, T, D)"""
        x = self.norm1(x + self.attention(x, mask=mask))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class BERTTextEncoder(sd.CLIPTextEncoder):
    """Turns token ids into the context for the UNet's cross-attention; [PAD] is hidden from the others."""

    NAMES = {"text_encoder": {
        "token_embedding": "embeddings.word_embeddings.weight", "norm1": "attention.output.LayerNorm",
        "position_embedding": "embeddings.position_embeddings.weight", "attention.q": "attention.self.query",
        "attention.k": "attention.self.key", "attention.v": "attention.self.value", "layers": "encoder.layer",
        "attention.out": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense",
        "norm2": "output.LayerNorm", "norm": "embeddings.LayerNorm",
    }}  # fmt: skip

    def __init__(self, config: sd.Config):
        super().__init__(config)
        layers = (BERTLayer(config.text_dim, config.text_heads, eps=1e-12) for _ in range(config.text_layers))
        self.layers = torch.nn.ModuleList(layers)
        self.norm.eps = 1e-12
        self.pad = config.vocabulary.index("[PAD]")

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) int64, T at most text_length -> (B, T, text_dim), the last hidden state"""
        x = self.norm(F.embedding(ids, self.token_embedding) + self.position_embedding[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, (ids != self.pad)[:, None, None])
        return x


def text_models(config: sd.Config) -> tuple[WordPiece, BERTTextEncoder]:
    """The tokenizer and the text encoder of a Config with a vocabulary. Raises ValueError."""
    count, size = len(config.vocabulary), config.vocab_size
    sd.check("vocabulary", f"of {count} tokens", count == size, f"of {size}, as vocab_size says")
    return WordPiece(config.vocabulary, config.text_length), BERTTextEncoder(config)


def read_bert(folder: Path) -> tuple[dict[str, Any], BERTTextEncoder]:
    """Fields of Config and the text encoder, in float32, of a folder from Hugging Face. Raises ValueError."""
    advice = "use a folder like bert-base-uncased's"
    path = folder / "config.json"
    with sd.reading(path, advice):
        settings = json.loads(path.read_text(encoding="utf-8"))
        fields = {ours: settings[theirs] for theirs, ours in sd.DIFFUSERS_CONFIG["text_encoder"].items()}
        fields["text_length"] = min(fields["text_length"], sd.Config.text_length)
        config = sd.Config(**fields, vocabulary=("[PAD]",))  # replaced below
    path = folder / "vocab.txt"
    with sd.reading(path, advice):
        vocabulary = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        config = replace(config, vocabulary=tuple(vocabulary))
        with torch.device("meta"):
            _, encoder = text_models(config)
    path, other = folder / "model.safetensors", folder / "pytorch_model.bin"
    path = other if other.exists() and not path.exists() else path
    tensors, *_ = sd.read_file(path, "a text encoder")
    with sd.reading(path, advice):
        for old, new in ((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")):
            tensors = {regex.sub(old, new, name): tensor for name, tensor in tensors.items()}
        positions = tensors["embeddings.position_embeddings.weight"][: config.text_length]
        segment = tensors["embeddings.token_type_embeddings.weight"][0]  # all tokens of a prompt are in one
        tensors["embeddings.position_embeddings.weight"] = positions + segment
        names = sd.rename(encoder.state_dict(), encoder.NAMES["text_encoder"], sd.COMPVIS)
        state = {ours: tensors[theirs].float() for ours, theirs in names.items()}
        for ours, target in encoder.state_dict().items():
            sd.check(names[ours], state[ours].shape, state[ours].shape == target.shape, str(target.shape))
        encoder.load_state_dict(state, assign=True)
    return {name: getattr(config, name) for name in ("vocabulary", *fields)}, encoder
