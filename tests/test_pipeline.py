"""generate: the same pictures as diffusers' pipelines draw, and what each of its arguments does."""

import gc
import math
import warnings

import make_checkpoint
import numpy as np
import pytest
import torch
from conftest import measured, relative_error
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

import sd

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RELEASED = {
    "steps_offset": 1,
    "clip_sample": False,
    "timestep_spacing": "leading",
}  # in SD v1's scheduler config
SCHEDULERS = {
    "ddpm": lambda: DDPMScheduler(**BETAS, **RELEASED),
    "ddim": lambda: DDIMScheduler(**BETAS, **RELEASED, set_alpha_to_one=False),
    "dpm++": lambda: DPMSolverMultistepScheduler(**BETAS, steps_offset=1),
}
PROMPT, NEGATIVE = "a red apple", "blue, ugly"
QUICK = {"steps": 4, "width": 64, "height": 64, "seed": 5, "progress": False}


@pytest.fixture(scope="module")
def reference(small, tmp_path_factory):
    return make_checkpoint.reference_pipeline(small, tmp_path_factory.mktemp("configs"), small=True)


def other_pipeline(kind, pipeline):
    """Another of diffusers' pipelines, of the same models."""
    other = kind(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photograph(width: int, height: int) -> Image.Image:
    """Smooth colours, so that scaling and cropping show, and no two regions alike."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest between any two pixels that stand at the same place, out of 255."""
    assert one.size == other.size and one.mode == other.mode == "RGB"
    return abs(pixels(one) - pixels(other)).max()


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    return abs(pixels(one) - pixels(other)).mean()


def assert_same(ours: list[Image.Image], theirs: list[Image.Image]) -> None:
    """Every pixel within 1 of 255, of pictures that show something."""
    assert len(ours) == len(theirs)
    assert (
        measured("pictures, against diffusers': difference of 255", max(map(difference, ours, theirs))) <= 1
    )
    assert min(pixels(picture).std() for picture in ours) > 20


# -------------------------------------------------------------------------------------- parity with diffusers


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize(
    "width, height, steps, guidance",
    [(128, 128, 20, 7.5), (136, 104, 7, 3.0), (64, 200, 2, 1.0), (72, 64, 1, 7.5)],
)
def test_text_to_image(small_model, reference, sampler, width, height, steps, guidance):
    reference.scheduler = SCHEDULERS[sampler]()
    theirs = reference(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=steps, guidance_scale=guidance,
        width=width, height=height, generator=seeded(5),
    ).images  # fmt: skip
    ours = small_model.generate(
        PROMPT, NEGATIVE, steps=steps, guidance=guidance, sampler=sampler, seed=5, width=width, height=height
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize(
    "size, strength", [((160, 128), 0.05), ((136, 104), 0.5), ((64, 64), 0.99), ((72, 128), 1.0)]
)
def test_image_to_image(small_model, reference, sampler, size, strength):
    reference.scheduler = SCHEDULERS[sampler]()
    pipeline, image = other_pipeline(StableDiffusionImg2ImgPipeline, reference), photograph(*size)
    theirs = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        image=image,
        strength=strength,
        num_inference_steps=20,
        generator=seeded(5),
    ).images
    ours = small_model.generate(
        PROMPT, NEGATIVE, image=image, strength=strength, steps=20, sampler=sampler, seed=5
    )
    assert_same(ours, theirs)


# Not ddpm: diffusers' inpainting gives it other noise than ours, its own re-noising's.
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_inpainting(small_model, reference, sampler, strength):
    reference.scheduler = SCHEDULERS[sampler]()
    pipeline, image = other_pipeline(StableDiffusionInpaintPipeline, reference), photograph(160, 128)
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (40, 32, 120, 96))  # whole latent pixels, as diffusers and we round others differently
    [theirs] = pipeline(
        PROMPT, negative_prompt=NEGATIVE, image=image, mask_image=mask, strength=strength, width=160,
        height=128,
        num_inference_steps=20, generator=seeded(5),
    ).images  # fmt: skip
    theirs = Image.composite(theirs, image, mask)
    ours = small_model.generate(
        PROMPT, NEGATIVE, image=image, mask=mask, strength=strength, steps=20, sampler=sampler, seed=5
    )
    assert_same(ours, [theirs])


@pytest.mark.parametrize("image", [None, photograph(64, 72)], ids=["from noise", "from an image"])
def test_prompts_times_n(small_model, reference, image):
    """Two of each prompt, in the order of the prompts, each picture from its own seed."""
    reference.scheduler = SCHEDULERS["ddpm"]()
    prompts = [PROMPT, "a blue house"]
    pipeline = reference if image is None else other_pipeline(StableDiffusionImg2ImgPipeline, reference)
    size = {"width": 64, "height": 72} if image is None else {"image": image}
    theirs = pipeline(
        prompts, negative_prompt=[NEGATIVE] * 2, num_images_per_prompt=2, num_inference_steps=5,
        generator=[seeded(5 + i) for i in range(4)], **size,
    ).images  # fmt: skip
    assert_same(small_model.generate(prompts, NEGATIVE, n=2, steps=5, seed=5, **size), theirs)


def test_full_size(full, tmp_path):
    image, sampler = photograph(192, 256), "dpm++"
    pipeline = make_checkpoint.reference_pipeline(full, tmp_path)
    pipeline.scheduler = SCHEDULERS[sampler]()
    theirs = pipeline(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=3, width=256, height=256, generator=seeded(5)
    ).images
    theirs += other_pipeline(StableDiffusionImg2ImgPipeline, pipeline)(
        PROMPT,
        negative_prompt=NEGATIVE,
        image=image,
        strength=0.5,
        num_inference_steps=4,
        generator=seeded(5),
    ).images
    del pipeline
    gc.collect()
    model = sd.StableDiffusion.load(full)
    ours = model.generate(PROMPT, NEGATIVE, steps=3, sampler=sampler, seed=5, width=256, height=256)
    ours += model.generate(PROMPT, NEGATIVE, image=image, strength=0.5, steps=4, sampler=sampler, seed=5)
    assert_same(ours, theirs)


def test_encode_and_decode_are_scaled(small_model, reference):
    """By the factor that brings latents to unit variance, as in diffusers' pipelines."""
    image = torch.rand(2, 3, 40, 56, generator=seeded(0)) * 2 - 1
    noise = torch.randn(2, 4, 5, 7, generator=seeded(1))
    with torch.no_grad():
        theirs, factor = reference.vae.encode(image).latent_dist, reference.vae.config.scaling_factor
        assert relative_error(small_model.encode(image), theirs.mean * factor) < 1e-5
        assert (
            relative_error(small_model.encode(image, noise), (theirs.mean + theirs.std * noise) * factor)
            < 1e-5
        )
        assert relative_error(small_model.decode(noise), reference.vae.decode(noise / factor).sample) < 1e-5


# ----------------------------------------------------------------------------------- seeds, batches, guidance


@pytest.mark.parametrize("sampler", sd.SAMPLERS)
def test_a_seed_is_a_picture_alone_and_in_a_batch(small_model, sampler):
    arguments = QUICK | {"sampler": sampler}
    batch = small_model.generate([PROMPT, "a blue house"], **arguments | {"n": 3, "seed": 7})
    alone = [
        small_model.generate(prompt, **arguments | {"seed": 7 + i})[0]
        for i, prompt in enumerate([PROMPT] * 3 + ["a blue house"] * 3)
    ]
    assert_same(batch, alone)
    assert min(mean_difference(batch[0], picture) for picture in batch[1:]) > 10


def test_the_largest_seed(small_model):
    assert_same(
        small_model.generate(PROMPT, **QUICK | {"seed": 2**64 - 2, "n": 2})[1:],
        small_model.generate(PROMPT, **QUICK | {"seed": 2**64 - 1}),
    )


def test_without_a_seed_every_picture_is_another(small_model):
    one, other = (small_model.generate(PROMPT, **QUICK | {"seed": None})[0] for _ in range(2))
    assert mean_difference(one, other) > 10


@pytest.mark.parametrize("guidance, batch", [(7.5, 4), (1, 2), (1.0, 2)])
def test_the_denoiser_runs_once_a_step_on_all_that_is_needed(small_model, guidance, batch):
    seen = []
    hook = small_model.unet.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    small_model.generate(PROMPT, NEGATIVE, guidance=guidance, n=2, **QUICK)
    hook.remove()
    assert seen == [batch] * QUICK["steps"]


def test_guidance_leads_from_the_negative_to_the_prompt(small_model):
    """Its formula at 0 and 1, where it is known what it must give; for others diffusers shows it above."""
    prompt_alone, negative_alone = (
        small_model.generate(text, guidance=1, **QUICK)[0] for text in (PROMPT, NEGATIVE)
    )
    [at_0] = small_model.generate(PROMPT, NEGATIVE, guidance=0, **QUICK)
    [near_1] = small_model.generate(
        PROMPT, NEGATIVE, guidance=1 + 1e-9, **QUICK
    )  # not equal to 1: both halves run
    assert difference(at_0, negative_alone) <= 1 and difference(near_1, prompt_alone) <= 1
    assert mean_difference(prompt_alone, negative_alone) > 1


def test_negative_prompt(small_model):
    empty, negative = (small_model.generate(PROMPT, text, **QUICK)[0] for text in ("", NEGATIVE))
    assert mean_difference(empty, negative) > 1
    empty, negative = (small_model.generate(PROMPT, text, guidance=1, **QUICK)[0] for text in ("", NEGATIVE))
    assert difference(empty, negative) == 0


def test_a_long_prompt_warns_of_the_words_that_are_dropped(small_model):
    with pytest.warns(UserWarning, match="75 tokens.*dropped: yak zebra$") as record:
        [long] = small_model.generate("fig " * 75 + "yak Zebra", **QUICK)
    assert len(record) == 1 and record[0].filename == __file__  # says it of the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [cut] = small_model.generate("fig " * 75, **QUICK)
    assert difference(long, cut) == 0
    with pytest.warns(UserWarning, match="dropped: zebra$"):
        small_model.generate(PROMPT, "yak " * 75 + "zebra", **QUICK)


@pytest.mark.parametrize("progress", [True, False])
def test_no_progress_bar_without_a_terminal(small_model, capfd, progress):
    small_model.generate(PROMPT, **QUICK | {"progress": progress})
    assert capfd.readouterr() == ("", "")


def test_the_smallest_picture(small_model):
    assert small_model.generate(PROMPT, **QUICK | {"width": 8, "height": 16})[0].size == (8, 16)


# ------------------------------------------------------------------------------------------- images and masks


def redraw(model, image, mask=None, **arguments) -> Image.Image:
    [picture] = model.generate(PROMPT, image=image, mask=mask, **{"steps": 5, "seed": 5, **arguments})
    return picture


def test_little_strength_keeps_the_image(small_model):
    """As far as the autoencoder can keep it."""
    image = photograph(64, 64)
    noise = torch.randn(1, 4, 8, 8, generator=seeded(5))  # the first that generate draws, for the autoencoder
    with torch.no_grad():
        latent = small_model.encode(sd.to_tensor(image), noise)
        [kept] = sd.to_pictures(small_model.decode(latent))
    weak, strong = (
        mean_difference(redraw(small_model, image, steps=20, guidance=1, strength=strength), kept)
        for strength in (0.05, 1.0)
    )
    assert weak < strong / 3  # not nearer, as what a random denoiser takes for noise is none


@pytest.mark.parametrize("sampler", sd.SAMPLERS)
def test_inpainting_changes_white_only(small_model, sampler):
    image, mask = photograph(72, 64), Image.new("L", (72, 64), 0)
    mask.paste(255, (13, 21, 50, 43))  # not whole latent pixels
    white = np.asarray(mask) == 255
    changed = abs(pixels(redraw(small_model, image, mask, sampler=sampler)) - pixels(image)).max(axis=2)
    assert (changed[~white] == 0).all()
    assert (changed[white] > 0).mean() > 0.95 and changed[white].mean() > 30


def test_masks_at_the_ends(small_model):
    image = photograph(64, 64)
    assert difference(redraw(small_model, image, Image.new("L", image.size, 0)), image) == 0
    white = Image.new("L", image.size, 255)
    assert difference(redraw(small_model, image, white), redraw(small_model, image)) == 0


def test_a_soft_mask_blends(small_model):
    """In pixels, where it is bright enough for all latents to be redrawn."""
    image = photograph(64, 64)
    mask = Image.fromarray(np.tile(np.linspace(128, 255, 64).astype(np.uint8), (64, 1)))
    share = pixels(mask)[:, :, None] / 255
    expected = pixels(image) * (1 - share) + pixels(redraw(small_model, image)) * share
    assert abs(pixels(redraw(small_model, image, mask)) - expected).max() <= 1


def test_a_mask_is_black_where_it_is_transparent(small_model, tmp_path):
    """As paint programs save what was painted white on a layer of its own."""
    image, mask = photograph(64, 64), Image.new("L", (64, 64), 0)
    mask.paste(255, (8, 8, 40, 40))
    layer = Image.new("RGBA", mask.size, (255, 255, 255, 0))
    layer.putalpha(mask)
    layer.save(tmp_path / "layer.png")
    expected = redraw(small_model, image, mask)
    for source in (layer, tmp_path / "layer.png"):
        assert difference(redraw(small_model, image, source), expected) == 0


def test_the_mask_must_fit_the_image(small_model):
    with pytest.raises(ValueError, match="mask is .*64.*63.*image.*64.*64"):
        redraw(small_model, photograph(64, 64), Image.new("L", (64, 63)))


@pytest.mark.parametrize("size, fitted", [((131, 77), (128, 72)), ((64, 71), (64, 64)), ((9, 15), (8, 8))])
def test_a_picture_is_of_its_image_size_down_to_a_multiple_of_8(small_model, size, fitted):
    image = photograph(*size)
    assert redraw(small_model, image).size == fitted
    scale = max(new / old for new, old in zip(fitted, size))
    margins = [(old - new / scale) / 2 for new, old in zip(fitted, size)]
    box = (*margins, size[0] - margins[0], size[1] - margins[1])
    kept = redraw(small_model, image, Image.new("L", size, 0))
    assert difference(kept, image.resize(fitted, Image.Resampling.LANCZOS, box)) <= 1


def test_an_image_of_other_proportions_is_cropped_alike_on_both_sides(small_model):
    image = Image.new("RGB", (512, 128), "red")
    image.paste("lime", (192, 0, 320, 128))
    size = {"width": 64, "height": 64}
    kept = redraw(small_model, image, Image.new("L", image.size, 0), **size)
    assert kept.size == (64, 64) and (pixels(kept)[:, 4:-4] == (0, 255, 0)).all()
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (192, 0, 256, 128))  # the left half of what is left
    changed = (pixels(redraw(small_model, image, mask, **size)) != pixels(kept)).any(axis=2)
    assert changed[:, :28].mean() > 0.95 and not changed[:, 36:].any()


def test_images_are_pictures_or_paths(small_model, tmp_path):
    image, mask = photograph(64, 64), Image.new("L", (64, 64), 0)
    mask.paste(255, (8, 8, 40, 40))
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    expected = redraw(small_model, image, mask)
    assert difference(redraw(small_model, tmp_path / "image.png", tmp_path / "mask.png"), expected) == 0
    assert (
        difference(redraw(small_model, str(tmp_path / "image.png"), str(tmp_path / "mask.png")), expected)
        == 0
    )
    assert difference(image, photograph(64, 64)) == 0  # the caller's own is left alone


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps is 0"), ({"steps": 1001}, "steps is 1001"), ({"n": 0}, "n is 0"),
        ({"n": -1}, "n is -1"),
        ({"guidance": math.nan}, "guidance is nan"), ({"guidance": -math.inf}, "guidance is -inf"),
        ({"sampler": "euler"}, "sampler is euler"), ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": 2**64 - 1, "n": 2}, "seed is"), ({"width": 100}, "width is 100"),
        ({"height": -8}, "height is -8"),
        ({"width": 0}, "width is 0"), ({"mask": Image.new("L", (64, 64))}, "mask is given"),
        ({"image": photograph(64, 64), "strength": 0}, "strength is 0"),
        ({"image": photograph(64, 64), "strength": 1.01}, "strength is 1.01"),
        ({"image": photograph(64, 64), "strength": math.nan}, "strength is nan"),
        ({"image": photograph(7, 64), "width": None}, "width is 0"),
        ({"image": "missing.png"}, "missing.png"),
    ],
)  # fmt: skip
def test_arguments_out_of_range(small_model, arguments, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        small_model.generate(PROMPT, **QUICK | arguments)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------- numbers and devices


def test_pytorchs_defaults_change_nothing(small_model):
    [expected] = small_model.generate(PROMPT, **QUICK)
    torch.set_default_dtype(torch.float64)
    try:
        [picture] = small_model.generate(PROMPT, **QUICK | {"seed": np.int64(5)})
    finally:
        torch.set_default_dtype(torch.float32)
    assert difference(picture, expected) <= 1


@pytest.mark.parametrize("dtype, allowed", [(torch.float16, 1), (torch.bfloat16, 5)])
def test_half_precision(small, small_model, dtype, allowed):
    model = sd.StableDiffusion.load(small, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    image = photograph(64, 64)
    for arguments in ({"width": 32, "height": 32, "steps": 2}, {"image": image, "strength": 0.5}):
        [half], [single] = (each.generate(PROMPT, **QUICK | arguments) for each in (model, small_model))
        assert 0 < mean_difference(half, single) < allowed
    assert model.vae.decoder.conv_in.weight.dtype == dtype  # nothing overflowed: float32 was not needed


def overflowing(model: sd.StableDiffusion) -> sd.StableDiffusion:
    """Signals in the autoencoder pass fp16's 65504 on the way; the norm behind brings them back."""
    with torch.no_grad():
        for half in (model.vae.encoder, model.vae.decoder):
            half.middle[0].conv2.weight *= 1e5
    return model


@pytest.mark.parametrize("image", [None, photograph(64, 64)], ids=["decoder", "encoder"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_autoencoder_falls_back_to_float32(small, image, offload):
    expected = overflowing(sd.StableDiffusion.load(small, dtype=torch.float16))
    expected.vae.float()
    model = overflowing(sd.StableDiffusion.load(small, dtype=torch.float16, offload=offload))
    with torch.no_grad():
        assert not model.vae.decode(torch.randn(1, 4, 8, 8, generator=seeded(0)).half()).isfinite().all()
    arguments = QUICK | {"image": image, "steps": 1, "width": 32, "height": 32}
    ours, theirs = (each.generate(PROMPT, **arguments) for each in (model, expected))
    assert_same(ours, theirs)
    assert model.unet.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("image", [None, photograph(64, 64)])
def test_what_is_not_finite_is_never_a_picture(small, dtype, image):
    model = sd.StableDiffusion.load(small, dtype=dtype)
    with torch.no_grad():
        model.unet.conv_out.weight *= torch.finfo(dtype).max / 2
        model.unet.conv_out.bias.fill_(torch.finfo(dtype).max)  # finite weights, but what they make is not
    with pytest.raises(ValueError, match="not finite"):
        model.generate(PROMPT, **QUICK | {"image": image, "steps": 2, "width": 32, "height": 32})


def test_offload_draws_the_same_and_keeps_the_weights(small, small_model):
    model = sd.StableDiffusion.load(small, offload=True)
    before = {name: (parameter.data_ptr(), parameter.sum()) for name, parameter in model.named_parameters()}
    arguments = {"image": photograph(64, 64), **QUICK}
    assert difference(*(each.generate(PROMPT, **arguments)[0] for each in (model, small_model))) == 0
    assert before == {
        name: (parameter.data_ptr(), parameter.sum()) for name, parameter in model.named_parameters()
    }


def test_each_model_is_on_the_device_only_while_it_works(small):
    """The device is stood in for by a dtype, which weights can be sent to as well."""
    model = sd.StableDiffusion.load(small, offload=True)
    assert model.offload_device == model.device == torch.device("cpu")
    model.offload_device = torch.float64
    away = lambda: {name for name, weight in model.named_parameters() if weight.dtype == torch.float64}
    for name in ("text_encoder", "vae", "unet"):
        part = getattr(model, name)
        with model.working(part):
            assert away() == {f"{name}.{inner}" for inner, _ in part.named_parameters()}
        assert away() == set()


def test_a_model_of_another_size(tmp_path):
    """Built from a Config, saved, loaded and drawn with: every size another than Stable Diffusion v1's."""
    config = sd.Config(
        image_size=64, vocab_size=1000, text_length=20, text_width=32, text_layers=2, text_heads=4,
        latent_channels=3,
        latent_scale=0.5, vae_widths=(16, 32, 32), vae_blocks=1, unet_widths=(16, 32), unet_attends=(False,
        True),
        unet_blocks=1, unet_heads=4, norm_groups=8, timesteps=100, beta_start=0.001, beta_end=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = sd.StableDiffusion(config)
    model.save(tmp_path / "own.safetensors")
    loaded = sd.StableDiffusion.load(tmp_path / "own.safetensors")
    assert loaded.config == config and config.downscale == 4
    [ours], [theirs] = (each.generate(PROMPT, steps=5, seed=5) for each in (model, loaded))
    assert ours.size == (64, 64) and difference(ours, theirs) == 0
    assert loaded.generate(PROMPT, steps=100, width=68, height=44)[0].size == (68, 44)
    assert loaded.generate(PROMPT, steps=5, image=photograph(67, 44))[0].size == (64, 44)
    for arguments, message in (({"width": 66}, "multiple of 4"), ({"steps": 101}, "from 1 to 100")):
        with pytest.raises(ValueError, match=message):
            loaded.generate(PROMPT, **arguments)
    with pytest.warns(UserWarning, match="18 tokens"):
        loaded.generate("yak " * 18 + "zebra", steps=1)
