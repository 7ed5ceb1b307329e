"""Files that are no checkpoint, damaged ones and other models': each is refused in one line, and quickly."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import pytest
import test_checkpoints
import torch
from conftest import ROOT, limit
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file
from test_checkpoints import PICKLES, SAVE, SAVE_BARE, TINY, Call, refusal, without, write_pickle

import sd

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


# Fixtures: a good checkpoint, the same in diffusers' layout, a copy of that, and its tensors.
tiny, tiny_folder = test_checkpoints.tiny, test_checkpoints.tiny_folder
folder, tensors = test_checkpoints.folder, test_checkpoints.tensors


def only(tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# ------------------------------------------------------------------------------- no checkpoints, damaged ones


def write_zip(path: Path, tensors) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/readme.txt", "no data.pkl here")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0123abcd' * 8}\nsize 4265380512\n"
PAGE = "\n  <!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n" * 100
QUANT, IN, OUT = f"{VAE}quant_conv.weight", f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.bias"
CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
AGAIN = "download it again"
NO_CHECKPOINTS = {
    "missing": (lambda path, t: None, "is missing and must be downloaded"),
    "empty": (lambda path, t: path.touch(), "empty"),
    "Git LFS pointer": (lambda path, t: path.write_text(POINTER), "Git LFS pointer.*git lfs pull"),
    "web page": (lambda path, t: path.write_text(PAGE), "web page"),
    "text": (lambda path, t: path.write_text("These are the weights that you wanted.\n" * 100), AGAIN),
    "random bytes": (lambda path, t: path.write_bytes(random.Random(0).randbytes(100_000)), AGAIN),
    "another zip": (write_zip, AGAIN),
    "list": (lambda path, t: torch.save([t[OUT]], path), AGAIN),
    "number": (lambda path, t: torch.save(42, path), AGAIN),
    "Python's own pickle": (lambda path, t: path.write_bytes(pickle.dumps({"state_dict": {}})), AGAIN),
    "foreign object": (lambda path, t: write_pickle(path, b"cnowhere\nModel\n)R.", "legacy"), AGAIN),
    "missing tensor": (lambda path, t: SAVE["safetensors"](without(t, QUANT), path), f"{QUANT} is missing"),
    "misshapen tensor": (
        lambda path, t: SAVE["safetensors"](t | {QUANT: torch.zeros(12, 9, 1, 1)}, path),
        rf"{QUANT}.*\(12, 9, 1, 1\).*\(12, 12, 1, 1\)",
    ),
    "transposed tensor": (
        lambda path, t: SAVE["zip"](t | {CONTEXT: t[CONTEXT].mT}, path), r"\(32, 8\).*\(8, 32\)"
    ),
    "number for a name": (
        lambda path, t: SAVE["zip"](t | {7: t[OUT]}, path), "a name is 7 and must be a short string"
    ),
    "long name": (
        lambda path, t: save_file(t | {"attn2.to_k." * 10_000: torch.zeros(2, 2)}, path),
        "must be a short string",
    ),
    "code for a tensor": (lambda path, t: SAVE["zip"](t | {QUANT: Call(os.mkdir, "trace")}, path), "posix"),
    "call for a tensor": (lambda path, t: SAVE["zip"](t | {QUANT: Call(eval, "1")}, path), QUANT),
    "number for a tensor": (lambda path, t: SAVE["zip"](t | {QUANT: 3}, path), QUANT),
}  # fmt: skip


@pytest.mark.parametrize("write, pattern", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_files_that_are_no_checkpoint(write, pattern, tmp_path, tensors):
    path = tmp_path / "sd-v1-5.ckpt"
    write(path, tensors)
    assert re.search(pattern, refusal(path))


# ----------------------------------------------------------------------------------------------- other models


def controlnet() -> dict[str, torch.Tensor]:
    return ControlNetModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(16, 32),
    ).state_dict()  # fmt: skip


LORA, LAYER = torch.zeros(4, 320), "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_" + LAYER.replace(".", "_")
FAMILIES = [
    ("Stable Diffusion XL", lambda t: without(t, CLIP) | {
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": torch.zeros(768),
        "conditioner.embedders.1.model.token_embedding.weight": torch.zeros(64, 1280),
    }),
    ("Stable Diffusion XL", lambda t: t | {CONTEXT: torch.zeros(8, 2048)}),
    ("Stable Diffusion 2", lambda t: without(t, CLIP) | {
        "cond_stage_model.model.token_embedding.weight": torch.zeros(64, 1024),
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": torch.zeros(3072, 1024),
    }),
    ("Stable Diffusion 2", lambda t: t | {CONTEXT: torch.zeros(8, 1024)}),
    ("an inpainting or InstructPix2Pix UNet", lambda t: t | {IN: torch.zeros(8, 9, 3, 3)}),
    ("an inpainting or InstructPix2Pix UNet", lambda t: t | {IN: torch.zeros(8, 8, 3, 3)}),
    ("a model with zero terminal SNR", lambda t: t | {"ztsnr": torch.empty(0)}),
    ("a VAE", lambda t: only(t, VAE)),
    ("a UNet", lambda t: only(t, UNET)),
    ("a ControlNet", lambda t: {f"control_model.{name}": value for name, value in only(t, UNET).items()}),
    ("a ControlNet", lambda t: controlnet()),
    ("FLUX or Stable Diffusion 3", lambda t: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(9, 3)}),
    ("FLUX or Stable Diffusion 3", lambda t: {"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(9, 3)}),
    ("a textual inversion", lambda t: {"string_to_token": {"*": 265}, "string_to_param": {"*": LORA}}),
    ("a textual inversion", lambda t: {"emb_params": LORA}),
    ("a LoRA", lambda t: {f"{KOHYA}.lora_{side}.weight": LORA for side in ("down", "up")}),
    ("a LoRA", lambda t: {f"unet.{LAYER}.lora_{side}.weight": LORA for side in "AB"}),
    ("a LoRA", lambda t: {f"{LAYER}_lora.{side}.weight": LORA for side in ("down", "up")}),
    ("a LoHa", lambda t: {f"{LAYER}.hada_w{i}_{side}": LORA for side in "ab" for i in (1, 2)}),
    ("a LoHa", lambda t: {f"{LAYER}.lokr_w{i}": LORA for i in (1, 2)}),
]  # fmt: skip


@pytest.mark.parametrize("family, change", FAMILIES)
def test_other_models_are_named(family, change, tmp_path, tensors):
    torch.save(change(tensors), tmp_path / "model.ckpt")
    assert f" {family}" in refusal(tmp_path / "model.ckpt")


# ----------------------------------------------------------------------------------------- diffusers' folders


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TO_K = LAYER.replace("attn1.to_q", "attn2.to_k.weight")


def replace_in_unet(folder: Path, name: str, *shape: int) -> None:
    tensors = load_file(folder / WEIGHTS)
    assert name in tensors
    save_file(tensors | {name: torch.zeros(shape)}, folder / WEIGHTS)


BAD_FOLDERS = {
    "no files": (lambda path: [file.unlink() for file in path.rglob("*.*")], "text_encoder"),
    "no text encoder": (lambda path: (path / "text_encoder/model.safetensors").unlink(), "text_encoder"),
    "no UNet": (lambda path: shutil.rmtree(path / "unet"), "unet"),
    "Git LFS pointer": (lambda path: (path / WEIGHTS).write_text(POINTER), "unet.*Git LFS pointer"),
    "half a file": (lambda path: os.truncate(path / WEIGHTS, 100_000), f"unet.*{AGAIN}"),
    "config is no JSON": (lambda path: (path / "vae/config.json").write_text("{'x': 1}"), "vae.*config.json"),
    "heads": (lambda path: (path / "unet/config.json").write_text('{"attention_head_dim": 7}'), "heads"),
    "XL": (lambda path: replace_in_unet(path, TO_K, 8, 2048), "Stable Diffusion XL"),
    "2": (lambda path: replace_in_unet(path, TO_K, 8, 1024), "Stable Diffusion 2"),
    "inpainting": (lambda path: replace_in_unet(path, "conv_in.weight", 8, 9, 3, 3), "inpainting"),
}  # fmt: skip


@pytest.mark.parametrize("change, pattern", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_folders_that_are_no_checkpoint(change, pattern, folder):
    assert refusal(folder) is None
    change(folder)
    assert re.search(pattern, refusal(folder))


@pytest.mark.parametrize("part, word", [("vae", "VAE"), ("unet", "UNet"), ("text_encoder", "whole")])
def test_a_part_of_a_folder_is_no_checkpoint(part, word, tiny_folder):
    [path] = (tiny_folder / part).glob("*.safetensors")
    assert word in refusal(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "\udcff", '{"x": {"x": 3}}'])
def test_config_json_of_something_else(text, folder):
    (folder / "vae/config.json").write_bytes(text.encode(errors="surrogateescape"))
    refusal(folder)  # or it loads, as where there is none


# ---------------------------------------------------------------------------------------------- wrong tensors


def test_bad_tensors_are_counted_and_the_first_three_named(tmp_path, tensors):
    wrong = [name for name in tensors if name.startswith(f"{VAE}encoder.down.1.block")][:8]
    assert len(wrong) == 8
    for misshapen, missing in ((wrong[6:], wrong[:6]), ([], wrong[:3])):
        kept = {name: value for name, value in tensors.items() if name not in missing}
        SAVE["safetensors"](kept | {name: torch.zeros(5) for name in misshapen}, tmp_path / "model")
        line, what = refusal(tmp_path / "model"), r"is missing|has shape \(5,\) and not \([\d, ]+\)"
        assert len(re.findall(rf"{VAE}encoder\.down\.1\.\S+ (?:{what})", line)) == 3
        assert f"{len(misshapen + missing)} bad" in line


@pytest.mark.parametrize("pattern", [VAE, CLIP, f"{VAE}|{CLIP}", UNET, rf"{UNET}(?!time_embed)", ""])
def test_a_whole_part_is_missing(pattern, tmp_path, tensors):
    SAVE["safetensors"](without(tensors, pattern), tmp_path / "model")
    assert "missing" in refusal(tmp_path / "model")


@pytest.mark.parametrize("shape", [(), (0,), (5,), (1, 1), (0, 4, 3, 3), (1, 1, 1, 1, 1)], ids=str)
def test_any_tensor_can_have_any_shape(shape, tmp_path, tensors):
    """One by one; and those that families are told by, in a file without a Config."""
    embedding = f"{CLIP}text_model.embeddings.token_embedding.weight"
    for name in (IN, OUT, QUANT, CONTEXT, embedding, f"{VAE}encoder.conv_in.weight"):
        SAVE["safetensors"](tensors | {name: torch.ones(shape)}, tmp_path / "model")
        assert f"{name} has shape" in refusal(tmp_path / "model")
    save_file(tensors | {IN: torch.ones(shape), CONTEXT: torch.ones(shape)}, tmp_path / "model")
    assert "has shape" in refusal(tmp_path / "model")


# ------------------------------------------------------------------------------ headers and Configs that lie

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}


def changed(**change) -> dict:
    return GOOD | {"b": GOOD["b"] | change}


LIES = {
    "begins in another tensor": changed(shape=[6], data_offsets=[20, 32]),
    "leaves a hole": changed(shape=[2], data_offsets=[28, 32]),
    "ends after the file": changed(shape=[8], data_offsets=[24, 40]),
    "ends before the file": changed(shape=[2], data_offsets=[24, 28]),
    "offsets beyond 64 bits": changed(data_offsets=[10**30, 10**30 + 8]),
    "three offsets": changed(data_offsets=[24, 28, 32]),
    "offset of minus nothing": json.dumps(GOOD).replace("[0, 24]", "[-0, 24]").encode(),
    "offset of false": GOOD | {"a": GOOD["a"] | {"data_offsets": [False, 24]}},
    "a name twice": json.dumps(GOOD).replace('"b"', '"a"').encode(),
    "a field twice": json.dumps(GOOD).replace('"shape"', '"shape": [6], "shape"', 1).encode(),
    "another field": changed(more=1),
    "UTF-16": json.dumps(GOOD).encode("utf-16-le"),
    "nine sizes": changed(shape=[1] * 8 + [4]),
    "fractional offsets": changed(data_offsets=[24.0, 32.0]),
    "no offsets": {"a": {"dtype": "F32", "shape": [2, 3]}},
    "larger shape": changed(shape=[5]),
    "smaller shape": changed(shape=[3]),
    "twice negative shape": changed(shape=[-2, -2]),
    "huge shape of nothing": changed(shape=[2**63, 0, 2**63], data_offsets=[24, 24]),
    "shape in text": changed(shape=["4"]),
    "shape is a number": changed(shape=4),
    "another dtype of the size": GOOD | {"b": GOOD["b"] | {"dtype": "F64"}},
    "unknown dtype": changed(dtype="F12"),
    "dtype is a list": changed(dtype=["F16"]),
    "an entry is a list": GOOD | {"b": [24, 32]},
    "metadata holds a number": GOOD | {"__metadata__": {"format": 1}},
    "header is a list": b"{]",
    "header is not text": b"{\xff\xfe\xfd}",
    "header is cut": json.dumps(GOOD).encode()[:-1],
    "header is deep and whole": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "header holds a huge number": b'{"a":' + b"9" * 10_000 + b"}",
    "header is of no tensors": b"{}",
    "half a character": GOOD | {"__metadata__": {"format": "\ud800"}},
    "half a character in a name": GOOD | {"\udfff": GOOD["a"] | {"shape": [0], "data_offsets": [0, 0]}},
    "five megabytes of header": json.dumps(GOOD).encode() + b" " * 5_000_000,
}


def write_header(path: Path, header: dict | bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(32))


def test_header_without_a_lie(tmp_path):
    write_header(tmp_path / "model", GOOD)
    read, *_ = sd.read_file(tmp_path / "model", "a checkpoint")
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in read.items()}
    assert found == {"a": (torch.float32, (2, 3)), "b": (torch.float16, (4,))}
    assert "bad tensors" in refusal(tmp_path / "model")


@pytest.mark.parametrize("header", LIES.values(), ids=LIES)
def test_header_that_lies(header, tmp_path):
    write_header(tmp_path / "model", header)
    assert "bad tensors" not in refusal(tmp_path / "model")  # as is said of a good file of other tensors


@pytest.mark.parametrize("length", [0, 1, 7, 100_000, 2**31, 2**62, 2**63, 2**64 - 1])
def test_header_of_another_length(length, tmp_path):
    write_header(tmp_path / "model", GOOD, length)
    assert AGAIN in refusal(tmp_path / "model")


LYING_CONFIGS = [  # each field's values are test_configuration's
    [], "x", None, 3, {"depth": 3}, {"text_heads": 0}, {"text_dim": None}, {"text_dim": [32]},
    {"unet_channels": [[8], 16, 24]}, {"unet_channels": [None, 16, 24]}, {"image_size": 10**400},
    {"vocab_size": 700}, {"vocabulary": 5}, {"beta_end": 0.9, "timesteps": 1000},
]  # fmt: skip
GREEDY_CONFIGS = [
    {"text_layers": 10**9}, {"text_layers": 100}, {"vae_channels": [8] * 20_000}, {"text_layers": 10**4000},
    {"unet_channels": [8] * 20_000, "unet_attention": [True] * 20_000}, {"vae_blocks": 10**9},
    {"unet_channels": [8] * 8, "unet_attention": [True] * 8, "unet_blocks": 100}, {"vocab_size": 2**20},
    {"vae_channels": [2**20] * 8, "vae_blocks": 100}, {"text_dim": 2**20}, {"vocabulary": ["a"] * 10**6},
]  # fmt: skip


@pytest.mark.parametrize("config", LYING_CONFIGS, ids=str)
def test_config_that_lies(config, tmp_path, tensors):
    config = asdict(TINY) | config if isinstance(config, dict) else config
    save_file(tensors, tmp_path / "model", {"sd.py": json.dumps(config)})
    assert refusal(tmp_path / "model")


# -------------------------------------------------------------------------------------- truncated and damaged


@pytest.mark.parametrize("kind", SAVE_BARE)
def test_truncated_at_any_byte(kind, tmp_path):
    """Of a file of few and small tensors."""
    path = tmp_path / "model"
    shapes = {"unet.a": (3, 5), "unet.b": (), "unet.c": (7,), "unet.d": (2, 2, 1, 1)}
    small = {name: torch.ones(shape) for name, shape in shapes.items()}
    SAVE_BARE[kind](small, path)
    assert "is missing" in refusal(path)
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        assert re.search(f"{AGAIN}|empty", refusal(path)), size


@pytest.mark.parametrize("room", [0, 384], ids=["to map the file", "to read it"])
def test_out_of_memory_is_not_the_files_fault(room, tmp_path, tensors):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    SAVE["legacy"](tensors | {"model_ema.decay": torch.zeros(2**26)}, tmp_path / "model.ckpt")  # 256 MiB
    failure = pytest.raises((MemoryError, RuntimeError, OSError))  # but no ValueError
    with limit(resource.RLIMIT_AS, used + room * 2**20), failure:
        sd.load(tmp_path / "model.ckpt")


GREEDY_PICKLES = [
    b"\x80\x02}r" + struct.pack("<I", 2**26) + b".",  # a memo of so many places
    b"\x80\x04\x95" + struct.pack("<Q", 2**28) + b"}.",  # a frame of so many bytes
    b"\x80\x05\x8e" + struct.pack("<Q", 2**28) + b"abc.",  # so many bytes
    b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"abc.",  # so many bytes that can change
    b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a number of 2**31 - 1 bytes
    b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",  # lists in one another
    b"\x80\x02)" + b"\x85" * 100_000 + b".",  # tuples in one another
    b"\x80\x02})" + b"\x85" * 150_000 + b"Ns.",  # the same as a name
    b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 50 + b"Ns.",  # each holds the one before twice
    b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x60\x85R.",  # so many bytes, made by a call
    b"\x80\x02](" + b"]" * 4_000_000 + b"e.",  # so many lists
]


NOT_NUMBERS = "of the file's numbers"
WITH_OLD_STATE = Call(torch.Tensor, state=(torch.ones(4).storage(), 0, (4096,), (1,)))


@pytest.mark.parametrize("value, message", [
    (torch.zeros(1).expand(2**20, 2**13), "size of its tensors is"),
    (torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"), (torch.empty(3, device="meta"), "_rebuild_meta"),
    (torch.ones(3, dtype=torch.complex64), "ComplexFloatStorage"),
    (torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "_rebuild_qtensor|QInt8Storage"),
    (Call(torch.Tensor, 8, 8), NOT_NUMBERS), (Call(torch.FloatTensor, 8, 8), NOT_NUMBERS),
    (Call(torch.UntypedStorage, 64), NOT_NUMBERS), (WITH_OLD_STATE, NOT_NUMBERS),
])  # fmt: skip
@PICKLES
def test_tensors_that_are_not_in_the_file_are_refused(kind, value, message, tmp_path, tensors):
    SAVE[kind](tensors | {"model_ema.decay": value}, tmp_path / "model.ckpt")
    assert re.search(message, refusal(tmp_path / "model.ckpt"))


@pytest.mark.parametrize("call", [
    b"ctorch\nstorage.TypedStorage\n", b"ctorch.storage\nTypedStorage\n", b"ctorch.storage\nUntypedStorage\n",
    b"ctorch._utils\n_rebuild_tensor\n", b"ctorch\n_utils._rebuild_tensor_v3\n",
    b"c__builtin__\nbytearray\n", b"ctorch.cuda\nFloatTensor\n",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["zip", "legacy", "DATA.PKL"])
def test_names_of_what_makes_numbers_are_refused(kind, call, tmp_path):
    """Wherever the dot between module and name stands, and however the record is spelled."""
    path = tmp_path / "model.ckpt"
    write_pickle(path, b"\x80\x02" + call + b"K\x08\x85R.", "legacy" if kind == "legacy" else "zip")
    if kind == "DATA.PKL":
        path.write_bytes(path.read_bytes().replace(b"data.pkl", b"DATA.PKL"))
    assert NOT_NUMBERS in refusal(path)


def test_numbers_of_old_files_are_all_read(tmp_path, tensors):
    """Their last pickle, a list of what is read, may be damaged; memory that is not read has any content."""
    SAVE["legacy"](tensors, tmp_path / "model.ckpt")
    content = (tmp_path / "model.ckpt").read_bytes()
    ends = test_checkpoints.pickle_ends(content)
    keys = pickle.loads(content[ends[3] : ends[4]])
    for some in (keys[:-1], keys[1:], []):
        for numbers in (content[ends[4] :], b""):
            (tmp_path / "model.ckpt").write_bytes(content[: ends[3]] + pickle.dumps(some, 2) + numbers)
            assert refusal(tmp_path / "model.ckpt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "compressed"])
def test_tensors_do_not_outgrow_their_numbers(kind, tmp_path, tensors):
    """A tensor of four numbers whose state says that they are the first of a weight's."""
    name, weight = next((name, tensor) for name, tensor in tensors.items() if tensor.ndim == 2)
    small = torch.ones(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old ways to store tensors
        parts = small.storage(), 0, tuple(weight.shape), weight.stride()
    build = torch._utils._rebuild_tensor_v2, parts[0], 0, (4,), (1,), False, OrderedDict()
    save = test_checkpoints.save_compressed if kind == "compressed" else SAVE[kind]
    save(tensors | {name: Call(*build, state=parts)}, tmp_path / "model.ckpt")
    assert "resiz" in refusal(tmp_path / "model.ckpt")


def test_a_zip_with_two_directories_is_refused(tmp_path, tensors):
    """Of which zipfile finds the last, and PyTorch the one that the end points to."""
    path, parts = tmp_path / "model.ckpt", []
    for scale in (2, 1):
        SAVE["zip"]({name: scale * tensor for name, tensor in tensors.items()}, path)
        content = path.read_bytes()
        end = content.rfind(b"PK\5\6")
        size, begin = struct.unpack("<II", content[end + 12 : end + 20])
        parts.append((content[:begin], content[begin : begin + size], content[end:]))
    (body, directory, _), (_, _, end) = parts
    end = end[:16] + struct.pack("<I", len(body)) + end[20:]
    path.write_bytes(body + directory + b"".join(parts[1][:2]) + end)
    assert "a plain or deflated zip" in refusal(path)


LOAD_ALL = """
import resource, sys, sd

def most_megabytes():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
before = most_megabytes()
for path in sys.argv[1:]:
    try:
        sd.load(path)
    except ValueError as error:
        print(path, len(str(error).splitlines()), len(str(error)), most_megabytes() - before)
"""


def test_small_files_take_little_time_and_memory(tmp_path, tensors):
    """In a process of its own, which would go down alone, and at the latest after 20 seconds' work."""
    paths = [tmp_path / f"{kind}-{i}" for kind in ("zip", "legacy") for i in range(len(GREEDY_PICKLES))]
    for path, code in zip(paths, GREEDY_PICKLES * 2):
        write_pickle(path, code, path.name.split("-")[0])
    paths.append(tmp_path / "bomb.ckpt")
    with zipfile.ZipFile(paths[-1], "w", zipfile.ZIP_BZIP2) as archive:  # a quarter of a GB in a kilobyte
        archive.writestr("archive/data.pkl", b"\x80\x02X" + struct.pack("<I", 2**28) + bytes(2**28) + b".")
        archive.writestr("archive/version", "3\n")
    for i, config in enumerate(GREEDY_CONFIGS):
        paths.append(tmp_path / f"config-{i}")
        save_file(tensors, paths[-1], {"sd.py": json.dumps(asdict(TINY) | config)})
    command = [sys.executable, "-W", "ignore", "-c", LOAD_ALL, *paths]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    refused, lines, lengths, megabytes = zip(*(line.split() for line in result.stdout.splitlines()))
    assert list(refused) == [str(path) for path in paths] and result.stderr == ""
    assert set(lines) == {"1"}
    assert max(map(int, lengths)) < 500 and max(map(int, megabytes)) < 200


def test_a_cut_of_the_fuzz():
    command = [sys.executable, ROOT / "tests/fuzz.py", "--count", "200", "--seed", str(10**6)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
