"""Section 8: images as diffusers' pipelines generate them, and each argument of generate and denoise."""

import copy
import gc
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import diffusers
import make_checkpoint
import numpy as np
import pytest
import torch
from conftest import measured, photograph, pixels, relative_error, seeded
from PIL import Image

import sd

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
RELEASED = {"clip_sample": False, "timestep_spacing": "leading"}  # in SD v1's scheduler_config.json
SCHEDULERS = {
    "ddpm": lambda **more: diffusers.DDPMScheduler(**BETAS, **RELEASED, **more),
    "ddim": lambda **more: diffusers.DDIMScheduler(**BETAS, **RELEASED, set_alpha_to_one=False, **more),
    "dpm++": lambda **more: diffusers.DPMSolverMultistepScheduler(**BETAS, **more),
}
ARGUMENTS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "n": "num_images_per_prompt"}
PROMPT, OTHER_PROMPT, NEGATIVE = "a red apple", "a blue house", "blue, ugly"
SIZE = {"width": 64, "height": 64}
DENOISE = {"steps": 4, "seed": 5, **SIZE}
QUICK = {"progress": False, **DENOISE}


@pytest.fixture(scope="module")
def reference(small, tmp_path_factory):
    return make_checkpoint.reference_pipeline(small, tmp_path_factory.mktemp("configs"), small=True)


def mask_of(size: tuple[int, int], *box: int) -> Image.Image:
    """A mask that is white in `box` (left, top, right, bottom), black without one."""
    mask = Image.new("L", size, 0)
    mask.paste(255, box or (0, 0, 0, 0))
    return mask


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of a pixel, out of 255."""
    assert one.size == other.size and one.mode == other.mode == "RGB"
    return abs(pixels(one) - pixels(other)).max()


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    return abs(pixels(one) - pixels(other)).mean()


def assert_same(ours: list[Image.Image], theirs: list[Image.Image]) -> None:
    """Every pixel is within 1 of 255, in images that are not uniform."""
    assert len(ours) == len(theirs)
    assert measured("images, against diffusers': difference of 255", max(map(difference, ours, theirs))) <= 1
    assert min(pixels(image).std() for image in ours) > 20


# -------------------------------------------------------------------------------------- parity with diffusers


def diffusers_images(
    pipeline, sampler, prompts=(PROMPT,), mask=None, prediction="epsilon", **settings
) -> list[Image.Image]:
    """What diffusers generates from seed 5 with the models of `pipeline` and the settings of our generate."""
    kind = diffusers.StableDiffusionImg2ImgPipeline if "image" in settings else type(pipeline)
    if mask is not None:
        kind, settings["mask_image"] = diffusers.StableDiffusionInpaintPipeline, mask
        settings["width"], settings["height"] = mask.size
    pipeline = kind(**pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = SCHEDULERS[sampler](prediction_type=prediction)
    if "image" not in settings:
        settings.pop("strength", None)
    generators = [seeded(5 + i) for i in range(len(prompts) * settings.get("n", 1))]
    settings = {ARGUMENTS.get(name, name): value for name, value in settings.items()}
    negative = [NEGATIVE] * len(prompts)
    return pipeline(list(prompts), negative_prompt=negative, generator=generators, **settings).images


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("settings", [
    {**SIZE, "steps": 20}, {"width": 72, "height": 56, "steps": 7, "guidance": 3.0},
    {"width": 64, "height": 136, "steps": 2, "guidance": 1.0}, {"width": 72, "height": 64, "steps": 1},
    {"image": photograph(80, 64), "steps": 20, "strength": 0.05},
    {"image": photograph(72, 56), "steps": 12, "strength": 0.5},
    {"image": photograph(64, 64), "steps": 8, "strength": 0.99},
    {"image": photograph(64, 72), "steps": 8, "strength": 1.0},
    {**SIZE, "steps": 5, "prediction": "v_prediction"},
    {"width": 64, "height": 72, "steps": 5, "guidance": 1.0, "prediction": "v_prediction"},
    {"image": photograph(72, 56), "steps": 8, "strength": 0.5, "prediction": "v_prediction"},
])  # fmt: skip
def test_generate_matches_diffusers(small_model, reference, sampler, settings):
    theirs = diffusers_images(reference, sampler, **settings)
    settings, model = dict(settings), copy.copy(small_model)
    model.config = replace(small_model.config, prediction=settings.pop("prediction", "epsilon"))
    assert_same(model.generate(PROMPT, NEGATIVE, sampler=sampler, seed=5, **settings), theirs)


# Without ddpm, for which diffusers' inpainting draws its noise in another order. The mask ends at the borders
# of latents, since diffusers rounds others differently.
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_inpainting_matches_diffusers(small_model, reference, sampler, strength):
    image, mask = photograph(96, 80), mask_of((96, 80), 24, 16, 72, 56)
    settings = {"image": image, "mask": mask, "strength": strength, "steps": 12}
    [theirs] = diffusers_images(reference, sampler, **settings)
    ours = small_model.generate(PROMPT, NEGATIVE, sampler=sampler, seed=5, **settings)
    assert_same(ours, [Image.composite(theirs, image, mask)])


@pytest.mark.parametrize("size", [{"width": 64, "height": 72}, {"image": photograph(64, 72)}])
def test_prompts_times_n_match_diffusers(small_model, reference, size):
    """Two images of each prompt, in the order of the prompts, each from its own seed."""
    prompts, settings = [PROMPT, OTHER_PROMPT], {"n": 2, "steps": 5, **size}
    ours = small_model.generate(prompts, NEGATIVE, seed=5, **settings)
    assert_same(ours, diffusers_images(reference, "ddpm", prompts, **settings))


def test_full_size_matches_diffusers(full, tmp_path):
    tasks = {"width": 128, "height": 192, "steps": 3}, {"image": photograph(192, 128), "steps": 4}
    pipeline = make_checkpoint.reference_pipeline(full, tmp_path)
    theirs = [diffusers_images(pipeline, "dpm++", strength=0.5, **task)[0] for task in tasks]
    del pipeline
    gc.collect()
    model = sd.load(full)
    for task, their in zip(tasks, theirs):
        settings = {"sampler": "dpm++", "seed": 5, "strength": 0.5}
        assert_same(model.generate(PROMPT, NEGATIVE, **settings, **task), [their])


def test_encode_and_decode_match_diffusers(small_model, reference):
    """Latents are scaled as in diffusers' pipelines. No gradients are kept."""
    image = torch.rand(2, 3, 40, 56, generator=seeded(0)) * 2 - 1
    noise = torch.randn(2, 4, 5, 7, generator=seeded(1))
    with torch.no_grad():
        theirs, scale = reference.vae.encode(image).latent_dist, reference.vae.config.scaling_factor
        sample = theirs.mean + theirs.std * noise
        assert relative_error(small_model.encode(image), theirs.mean * scale) < 1e-5
        assert relative_error(small_model.encode(image, noise), sample * scale) < 1e-5
        assert relative_error(small_model.decode(noise), reference.vae.decode(noise / scale).sample) < 1e-5
    results = small_model.encode(image), small_model.decode(noise), small_model.embed([PROMPT])
    assert not any(result.requires_grad for result in results)


# ---------------------------------------------------------------------------------------------------- denoise


@pytest.mark.parametrize("sampler, guidance", [("ddpm", 7.5), ("ddim", 0), ("dpm++", 7.5), ("ddpm", 1)])
def test_denoise_matches_the_formulas(small_model, sampler, guidance):
    """Each step's number, timestep, latents and x0, from the models and the sampler alone."""
    steps = list(small_model.denoise(PROMPT, NEGATIVE, n=2, sampler=sampler, guidance=guidance, **DENOISE))
    process, generators = sd.SAMPLERS[sampler](small_model.config, 4), [seeded(5), seeded(6)]

    def draw() -> torch.Tensor:
        return torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])

    def predict(text: str, latents: torch.Tensor, t: int) -> torch.Tensor:
        context = small_model.text_encoder(torch.tensor([small_model.tokenizer(text)] * 2))
        return small_model.unet(latents, torch.tensor([t, t]), context)

    latents = draw()
    with torch.no_grad():
        for i, (t, step) in enumerate(zip(process.timesteps, steps, strict=True)):
            cond, uncond = predict(PROMPT, latents, t), predict(NEGATIVE, latents, t)
            noise_pred = uncond + guidance * (cond - uncond)
            x0 = process.predict_x0(i, latents, noise_pred)
            latents = process.step(i, latents, noise_pred, draw())
            assert (step.number, step.timestep) == (i + 1, t)
            assert relative_error(step.x0, x0) < 1e-4 and relative_error(step.latents, latents) < 1e-4


@pytest.mark.parametrize("last", [4, 2])
def test_preview_and_cancel(small_model, last):
    """A user's loop, with gradients enabled. ddpm ends without noise, so that its last x0 is the image."""
    gradients, previews = [], []
    hook = small_model.unet.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    for step in small_model.denoise(PROMPT, **DENOISE):
        previews += sd.to_images(small_model.decode(step.x0))
        if step.number == last:
            break
    hook.remove()
    assert gradients == [False] * last and torch.is_grad_enabled() and not step.latents.requires_grad
    [expected] = small_model.generate(PROMPT, **QUICK)
    assert min(mean_difference(preview, expected) for preview in previews[:3]) > 0.1
    assert last < 4 or difference(previews[-1], expected) <= 1


# -------------------------------------------------------------------------------- seeds, batches and guidance


@pytest.mark.parametrize("sampler", sd.SAMPLERS)
def test_seed_gives_the_same_image_alone_and_in_a_batch(small_model, sampler):
    settings = QUICK | {"sampler": sampler}
    batch = small_model.generate([PROMPT, OTHER_PROMPT], **settings | {"n": 2})
    alone = []
    for i, prompt in enumerate([PROMPT, PROMPT, OTHER_PROMPT, OTHER_PROMPT]):
        alone += small_model.generate(prompt, **settings | {"seed": 5 + i})
    assert_same(batch, alone)
    assert [image.info for image in batch] == [image.info for image in alone]
    assert [image.info["seed"] for image in batch] == [5, 6, 7, 8]
    assert min(mean_difference(batch[0], image) for image in batch[1:]) > 10


def test_largest_and_random_seeds(small_model):
    """Without a seed each image is different; its info has the seed that makes it again."""
    last = small_model.generate(PROMPT, **QUICK | {"seed": 2**64 - 2, "n": 2})[1:]
    assert_same(last, small_model.generate(PROMPT, **QUICK | {"seed": 2**64 - 1}))
    one, other = (small_model.generate(PROMPT, **QUICK | {"seed": None})[0] for _ in range(2))
    assert mean_difference(one, other) > 10
    assert difference(small_model.generate(PROMPT, **QUICK | {"seed": one.info["seed"]})[0], one) == 0


@pytest.mark.parametrize("guidance, batch", [(7.5, 4), (1, 2)])
def test_unet_runs_once_per_step(small_model, guidance, batch):
    """On both halves of the guidance at once, and without guidance on one."""
    seen = []
    hook = small_model.unet.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    small_model.generate(PROMPT, NEGATIVE, guidance=guidance, n=2, **QUICK)
    hook.remove()
    assert seen == [batch] * QUICK["steps"]


def test_long_prompts_warn_about_dropped_words(small_model):
    """Once for each text, of which the rest is taken; test_tokenizer.py has which words are dropped."""
    with pytest.warns(UserWarning, match="75 tokens.*dropped: yak zebra$") as record:
        contexts = small_model.embed(["fig " * 75 + "yak Zebra"] * 2)
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(contexts[1:], small_model.embed(["fig " * 75])) < 1e-5
    with pytest.warns(UserWarning, match="dropped: zebra$"):
        next(small_model.denoise(PROMPT, "yak " * 75 + "zebra", **DENOISE))


def test_progress_bar_shows_where_it_is_asked_for(small_model, capfd):
    """Also without a terminal, as in a notebook."""
    small_model.generate(PROMPT, **QUICK)
    list(small_model.denoise(PROMPT, **DENOISE))
    assert capfd.readouterr() == ("", "")
    for settings, bar in (({"progress": True}, "4/4"), ({"image": photograph(), "strength": 0.5}, "2/2")):
        small_model.generate(PROMPT, **DENOISE | settings)
        out, err = capfd.readouterr()
        assert out == "" and "100%" in err and bar in err


# ------------------------------------------------------------------------------------------- images and masks


def redraw(model, image, mask=None, **settings) -> Image.Image:
    [redrawn] = model.generate(PROMPT, image=image, mask=mask, **{"steps": 4, "seed": 5, **settings})
    return redrawn


@pytest.mark.parametrize("sampler", sd.SAMPLERS)
def test_inpainting_changes_only_where_the_mask_is_white(small_model, sampler):
    image, mask = photograph(72, 64), mask_of((72, 64), 13, 21, 50, 43)  # not at the borders of latents
    white = np.asarray(mask) == 255
    changed = abs(pixels(redraw(small_model, image, mask, sampler=sampler)) - pixels(image)).max(axis=2)
    assert (changed[~white] == 0).all()
    assert (changed[white] > 0).mean() > 0.95 and changed[white].mean() > 30


def test_black_white_and_gray_masks(small_model):
    """A gray mask blends pixels, here where it is bright enough for all latents to be redrawn."""
    image = photograph()
    redrawn = redraw(small_model, image)
    assert difference(redraw(small_model, image, mask_of(image.size)), image) == 0
    assert difference(redraw(small_model, image, mask_of(image.size, 0, 0, 64, 64)), redrawn) == 0
    mask = Image.fromarray(np.tile(np.linspace(128, 255, 64).astype(np.uint8), (64, 1)))
    share = pixels(mask)[:, :, None] / 255
    blend = pixels(image) * (1 - share) + pixels(redrawn) * share
    assert abs(pixels(redraw(small_model, image, mask)) - blend).max() <= 1


def test_images_and_masks_are_objects_or_files(small_model, tmp_path, monkeypatch):
    """A mask is black where it is transparent: paint programs save what was painted white as a layer."""
    monkeypatch.setenv("HOME", str(tmp_path))
    image, mask = photograph(), mask_of((64, 64), 8, 8, 40, 40)
    layer = Image.new("RGBA", mask.size, (255, 255, 255, 0))
    layer.putalpha(mask)
    for name, saved in (("image", image), ("mask", mask), ("layer", layer)):
        saved.save(tmp_path / f"{name}.png")
    expected = redraw(small_model, image, mask)
    for source, its_mask in [
        (image, layer), (tmp_path / "image.png", tmp_path / "mask.png"),
        (str(tmp_path / "image.png"), str(tmp_path / "layer.png")), ("~/image.png", "~/mask.png"),
    ]:  # fmt: skip
        assert difference(redraw(small_model, source, its_mask), expected) == 0
    assert difference(image, photograph()) == 0  # the caller's object is not changed


@pytest.mark.parametrize("size, fitted", [((131, 77), (128, 72)), ((64, 71), (64, 64)), ((9, 15), (8, 8))])
def test_size_is_the_images_rounded_down_to_a_multiple_of_8(small_model, size, fitted):
    image = photograph(*size)
    assert redraw(small_model, image, steps=1).size == fitted
    scale = max(new / old for new, old in zip(fitted, size))
    margins = [(old - new / scale) / 2 for new, old in zip(fitted, size)]
    box = (*margins, size[0] - margins[0], size[1] - margins[1])
    kept = redraw(small_model, image, mask_of(size), steps=1)
    assert difference(kept, image.resize(fitted, Image.Resampling.LANCZOS, box)) <= 1


def test_image_of_other_proportions_is_cropped_at_the_center(small_model):
    image = Image.new("RGB", (512, 128), "red")
    image.paste("lime", (192, 0, 320, 128))
    kept = redraw(small_model, image, mask_of(image.size), **SIZE)
    assert kept.size == (64, 64) and (pixels(kept)[:, 4:-4] == (0, 255, 0)).all()
    mask = mask_of(image.size, 192, 0, 256, 128)  # the left half of the crop
    changed = (pixels(redraw(small_model, image, mask, **SIZE)) != pixels(kept)).any(axis=2)
    assert changed[:, :28].mean() > 0.95 and not changed[:, 36:].any()


@pytest.mark.parametrize("settings, message", [
    ({"prompt": []}, r"prompt is \[\]"), ({"prompt": None}, "prompt is None"),
    ({"prompt": ["a", 3]}, "prompt is .'a', 3"), ({"prompt": b"a cat"}, "prompt is b'a cat'"),
    ({"prompt": "a" * 4001}, "prompt is too long"), ({"negative": "a" * 4001}, "too long and must be"),
    ({"negative": None}, "negative is None"), ({"sampler": None}, "sampler is None"),
    ({"sampler": "euler"}, "sampler is euler"), ({"seed": -1}, "seed is -1"), ({"seed": 2**64}, "seed is"),
    ({"seed": 2**64 - 1, "n": 2}, "seed is"), ({"seed": 1.5}, "seed is 1.5"), ({"n": 0}, "n is 0"),
    ({"n": "2"}, "n is '2'"), ({"steps": 0}, "steps is 0"), ({"steps": 1001}, "steps is 1001"),
    ({"steps": "5"}, "steps is '5'"), ({"steps": 2.0}, "steps is 2.0"), ({"steps": None}, "steps is None"),
    ({"guidance": math.nan}, "guidance is nan"), ({"guidance": -math.inf}, "guidance is -inf"),
    ({"guidance": "7"}, "guidance is '7'"), ({"width": 100}, "width is 100"),
    ({"width": "64"}, "width is '64'"), ({"height": -8}, "height is -8"),
    ({"height": 2**20}, "height is 1048576"), ({"image": photograph(7, 64), "width": None}, "width is 0"),
    ({"image": "missing.png"}, "missing.png"), ({"image": 3}, "image is 3 "),
    ({"mask": b"a"}, "mask is b'a'"), ({"mask": mask_of((64, 64))}, "mask is given"),
    ({"image": photograph(), "mask": mask_of((64, 63))}, "mask is .*64.*63.*image.*64.*64"),
    ({"image": photograph(), "strength": 0}, "strength is 0"), ({"strength": "1"}, "strength is '1'"),
    ({"image": photograph(), "strength": 1.01}, "strength is 1.01"),
    ({"image": photograph(), "strength": math.nan}, "strength is nan"),
])  # fmt: skip
def test_arguments_out_of_range(small_model, settings, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        small_model.generate(**{"prompt": PROMPT} | QUICK | settings)
    assert "\n" not in str(caught.value)
    with pytest.raises((ValueError, OSError), match=message):
        next(small_model.denoise(**{"prompt": PROMPT} | DENOISE | settings))


# ----------------------------------------------------------------------------------------- dtypes and devices


def vae_dtypes(model: sd.StableDiffusion) -> list[torch.dtype]:
    """A list that gets the dtype of the weights whenever the encoder or the decoder runs, copies included."""
    dtypes: list[torch.dtype] = []
    for half in (model.vae.encoder, model.vae.decoder):
        half.register_forward_hook(lambda module, *_: dtypes.append(next(module.parameters()).dtype))
    return dtypes


def weights_of(model: sd.StableDiffusion) -> dict[str, tuple]:
    return {name: (x.data_ptr(), x.dtype, x.sum()) for name, x in model.named_parameters()}


def test_default_dtype_changes_nothing(small_model):
    settings = QUICK | {"image": photograph(), "mask": mask_of((64, 64), 8, 8, 56, 56)}
    [expected] = small_model.generate(PROMPT, **settings)
    torch.set_default_dtype(torch.float64)
    try:
        [image] = small_model.generate(PROMPT, **settings | {"seed": np.int64(5)})
    finally:
        torch.set_default_dtype(torch.float32)
    assert difference(image, expected) <= 1


@pytest.mark.parametrize("dtype, allowed", [(torch.float16, 1), (torch.bfloat16, 5)])
def test_half_precision(small, small_model, dtype, allowed):
    model = sd.load(small, dtype=dtype)
    dtypes = vae_dtypes(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for settings in ({"width": 32, "height": 32, "steps": 2}, {"image": photograph(), "strength": 0.5}):
        [half], [single] = (each.generate(PROMPT, **QUICK | settings) for each in (model, small_model))
        assert 0 < mean_difference(half, single) < allowed
    assert dtypes == [dtype] * 3  # nothing overflowed, and nothing ran in float32


@pytest.mark.parametrize("image", [None, photograph()], ids=["decoder", "encoder"])
@pytest.mark.parametrize("offload", [False, True])
def test_vae_falls_back_to_float32(small, image, offload):
    """For the one call that overflows, while its weights stay in float16."""
    expected, model = (sd.load(small, dtype=torch.float16, offload=each) for each in (False, offload))
    for vae in (expected.vae, model.vae):  # over fp16's 65504; the norm that follows scales it back
        vae.encoder.middle[0].conv2.weight.data *= 1e5
        vae.decoder.middle[0].conv2.weight.data *= 1e5
    expected.vae.float()
    before, dtypes = weights_of(model), vae_dtypes(model)
    settings = QUICK | {"image": image, "steps": 1, "width": 32, "height": 32}
    assert_same(*(each.generate(PROMPT, **settings) for each in (model, expected)))
    assert dtypes == [torch.float16, torch.float32] * (1 if image is None else 2)
    assert weights_of(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("image", [None, photograph()])
def test_images_that_are_not_finite_are_refused(small, dtype, image):
    model = sd.load(small, dtype=dtype)
    with torch.no_grad():  # finite weights, infinite results
        model.unet.conv_out.weight *= torch.finfo(dtype).max / 2
        model.unet.conv_out.bias.fill_(torch.finfo(dtype).max)
    with pytest.raises(ValueError, match="not finite.* small"):
        model.generate(PROMPT, **QUICK | {"image": image, "steps": 2, "width": 32, "height": 32})


def test_missing_device_is_named(small):
    with pytest.raises(ValueError, match="device cuda:99 is not available: .*; try"):
        sd.load(small, device="cuda:99")


def test_offload(small, small_model):
    """A part is on the device only while it runs. The device is cpu:0, to which PyTorch copies from cpu."""
    model, seen = sd.load(small, device="cpu:0", offload=True), []
    home = weights_of(model)
    assert model.device == torch.device("cpu:0")

    def on_device(*_) -> set[str]:
        moved = (name for name, weight in model.named_parameters() if weight.data_ptr() != home[name][0])
        return {name.split(".")[0] for name in moved}

    for part in (model.text_encoder, model.vae.encoder, model.unet, model.vae.decoder):
        part.register_forward_pre_hook(lambda *_: seen.append(on_device()))
    settings = {"image": photograph(), "strength": 0.5}
    [image], [expected] = (each.generate(PROMPT, **QUICK | settings) for each in (model, small_model))
    assert difference(image, expected) <= 1 and weights_of(model) == home
    assert seen == [{"text_encoder"}, {"text_encoder"}, {"vae"}, {"unet"}, {"unet"}, {"vae"}]
    for step in model.denoise(PROMPT, **DENOISE):
        assert on_device() == {"unet"} and model.decode(step.x0).isfinite().all()
        break
    assert seen[-1] == {"unet", "vae"} and weights_of(model) == home


def test_threads_draw_what_one_draws(small_model):
    draw = lambda seed: small_model.generate(PROMPT, **QUICK | {"seed": seed})[0]  # noqa: E731
    expected = [draw(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(draw, range(8)), expected):
            assert difference(ours, theirs) == 0


@pytest.mark.long
def test_a_thousand_images_take_no_more_memory_than_a_hundred(small_model):
    """But for less than 20 MB, and no more file descriptors."""
    pages, descriptors = [], []
    for i in range(1000):
        small_model.generate(PROMPT, **QUICK | {"seed": i, "steps": 1})
        pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
        descriptors.append(len(os.listdir("/proc/self/fd")))
    assert (pages[-1] - pages[99]) * os.sysconf("SC_PAGE_SIZE") < 20e6
    assert descriptors[-1] <= descriptors[99]


def test_model_of_another_size(tmp_path):
    """Built from a Config in which everything differs from Stable Diffusion v1, saved, loaded and run, by the
    command line, too."""
    config = sd.Config(
        image_size=64, vocab_size=1000, text_length=20, text_dim=32, text_layers=2, text_heads=4,
        latent_channels=3, latent_scale=0.5, vae_channels=(16, 32, 32), vae_blocks=1, unet_channels=(16, 32),
        unet_attention=(False, True), unet_blocks=1, unet_heads=4, norm_groups=8, timesteps=100,
        beta_start=0.001, beta_end=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model, path = sd.StableDiffusion(config), tmp_path / "own.safetensors"
    sd.save(model, path)
    loaded = sd.load(path)
    assert loaded.config == config and config.downscale == 4
    [ours], [theirs] = (each.generate(PROMPT, steps=5, seed=5) for each in (model, loaded))
    assert ours.size == (64, 64) and difference(ours, theirs) == 0
    assert loaded.generate(PROMPT, steps=100, width=68, height=44)[0].size == (68, 44)
    assert loaded.generate(PROMPT, steps=5, width=4, height=8)[0].size == (4, 8)
    assert loaded.generate(PROMPT, steps=5, image=photograph(67, 44))[0].size == (64, 44)
    words = f"--prompt cat --steps 1 --width 68 --device cpu --weights {path} --out {tmp_path}/out.png"
    sd.generate_files(words.split())
    assert Image.open(tmp_path / "out.png").size == (68, 64)
    for settings, message in (({"width": 66}, "multiple of 4"), ({"steps": 101}, "from 1 to 100")):
        with pytest.raises(ValueError, match=message):
            loaded.generate(PROMPT, **settings)
    with pytest.warns(UserWarning, match="18 tokens"):
        loaded.generate("yak " * 18 + "zebra", steps=1)
