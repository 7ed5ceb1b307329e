"""Files that are no checkpoint, a damaged one or another model's: one line says so, and that is all."""

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_checkpoints import SAVE, TINY, Call, random_model, save_legacy, write_pickle
from transformers import CLIPTextConfig, CLIPTextModel

import sd

PLAIN = replace(TINY, vae_widths=(8,), unet_widths=(8,), unet_attends=(True,))  # few tensors


@pytest.fixture(scope="module")
def tensors(small) -> dict[str, torch.Tensor]:
    return load_file(small)


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    """Where a bad file stands; the command line runs in another, empty one."""
    return tmp_path_factory.mktemp("bad")


def assert_one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    """The command line ended as it should on a user's mistake, with a line that has these words in it."""
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("sd.py: error: ")
    assert all(word.lower() in line.lower() for word in words), line


def refusal(path: Path) -> str | None:
    """Why `path` is not loaded, in one line that names it; None where it is. Any other exception is a bug."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sd.StableDiffusion.load(path)
    except (ValueError, OSError) as error:
        [line] = str(error).splitlines()
        assert str(path) in line
        return line


def save_own(tensors: dict[str, torch.Tensor], path: Path, config=asdict(PLAIN)) -> None:
    """What `save` writes, with any config, and sooner, as it does not wait for the disk."""
    save_file(tensors, path, {sd.OWN_MARK: json.dumps(config)})


# ------------------------------------------------------------------------ each kind, through the command line
# A kind is a function that writes a file out of the tensors of a good one, and words that the error has.

KINDS = []


def kind(*words: str) -> Callable:
    def register(write: Callable[[Path, dict[str, torch.Tensor]], None]) -> Callable:
        KINDS.append(pytest.param(write, words, id=write.__name__))
        return write

    return register


@kind("no such file")
def missing_file(path, tensors):
    pass


@kind("empty")
def empty_file(path, tensors):
    path.touch()


@kind("Git LFS pointer", "git lfs pull")
def git_lfs_pointer(path, tensors):
    digest = "0123456789abcdef" * 4
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 4265380512\n")


@kind("web page")
def web_page(path, tensors):
    path.write_text("\n  <!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n" * 100)


@kind("checkpoint", "download it again")
def text_file(path, tensors):
    path.write_text("These are the weights that you wanted.\n" * 100)


@kind("checkpoint", "download it again")
def json_file(path, tensors):
    path.write_text(json.dumps({"error": "Access to the model is restricted", "weights": [1, 2, 3]}))


@kind("checkpoint", "download it again")
def picture(path, tensors):
    Image.new("RGB", (64, 64), "red").save(path, "png")


@kind("checkpoint", "download it again")
def random_bytes(path, tensors):
    path.write_bytes(random.Random(0).randbytes(100_000))


@kind("checkpoint", "download it again")
def unknown_archive(path, tensors):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/readme.txt", "no data.pkl here")


@kind("damaged")
def truncated_safetensors(path, tensors):
    save_file(tensors, path)
    os.truncate(path, 50_000_000)


def save_with_a_lie(path, tensors, lie: Callable[[dict], None]) -> None:
    """A .safetensors whose header says of its first tensor what is not so."""
    save_file(tensors, path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    lie(min(header.values(), key=lambda entry: entry["data_offsets"]))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


@kind("damaged", "does not fit its place")
def header_lies_about_an_offset(path, tensors):
    save_with_a_lie(path, tensors, lambda entry: entry.update(data_offsets=[4, entry["data_offsets"][1]]))


@kind("damaged", "does not fit its place")
def header_lies_about_a_size(path, tensors):
    save_with_a_lie(path, tensors, lambda entry: entry.update(shape=[2, *entry["shape"]]))


@kind("damaged", "does not fit its place")
def header_lies_about_a_dtype(path, tensors):
    save_with_a_lie(path, tensors, lambda entry: entry.update(dtype="F16"))


@kind("damaged", "F4096")
def header_names_no_dtype(path, tensors):
    save_with_a_lie(path, tensors, lambda entry: entry.update(dtype="F4096"))


@kind("damaged", "does not fit its place")
def header_lets_tensors_overlap(path, tensors):
    end = tensors["betas"].nbytes
    shape = [tensors["betas"].numel() + 1]
    save_with_a_lie(path, tensors, lambda entry: entry.update(shape=shape, data_offsets=[0, end + 4]))


@kind("damaged")
def truncated_zip(path, tensors):
    torch.save(tensors, path)
    os.truncate(path, 50_000_000)


@kind("damaged")
def truncated_legacy(path, tensors):
    save_legacy(tensors, path)
    os.truncate(path, 50_000_000)


@kind("damaged")
def compressed_zip(path, tensors):
    torch.save({"a": torch.zeros(10)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@kind("damaged")
def zip_storage_too_short(path, tensors):
    torch.save({"a": torch.zeros(10)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content[:-4] if "/data/" in name else content)


@kind("checkpoint", "download it again")
def pickle_of_a_list(path, tensors):
    torch.save([tensors["model.diffusion_model.out.2.bias"]], path)


@kind("checkpoint", "download it again")
def pickle_of_a_number(path, tensors):
    torch.save(42, path)


@kind("checkpoint", "download it again")
def pickle_of_python_s_own(path, tensors):
    path.write_bytes(pickle.dumps({"state_dict": {}}))


@kind("checkpoint", "download it again")
def pickle_of_a_foreign_object(path, tensors):
    write_pickle(path, b"cnowhere\nModel\n)R.", "legacy")


@kind("vae.quant.weight", "posix.mkdir")
def code_where_a_tensor_belongs(path, tensors):
    torch.save(tensors | {"first_stage_model.quant_conv.weight": Call(os.mkdir, "trace")}, path)


@kind("vae.quant.weight", "builtins.int")
def number_where_a_tensor_belongs(path, tensors):
    torch.save({"state_dict": tensors | {"first_stage_model.quant_conv.weight": 3}}, path)


@kind("vae.quant.weight is missing")
def missing_tensor(path, tensors):
    tensors = dict(tensors)
    del tensors["first_stage_model.quant_conv.weight"]
    save_file(tensors, path)


@kind("vae.quant.weight", "(8, 9, 1, 1)", "(8, 8, 1, 1)")
def misshapen_tensor(path, tensors):
    save_file(tensors | {"first_stage_model.quant_conv.weight": torch.zeros(8, 9, 1, 1)}, path)


@kind("NaN or infinit", "unet.conv_out.weight")
def nan_weight(path, tensors):
    weight = tensors["model.diffusion_model.out.2.weight"].clone()
    weight[1, 2, 0, 1] = torch.nan
    save_file(tensors | {"model.diffusion_model.out.2.weight": weight}, path)


@kind("NaN or infinit", "unet.conv_out.weight")
def infinite_weights_in_fp16(path, tensors):
    weight = tensors["model.diffusion_model.out.2.weight"].half()
    weight[1, 2, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    save_file(tensors | {"model.diffusion_model.out.2.weight": weight}, path)


@kind("Stable Diffusion XL")
def xl_checkpoint(path, tensors):
    replaced = {name: value for name, value in tensors.items() if not name.startswith("cond_stage_model.")}
    replaced["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(64, 2816)
    embedding = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
    replaced[embedding] = torch.zeros(64, 768)
    replaced["conditioner.embedders.1.model.token_embedding.weight"] = torch.zeros(64, 1280)
    save_file(replaced, path)


@kind("Stable Diffusion 2")
def sd2_checkpoint(path, tensors):
    replaced = {name: value for name, value in tensors.items() if not name.startswith("cond_stage_model.")}
    replaced["cond_stage_model.model.token_embedding.weight"] = torch.zeros(64, 1024)
    replaced["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"] = torch.zeros(3072, 1024)
    torch.save({"state_dict": replaced}, path)


@kind("inpainting UNet", "9 input channels")
def inpainting_checkpoint(path, tensors):
    torch.save(tensors | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, path)


@kind("InstructPix2Pix", "8 input channels")
def instruct_pix2pix_checkpoint(path, tensors):
    torch.save(tensors | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 8, 3, 3)}, path)


@kind("BERT in CLIP's place")
def checkpoint_with_bert(path, tensors):
    types = "cond_stage_model.transformer.embeddings.token_type_embeddings.weight"
    torch.save(tensors | {types: torch.zeros(2, 64)}, path)


def only(tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@kind("VAE")
def vae_checkpoint(path, tensors):
    torch.save({"state_dict": only(tensors, "first_stage_model.")}, path)


@kind("VAE")
def vae_checkpoint_with_prefix(path, tensors):
    save_file({name: value for name, value in tensors.items() if name.startswith("first_stage_model.")}, path)


@kind("a UNet alone")
def unet_checkpoint(path, tensors):
    save_file(only(tensors, "model.diffusion_model."), path)


@kind("ControlNet")
def controlnet_checkpoint(path, tensors):
    unet = only(tensors, "model.diffusion_model.")
    control = {f"control_model.{name}": value for name, value in unet.items()}
    torch.save({"control_model.zero_convs.0.0.weight": torch.zeros(32, 32, 1, 1)} | control, path)


@kind("ControlNet")
def controlnet_of_diffusers(path, tensors):
    model = ControlNetModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(16, 32),
    )  # fmt: skip
    save_file(model.state_dict(), path)


@kind("FLUX or Stable Diffusion 3")
def flux_checkpoint(path, tensors):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(9, 3)}, path)


@kind("textual inversion")
def textual_inversion(path, tensors):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1, 768)}}, path)


@kind("LoRA")
def lora_of_kohya(path, tensors):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    sides = {f"{layer}.lora_down.weight": torch.zeros(4, 320), f"{layer}.lora_up.weight": torch.zeros(320, 4)}
    save_file({f"{layer}.alpha": torch.tensor(4.0)} | sides, path)


@kind("LoRA")
def lora_of_peft(path, tensors):
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.zeros(4, 320), torch.zeros(320, 4)
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)


@kind("LoRA")
def lora_of_old_diffusers(path, tensors):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
    torch.save({f"{layer}.down.weight": torch.zeros(4, 320), f"{layer}.up.weight": torch.zeros(320, 4)}, path)


@pytest.mark.parametrize("write, words", KINDS)
def test_command_line_says_what_is_wrong(write, words, folder, tmp_path, tensors, run_sd):
    path = folder / "sd-v1-5.ckpt"
    write(path, tensors)
    assert_one_line(run_sd("--weights", path), str(path), *words)
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------- diffusers' folders


def without_text_encoder(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()


def without_unet(folder):
    shutil.rmtree(folder / "unet")


def git_lfs_pointer_in_a_folder(folder):
    git_lfs_pointer(folder / "unet" / "diffusion_pytorch_model.safetensors", {})


def config_is_not_json(folder):
    (folder / "vae" / "config.json").write_text("{'scaling_factor': 0.5}")


def config_of_heads_that_do_not_divide(folder):
    (folder / "unet" / "config.json").write_text('{"attention_head_dim": 7}')


def write_unet(folder, **settings):
    UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **settings,
    ).save_pretrained(folder / "unet")  # fmt: skip


def xl_folder(folder):
    write_unet(
        folder, cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )  # fmt: skip
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")


def sd2_folder(folder):
    write_unet(folder, cross_attention_dim=1024, use_linear_projection=True)


def inpainting_folder(folder):
    write_unet(folder, cross_attention_dim=64, in_channels=9)


@pytest.mark.parametrize(
    "change, words",
    [
        (shutil.rmtree, ["no such"]),
        (without_text_encoder, ["text_encoder"]),
        (without_unet, ["unet"]),
        (git_lfs_pointer_in_a_folder, ["unet", "Git LFS pointer"]),
        (config_is_not_json, ["vae", "config.json"]),
        (config_of_heads_that_do_not_divide, ["heads"]),
        (xl_folder, ["Stable Diffusion XL"]),
        (sd2_folder, ["Stable Diffusion 2"]),
        (inpainting_folder, ["inpainting UNet", "9 input channels"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_command_line_says_what_is_wrong_with_a_folder(change, words, folder, tmp_path, small_folder, run_sd):
    path = shutil.copytree(small_folder, folder / "sd-v1-5", ignore=shutil.ignore_patterns("tokenizer"))
    change(path)
    assert_one_line(run_sd("--weights", path, "--steps", 1, "--width", 64, "--height", 64), str(path), *words)
    assert not any(tmp_path.iterdir())


def test_a_full_device_is_not_the_files_fault():
    """Stood in for by the error that PyTorch raises there."""
    with pytest.raises(torch.OutOfMemoryError, match="^full$"), sd.blamed("a file"):
        raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize("part, word", [("vae", "VAE"), ("unet", "UNet alone"), ("text_encoder", "whole")])
def test_a_part_of_a_folder_is_no_checkpoint(part, word, small_folder):
    [path] = (small_folder / part).glob("*.safetensors")
    assert word in refusal(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"scaling_factor"', "\udcff"])
def test_a_config_of_something_else(text, folder, small_folder):
    """Refused or, as where there is none, done without."""
    path = shutil.copytree(small_folder, folder / "sd-v1-5", ignore=shutil.ignore_patterns("tokenizer"))
    (path / "vae" / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refusal(path)


def test_a_folder_of_something_else(tmp_path):
    assert "text_encoder" in refusal(tmp_path)


# ------------------------------------------------------------------------------------ missing, misshapen, NaN


def test_the_first_three_and_how_many_more(tmp_path, tensors):
    """Of ten tensors that are wrong, some are missing and some have another shape."""
    wrong = [name for name in tensors if name.startswith("first_stage_model.encoder.down.1.block")][:10]
    assert len(wrong) == 10
    changed = {name: value for name, value in tensors.items() if name not in wrong[:6]}
    save_file(changed | {name: torch.zeros(5) for name in wrong[6:]}, tmp_path / "model")
    line = refusal(tmp_path / "model")
    what = r"is missing|has shape \(5,\) and not \([\d, ]+\)"
    reports = re.findall(rf"vae\.encoder\.down\.1\.\S+ (?:{what})", line)
    assert len(reports) == 3 and "and 7 more" in line

    save_file({name: value for name, value in tensors.items() if name not in wrong[:3]}, tmp_path / "model")
    line = refusal(tmp_path / "model")
    assert line.count("is missing") == 3 and "more" not in line


@pytest.mark.parametrize(
    "pattern",
    [
        "first_stage_model",
        "cond_stage_model",
        "first_stage_model|cond_stage_model",
        "cond_stage_model.*layers",
        r"model\.diffusion_model\.\w+put_blocks",
        r"model\.diffusion_model\.(?!time_embed)",
        r"model\.diffusion_model\.input_blocks\.[1-6]\.",
    ],
)
def test_a_whole_part_is_missing(pattern, tmp_path, tensors):
    kept = {name: value for name, value in tensors.items() if not re.match(pattern, name)}
    save_file(kept, tmp_path / "model")
    assert "missing" in refusal(tmp_path / "model")


@pytest.mark.parametrize("shape", [(), (0,), (5,), (1, 1), (0, 4, 3, 3), (1, 1, 1, 1, 1)], ids=str)
def test_every_tensor_can_have_any_shape(shape, tmp_path, tensors):
    """One at a time, tensors that the family and the sizes are told by, and one that nothing is told by."""
    suspects = [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.encoder.conv_in.weight",
        "first_stage_model.post_quant_conv.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.layer_norm1.weight",
    ]
    for name in suspects:
        save_file(tensors | {name: torch.ones(shape)}, tmp_path / "model")
        assert "has shape" in refusal(tmp_path / "model"), name


@pytest.mark.parametrize("third, dtype", enumerate([torch.float32, torch.float16, torch.bfloat16]), ids=str)
def test_one_number_that_is_not_finite_in_any_tensor(third, dtype, tmp_path):
    """Each tensor is tried in one of the dtypes."""
    path, generator = tmp_path / "model.safetensors", random.Random(third)
    weights = random_model(PLAIN).to(dtype).state_dict()
    save_own(weights, path)
    assert refusal(path) is None
    for name in list(weights)[third::3]:
        spoilt = weights[name].clone()
        place = generator.randrange(spoilt.numel())
        spoilt.view(-1)[place] = generator.choice([torch.nan, torch.inf, -torch.inf])
        save_own(weights | {name: spoilt}, path)
        assert re.search(rf"NaN or infinit.* in {re.escape(name)}\W", refusal(path))


def test_the_largest_finite_numbers_are_fine(tmp_path):
    weights = random_model(PLAIN).half().state_dict()
    most = torch.finfo(torch.float16).max
    largest = {name: torch.full_like(value, most) for name, value in weights.items()}
    save_own(largest, tmp_path / "model.safetensors")
    for dtype in (torch.float16, torch.float32):
        sd.StableDiffusion.load(tmp_path / "model.safetensors", dtype=dtype)


# ------------------------------------------------------------------------------------------- headers that lie


GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}


def changed(**change) -> dict:
    return GOOD | {"b": GOOD["b"] | change}


LIES = {
    "begins in another tensor": changed(shape=[6], data_offsets=[20, 32]),
    "lies within another tensor": GOOD | {"c": GOOD["b"] | {"data_offsets": [8, 16]}},
    "lies on another tensor": changed(data_offsets=[0, 8]),
    "leaves a hole": changed(shape=[2], data_offsets=[28, 32]),
    "ends after the file": changed(shape=[8], data_offsets=[24, 40]),
    "ends before the file": changed(shape=[2], data_offsets=[24, 28]),
    "ends before it begins": changed(data_offsets=[32, 24]),
    "negative offsets": changed(data_offsets=[-8, 0]),
    "huge offsets": changed(data_offsets=[24, 2**64]),
    "offsets beyond 64 bits": changed(data_offsets=[10**30, 10**30 + 8]),
    "one offset": changed(data_offsets=[24]),
    "three offsets": changed(data_offsets=[24, 28, 32]),
    "offsets in text": changed(data_offsets=["24", "32"]),
    "fractional offsets": changed(data_offsets=[24.0, 32.0]),
    "infinite offsets": changed(data_offsets=[24, float("inf")]),
    "no offsets": {"a": {"dtype": "F32", "shape": [2, 3]}},
    "larger shape": changed(shape=[5]),
    "smaller shape": changed(shape=[3]),
    "negative shape": changed(shape=[-4]),
    "twice negative shape": changed(shape=[-2, -2]),
    "huge shape": changed(shape=[2**63, 2**63]),
    "huge shape of nothing": changed(shape=[2**63, 0, 2**63], data_offsets=[24, 24]),
    "shape in text": changed(shape=["4"]),
    "shape is a number": changed(shape=4),
    "shape is null": changed(shape=None),
    "fractional shape": changed(shape=[4.0]),
    "nested shape": changed(shape=[[4]]),
    "another dtype of the size": GOOD | {"b": GOOD["b"] | {"dtype": "F64"}},
    "unknown dtype": changed(dtype="F12"),
    "dtype is a number": changed(dtype=16),
    "dtype is a list": changed(dtype=["F16"]),
    "an entry is a list": GOOD | {"b": [24, 32]},
    "an entry is null": GOOD | {"b": None},
    "an entry is empty": GOOD | {"b": {}},
    "metadata is a list": GOOD | {"__metadata__": [sd.OWN_MARK]},
    "metadata is a number": GOOD | {"__metadata__": 1},
    "metadata holds a number": GOOD | {"__metadata__": {sd.OWN_MARK: 1}},
    "header is a list": b"{]",
    "header is not JSON": b"{'a': 1}",
    "header is not text": b"{\xff\xfe\xfd}",
    "header is cut": json.dumps(GOOD).encode()[:-1],
    "header has more after it": json.dumps(GOOD).encode() + b"}",
    "header is deep": b'{"a":' + b"[" * 100_000,
    "header is deep and whole": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "header holds a huge number": b'{"a":' + b"9" * 10_000 + b"}",
    "header is of no tensors": b"{}",
}


def safetensors_file(path: Path, header: dict | bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(32))


def test_the_header_that_lies_is_good_without_the_lie(tmp_path):
    safetensors_file(tmp_path / "model", GOOD)
    read, *_ = sd.read_file(tmp_path / "model")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in read.items()} == {
        "a": (torch.float32, (2, 3)), "b": (torch.float16, (4,)),
    }  # fmt: skip
    assert "use a whole" in refusal(tmp_path / "model")


@pytest.mark.parametrize("header", LIES.values(), ids=LIES)
def test_a_header_that_lies(header, tmp_path):
    safetensors_file(tmp_path / "model", header)
    assert "use a whole" not in refusal(tmp_path / "model")  # as is said of a good file of other things


@pytest.mark.parametrize("length", [0, 1, 7, 100_000, 2**31, 2**62, 2**63, 2**64 - 1])
def test_a_header_of_another_length(length, tmp_path):
    safetensors_file(tmp_path / "model", GOOD, length)
    assert "damaged" in refusal(tmp_path / "model")


LYING_CONFIGS = {
    "a list": [],
    "text": "x",
    "null": None,
    "unknown fields": {"depth": 3},
    "no text heads": {"text_heads": 0},
    "text heads that do not divide": {"text_heads": 7},
    "unet heads that do not divide": {"unet_heads": 3},
    "no groups": {"norm_groups": 0},
    "groups that do not divide": {"norm_groups": 3},
    "negative width": {"text_width": -32},
    "huge width": {"text_width": 2**62},
    "fractional width": {"text_width": 32.0},
    "width in text": {"text_width": "32"},
    "no widths": {"unet_widths": [], "unet_attends": []},
    "a number for widths": {"vae_widths": 8},
    "another number of levels": {"unet_attends": [True]},
    "another vocabulary": {"vocab_size": 700},
}


@pytest.mark.parametrize("lie", LYING_CONFIGS.values(), ids=LYING_CONFIGS)
def test_own_file_with_a_config_that_lies(lie, tmp_path):
    weights, path = random_model(TINY).state_dict(), tmp_path / "model"
    save_own(weights, path, asdict(TINY))
    assert refusal(path) is None
    save_own(weights, path, asdict(TINY) | lie if isinstance(lie, dict) else lie)
    assert refusal(path)


def test_a_missing_file_is_a_missing_file_from_python_too(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: no such file or folder"):
        sd.StableDiffusion.load(tmp_path / "missing")


# ----------------------------------------------------------------------------------------- truncated, damaged


def few_tensors() -> dict[str, torch.Tensor]:
    """Few and small, so that a file of them can be cut at each of its bytes."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"unet.a": (3, 5), "unet.b": (), "unet.c": (7,), "unet.d": (2, 2, 1, 1)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", SAVE)
def test_truncated_at_any_byte(kind, tmp_path):
    path = tmp_path / "model"
    SAVE[kind](few_tensors(), path)
    assert len(sd.read_file(path)[0]) == 4
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        with pytest.raises(ValueError):
            sd.read_file(path)
        assert re.search("damaged|empty", refusal(path)), size


def places(content: bytes, data: list[bytes], generator: random.Random, number: int) -> Iterator[int]:
    """Where to damage a file: nine times in ten in what is not the numbers of the tensors."""
    inside = [range(content.index(part), content.index(part) + len(part)) for part in data]
    outside = sorted(set(range(len(content))).difference(*inside))
    for _ in range(number):
        yield generator.choice(outside) if generator.random() < 0.9 else generator.randrange(len(content))


@pytest.fixture
def little_memory():
    """A file that asks for a lot gets a MemoryError, and not all that the machine has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def damage(content: bytes, place: int, generator: random.Random) -> bytes:
    """A bit flipped, a byte or eight overwritten, or some cut out or doubled."""
    size = generator.choice([1, 2, 8, 64])
    part = content[place : place + size]
    part = generator.choice([
        bytes([part[0] ^ 1 << generator.randrange(8)]) + part[1:],
        generator.randbytes(1) + part[1:],
        generator.randbytes(len(part)),
        b"",
        part * 2,
    ])  # fmt: skip
    return content[:place] + part + content[place + size :]


def assert_survives_damage(path: Path, checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """However its file at `path`, which holds these tensors, is damaged: a checkpoint loads or is refused."""
    content, generator = path.read_bytes(), random.Random(0)
    assert refusal(checkpoint) is None
    data = [tensor.numpy().tobytes() for tensor in tensors.values() if tensor.numel() > 50]
    refused = 0
    for place in places(content, data, generator, 200):
        path.write_bytes(damage(content, place, generator))
        refused += refusal(checkpoint) is not None
    assert 50 < refused < 200


def test_damaged_own_file(tmp_path, little_memory):
    path, tensors = tmp_path / "model", random_model(PLAIN).state_dict()
    save_own(tensors, path)
    assert_survives_damage(path, path, tensors)


@pytest.mark.parametrize("kind", SAVE)
def test_damaged_file_in_a_folder(kind, tmp_path, little_memory):
    torch.manual_seed(0)
    sizes = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 256}
    text = CLIPTextConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    CLIPTextModel(text).save_pretrained(tmp_path / "text_encoder")
    AutoencoderKL(block_out_channels=(32,), latent_channels=4).save_pretrained(tmp_path / "vae")
    unet = UNet2DConditionModel(
        block_out_channels=(32,), layers_per_block=1, cross_attention_dim=64, attention_head_dim=8,
        down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"],
    )  # fmt: skip
    (tmp_path / "unet").mkdir()
    suffix = ".safetensors" if kind == "safetensors" else ".bin"
    path = tmp_path / "unet" / f"diffusion_pytorch_model{suffix}"
    SAVE[kind](unet.state_dict(), path)
    assert_survives_damage(path, tmp_path, unet.state_dict())


GREEDY_PICKLES = [
    b"\x80\x02}r" + struct.pack("<I", 2**26) + b".",  # a memo of so many places
    b"\x80\x04\x95" + struct.pack("<Q", 2**28) + b"}.",  # a frame of so many bytes
    b"\x80\x05\x8e" + struct.pack("<Q", 2**28) + b"abc.",  # so many bytes
    b"\x80\x05\x96" + struct.pack("<Q", 2**20) + b"abc.",  # so many bytes that can change
    b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a number of 2**31 - 1 bytes
    b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",  # lists in one another
    b"\x80\x02)" + b"\x85" * 100_000 + b".",  # tuples in one another
]

READ_ALL = """
import sys, sd

def most_megabytes():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

before = most_megabytes()
for path in sys.argv[1:]:
    try:
        sd.StableDiffusion.load(path)
    except ValueError as error:
        print(path, len(str(error).splitlines()), most_megabytes() - before)
"""


def test_a_small_pickle_takes_little_memory(tmp_path):
    """One flipped bit can make such a number. In a process of its own, which would go down alone."""
    paths = [tmp_path / f"{kind}-{i}" for kind in ("zip", "legacy") for i in range(len(GREEDY_PICKLES))]
    for path, code in zip(paths, GREEDY_PICKLES * 2):
        write_pickle(path, code, path.name.split("-")[0])
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    refused, lines, megabytes = zip(*(line.split() for line in result.stdout.splitlines()))
    assert list(refused) == [str(path) for path in paths]
    assert set(lines) == {"1"} and result.stderr == ""
    assert max(map(int, megabytes)) < 200
