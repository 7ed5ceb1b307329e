"""Section 9: LoRAs and VAEs of their own, against what diffusers makes of the same files."""

import json
import math
import re
import shutil
from pathlib import Path

import diffusers
import make_checkpoint
import pytest
import torch
from conftest import measured, relative_error, seeded
from safetensors.torch import load_file, save_file
from test_checkpoints import assert_same, with_old_attention

import sd

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_" + LAYER.replace(".", "_")


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> dict[str, Path]:
    """Two LoRAs in each layout, of different ranks."""
    folder, paths = tmp_path_factory.mktemp("loras"), {}
    for layout in ("kohya", "peft"):
        for i, rank in enumerate([4, 8]):
            path = paths[f"{layout}{i}"] = folder / f"{layout}{i}.safetensors"
            save_file(make_checkpoint.random_lora(layout, small=True, seed=i, rank=rank), path)
    return paths


@pytest.fixture(scope="module")
def merged(small, loras) -> dict[str, torch.Tensor]:
    """The weights with the first LoRA; in kohya's layout, with half the alpha, it takes twice the scale."""
    return weights(sd.load(small, loras={loras["peft0"]: 1}))


def weights(model: sd.StableDiffusion) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def diffusers_weights(pipeline, model: sd.StableDiffusion) -> dict[str, torch.Tensor]:
    """The weights of a pipeline under our names and in our shapes."""
    theirs = {}
    for part in ("text_encoder", "vae", "unet"):
        for name, tensor in getattr(pipeline, part).state_dict().items():
            if part == "text_encoder":
                name = "text_model." + name.removeprefix("text_model.")  # transformers 5 is without it
            theirs[f"{part}.{name}"] = tensor
    names = sd.names_in(sd.DIFFUSERS, model)
    return {name: theirs[names[name]].view(weight.shape) for name, weight in weights(model).items()}


def diffusers_fused(small: Path, folder: Path, files: dict[Path, float]):
    """diffusers' pipeline with LoRAs, {path: scale}, in its weights."""
    pipeline = make_checkpoint.reference_pipeline(small, folder, small=True)
    for i, path in enumerate(files):
        pipeline.load_lora_weights(str(path), adapter_name=f"lora{i}")
    pipeline.set_adapters([f"lora{i}" for i in range(len(files))], list(files.values()))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return pipeline


# ------------------------------------------------------------------------------------------------------ LoRA


@pytest.mark.parametrize("scales", [{"0": 0.7}, {"0": 0.7, "1": 1.0}], ids=str)
@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_merged_weights_match_diffusers(small, small_model, loras, tmp_path, layout, scales):
    pytest.importorskip("peft", reason="needs peft")
    files = {loras[layout + i]: scale for i, scale in scales.items()}
    model = sd.load(small, loras=files)
    theirs, before = diffusers_weights(diffusers_fused(small, tmp_path, files), model), weights(small_model)
    changed = 0
    for name, ours in weights(model).items():
        error = relative_error(ours, theirs[name])
        assert measured("weights with LoRAs, against diffusers'", error) <= 1e-5, name
        changed += not torch.equal(ours, before[name])
    layers = sum(".lora_up." in name or ".lora_B." in name for name in load_file(next(iter(files))))
    assert changed == layers > 300


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_alpha_in_pefts_metadata(small, tmp_path, part):
    """As diffusers' scripts save it where alpha is not the rank; without it, alpha is the rank."""
    tensors = make_checkpoint.random_lora("peft", small=True)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
    modules = sorted({name.split(".", 1)[1].split(".lora_")[0] for name in tensors})
    about = {"r": 4, "lora_alpha": 12, "target_modules": modules, "peft_type": "LORA"}
    metadata = json.dumps({f"{part}.{key}": value for key, value in about.items()})
    plain, labeled = tmp_path / "plain.safetensors", tmp_path / "labeled.safetensors"
    save_file(tensors, plain)
    save_file(tensors, labeled, {"lora_adapter_metadata": metadata})
    model, thrice = sd.load(small, loras={labeled: 1}), weights(sd.load(small, loras={plain: 3}))
    for name, ours in weights(model).items():
        assert relative_error(ours, thrice[name]) <= 1e-6, name
    if part == "unet":  # the text encoder's metadata is more than diffusers can read with transformers 5
        pytest.importorskip("peft", reason="needs peft")
        theirs = diffusers_weights(diffusers_fused(small, tmp_path / "configs", {labeled: 1}), model)
        for name, ours in weights(model).items():
            assert relative_error(ours, theirs[name]) <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_and_layout_are_the_models(small, loras, merged, dtype):
    model = sd.load(small, dtype=dtype, loras={loras["kohya0"]: 2})
    for name, ours in weights(model).items():
        layout = torch.channels_last if ours.ndim == 4 else torch.contiguous_format
        assert ours.dtype == dtype and ours.is_contiguous(memory_format=layout), name
        assert relative_error(ours.float(), merged[name]) < 2 * torch.finfo(dtype).eps, name


def test_other_names_and_offload(small_folder, loras, merged, tmp_path):
    """The LoRA's names do not depend on the checkpoint's; PEFT leaves text_model out with transformers 5."""
    tensors = {name.replace(".text_model", ""): x for name, x in load_file(loras["peft0"]).items()}
    assert any(name.startswith("text_encoder.encoder.") for name in tensors)
    save_file(tensors, tmp_path / "lora.safetensors")
    loras = {str(tmp_path / "lora.safetensors"): 1}
    assert_same(weights(sd.load(small_folder, offload=True, loras=loras)), merged)


def test_tensors_that_fit_no_layer_are_named(small, loras, merged, tmp_path):
    more = pair("lora_unet_guide_1") | pair("lora_unet_guide_2")
    save_file(load_file(loras["kohya0"]) | more, tmp_path / "lora.safetensors")
    message = r"lora\.safetensors: 4 tensors fit no layer: unet_guide_1\."
    with pytest.warns(UserWarning, match=message) as notes:
        assert_same(weights(sd.load(small, loras={tmp_path / "lora.safetensors": 2})), merged)
    assert len(notes) == 1


def pair(layer: str, out: int = 32, inner: int = 64, rank: int = 2) -> dict[str, torch.Tensor]:
    up, down = torch.ones(out, rank), torch.ones(rank, inner)
    return {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}


XL = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"
BAD_LORAS = {
    "missing": (None, "[Nn]o such file"),
    "SDXL, by its context": (pair(KOHYA, 320, 2048), "Stable Diffusion XL .* a LoRA of SD v1"),
    "SDXL's in PEFT's layout": ({f"unet.{LAYER}.lora_A.weight": torch.ones(2, 2048)}, "Stable Diffusion XL"),
    "SDXL, by its text encoders": ({XL: torch.ones(2, 2)}, "Stable Diffusion XL"),
    "SD 2": (pair(KOHYA, 320, 1024), "Stable Diffusion 2 .* a LoRA of SD v1"),
    "FLUX": (pair("lora_unet_double_blocks_0_img_attn_qkv"), "FLUX"),
    "LoHa": ({f"{KOHYA}.hada_w1_a": torch.ones(2, 2)}, "a LoHa"),
    "LoKr": ({f"{KOHYA}.lokr_w1": torch.ones(2, 2)}, "a LoKr"),
    "DoRA": (pair(KOHYA) | {f"{KOHYA}.dora_scale": torch.ones(32, 1)}, "a DoRA"),
    "decomposed convolution": (pair(KOHYA) | {f"{KOHYA}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "a LoHa"),
    "another width": (pair(KOHYA, 32, 60), r"\b60\b|\[64\]"),
    "transposed": (pair(KOHYA, 64, 32), r"\b32\b|\[64\]"),
    "two ranks": (pair(KOHYA) | {f"{KOHYA}.lora_up.weight": torch.ones(32, 3)}, "shape"),
    "infinite alpha": (pair(KOHYA) | {f"{KOHYA}.alpha": torch.tensor(math.inf)}, "infinite with its LoRA"),
    "numbers that overflow": ({name: 1e30 * x for name, x in pair(KOHYA).items()}, "infinite with its LoRA"),
    "other layers": (pair("lora_unet_guide_1"), "without layers of SD v1"),
    "half a pair": ({f"{KOHYA}.lora_up.weight": torch.ones(32, 2)}, r"down' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("tensors, pattern", BAD_LORAS.values(), ids=BAD_LORAS)
def test_loras_that_are_refused(small, tmp_path, tensors, pattern):
    path = tmp_path / "lora.safetensors"
    if tensors is not None:
        save_file(tensors, path)
    with pytest.raises((OSError, ValueError)) as error:
        sd.load(small, loras={path: 1})
    message = str(error.value)
    assert str(path) in message and "\n" not in message and re.search(pattern, message), message


def test_each_kind_of_file_is_refused_in_the_others_place(small, loras, vaes):
    for message, arguments in {
        "this is without layers of SD v1 and must be a LoRA": {"loras": {small: 1}},
        "this is a VAE and must be a LoRA of SD v1": {"loras": {vaes / "bare.safetensors": 1}},
        "this is a LoRA and must be a VAE of SD v1": {"vae": loras["kohya0"]},
    }.items():
        with pytest.raises(ValueError, match=message):
            sd.load(small, **arguments)


# ------------------------------------------------------------------------------------------- a VAE of its own

VAE_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vaes(tmp_path_factory) -> Path:
    """A folder that has one VAE in every layout."""
    path = tmp_path_factory.mktemp("vaes")
    for name in ("bare.safetensors", "bare.ckpt", "folder"):
        make_checkpoint.write_vae(path / name, small=True, seed=3)
    tensors = {f"first_stage_model.{name}": x for name, x in load_file(path / "bare.safetensors").items()}
    tensors["first_stage_model.loss.logvar"] = torch.zeros(())  # as some fine-tuned VAEs have it
    save_file(tensors, path / "prefixed.safetensors")
    (path / "old folder").mkdir()
    save_file(with_old_attention(load_file(path / "folder" / VAE_FILE)), path / "old folder" / VAE_FILE)
    shutil.copy(path / "folder/config.json", path / "old folder")
    return path


@pytest.mark.parametrize("name, layout", [
    ("bare.safetensors", "small"), ("bare.ckpt", "small"), ("prefixed.safetensors", "small"),
    ("folder", "small"), ("old folder", "small"), (f"folder/{VAE_FILE}", "small"),
    ("bare.ckpt", "small_folder"), (f"folder/{VAE_FILE}", "small_folder"),
])  # fmt: skip
def test_vae_matches_diffusers(name, layout, request, small_model, vaes, recwarn):
    """Whatever the checkpoint's layout; nothing but the VAE changes."""
    model = sd.load(request.getfixturevalue(layout), vae=vaes / name)
    reference = diffusers.AutoencoderKL.from_pretrained(vaes / "folder")
    latents = torch.randn(1, 4, 8, 8, generator=seeded(0))
    with torch.no_grad():
        image = reference.decode(latents).sample
        assert relative_error(model.vae.decode(latents), image) < 1e-5
        assert relative_error(model.vae.encode(image)[0], reference.encode(image).latent_dist.mean) < 1e-5
    plain = weights(small_model)
    for name, weight in weights(model).items():
        assert torch.equal(weight, plain[name]) != name.startswith("vae."), name
    assert model.config == small_model.config and not [str(note.message) for note in recwarn]


def test_latent_scale_of_the_vae(small, vaes, tmp_path):
    config = json.loads((vaes / "folder/config.json").read_text())
    shutil.copy(vaes / "folder" / VAE_FILE, tmp_path)
    assert sd.load(small, vae=tmp_path).config.latent_scale == 0.18215  # where there is no config
    (tmp_path / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    model = sd.load(small, vae=tmp_path)
    assert model.config.latent_scale == 0.5
    latents = torch.randn(1, 4, 4, 4, generator=seeded(0))
    with torch.no_grad():
        expected = model.vae.decode((latents / 0.5).to(memory_format=torch.channels_last))
    assert torch.equal(model.decode(latents), expected)


def test_bad_vaes_are_named(small, vaes, tmp_path):
    path, tensors = tmp_path / "vae.safetensors", load_file(vaes / "bare.safetensors")
    missing = {name: tensor for name, tensor in tensors.items() if name != "quant_conv.bias"}
    for content, message in (
        (missing, r"1 bad tensors: first_stage_model\.quant_conv\.bias is"),
        (tensors | {"quant_conv.bias": torch.ones(7)}, r"1 bad tensors: .*quant_conv\.bias has shape \(7,\)"),
    ):
        save_file(content, path)
        with pytest.raises(ValueError, match=rf"vae\.safetensors: {message}"):
            sd.load(small, vae=path)
    (tmp_path / "empty").mkdir()
    for name, message in {"nothing": ": .*[Nn]o such file", "empty": " is without weights"}.items():
        with pytest.raises(ValueError, match=name + message):
            sd.load(small, vae=tmp_path / name)
    save_file(tensors | {"guide": torch.ones(1)}, path)
    message = r"vae\.safetensors: 1 tensors are not used: first_stage_model\.guide"
    with pytest.warns(UserWarning, match=message):
        sd.load(small, vae=path)
