"""Training: data sets, both objectives, the optimizer, saving and resuming."""

import copy
import io
import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
import torch
from conftest import ROOT, limit, photograph, pixels, read_until, seeded
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from emoji_quality import held_out_pairs
from PIL import Image, ImageFont
from torch import nn

import sd
from weights import emoji, objectives, train

TRAIN = ROOT / "weights" / "train.py"
TINY = {
    "image_size": 16, "vocab_size": 600, "text_length": 16, "text_dim": 16, "text_layers": 1,
    "text_heads": 2, "vae_channels": [8, 8], "vae_blocks": 1, "unet_channels": [8, 16],
    "unet_attention": [True, True], "unet_blocks": 1, "unet_heads": 2, "norm_groups": 4,
}  # fmt: skip
CAPTIONS = {
    "red.png": ["a red thing", "something red", "red"], "green.png": ["a green thing"],
    "blue.png": ["a blue thing"], "gray.png": ["a gray thing"],
}  # fmt: skip
HELD_OUT = {"orange.png": ["an orange thing", "orange"], "pink.png": ["a pink thing"], "lime.png": ["lime"]}
PROMPTS = ["a red thing", "a blue thing", "a thing"]
OPTIONS = {"steps": 40, "save_every": 10, "sample_every": 20, "lr": 0.02, "warmup": 5, "ema": 0.8,
           "batch_size": 8, "flip": True}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums are the same to the bit only where they are split in the same way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield
    torch.set_num_threads(threads)


def write_files(folder: Path, files: dict[str, str | bytes], encoding: str = "utf-8") -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode(encoding) if isinstance(content, str) else content)


def write_jsonl(folder: Path, captions: dict[str, list[str]]) -> None:
    entries = [{"file_name": name, "text": text} for name, texts in captions.items() for text in texts]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_data(folder: Path, captions: dict[str, list[str]], seed: int = 0) -> Path:
    """A data set of images of different shapes, so smooth that a tiny model learns them."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(captions):
        photograph(16 + 5 * i, 24, seed + i, rows=3).save(folder / name)
    write_jsonl(folder, captions)
    return folder


def tiny(**fields) -> str:
    """The tiny Config with other fields, for --config."""
    return json.dumps(TINY | fields)


def tiny_model(seed: int = 0) -> sd.StableDiffusion:
    """Random weights, none of them zero."""
    torch.manual_seed(seed)
    model = sd.StableDiffusion(sd.Config(**TINY))
    nn.init.normal_(model.text_encoder.token_embedding)
    nn.init.normal_(model.text_encoder.position_embedding)
    return model


def settings(data: Path, **options) -> train.Settings:
    return train.Settings(data=data, out=data.parent / "unused.safetensors", **options)


def reconstruction(data: Path, **options) -> train.Reconstruction:
    return train.Reconstruction(tiny_model(), settings(data, **options), train.find_images(data))


def noise_prediction(data: Path, model: sd.StableDiffusion | None = None, **options) -> train.NoisePrediction:
    return train.NoisePrediction(model or tiny_model(), settings(data, **options), train.read_captions(data))


def draw(objective, count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = seeded(seed)
    indices = torch.randint(len(objective.examples), (count,), generator=generator)
    return objective.draw(indices, generator)


def table(out: Path) -> tuple[list[float], dict[int, float]]:
    """The losses and, by step, the validation losses that a training wrote."""
    head, *rows = (line.split(",") for line in out.with_suffix(".loss.csv").read_text().splitlines())
    assert head == ["step", "loss", "validation"]
    assert [int(step) for step, _, _ in rows] == list(range(1, len(rows) + 1))
    return [float(row[1]) for row in rows], {int(row[0]): float(row[2]) for row in rows if row[2]}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def files_of(out: Path) -> dict[str, bytes]:
    """What a training wrote, by suffix, but for the state."""
    files = {name.removeprefix(out.stem): data for name, data in everything(out.parent).items()}
    assert ".state" in files
    return {suffix: data for suffix, data in files.items() if suffix != ".state"}


def command_line(data: object, options: dict[str, object]) -> list[str]:
    words = [] if data is None else [str(data)]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is not None and value is not False:
            words += [flag] if value is True else [flag, str(value)]
    return words


def run_here(data, *words, status: int | None = None, **options) -> subprocess.CompletedProcess:
    """`python weights/train.py DATA ...` in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    command = [str(TRAIN), *command_line(data, {"device": "cpu"} | options), *map(str, words)]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", command)
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as exit:
            runpy.run_path(str(TRAIN), run_name="__main__")
    assert status is None or exit.value.code == status, stderr.getvalue()
    return subprocess.CompletedProcess(command, exit.value.code, stdout.getvalue(), stderr.getvalue())


def start(data, launcher: tuple = (), stderr: int = subprocess.PIPE, **options) -> subprocess.Popen:
    """`python weights/train.py DATA ...` in a process of its own, or with torchrun as a launcher."""
    command = [sys.executable, *map(str, launcher), str(TRAIN), *command_line(data, options)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": stderr}
    return subprocess.Popen(command, text=True, **pipes)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def signal_after_save(process: subprocess.Popen, step: int, number: int) -> tuple[int, str]:
    """Sends a signal after the save of `step`; returns the exit status and what is written after that."""
    with process:
        for line in process.stderr:
            if line.startswith(f"train.py: step {step} of "):
                process.send_signal(number)
                rest = process.stderr.read()
                return process.wait(), rest
        raise AssertionError(f"step {step} was not saved")


def error_of(result: subprocess.CompletedProcess) -> str | None:
    """The message of a run that ends as it should after a user's mistake: exit status 2 and one line."""
    one_line = re.fullmatch(r"train\.py: error: ([^\n]+)\n", result.stderr)
    return one_line[1] if one_line and result.returncode == 2 and result.stdout == "" else None


def check_progress(result: subprocess.CompletedProcess, steps: list[int]) -> None:
    """One line for each save, with step, loss, learning rate, validation loss and speed, and nothing else."""
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    line = "train.py: step N of N: loss N, lr N, validation N, N images/s\n"
    assert re.sub(r"\d[\d.e+-]*", "N", result.stderr) == len(steps) * line, result.stderr
    found = re.findall(r"step (\d+) of (\d+):", result.stderr)
    assert found == [(str(step), str(steps[-1])) for step in steps]


# ---------------------------------------------------------------------------------- trainings that are shared


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", CAPTIONS)


@pytest.fixture(scope="module")
def held_out(data) -> Path:
    return write_data(data.parent / "held out", HELD_OUT, seed=10)


@pytest.fixture(scope="module")
def vae_options(data, held_out) -> dict:
    """Starts from a file in fp16, which is converted when it is loaded."""
    init = data.parent / "half.safetensors"
    sd.save(train.new_model(sd.Config(**TINY), 0).half(), init)
    return {"data": data, "part": "vae", "init": init, "validate": held_out, **OPTIONS}


@pytest.fixture(scope="module")
def vae(vae_options, tmp_path_factory) -> Path:
    """A model with a trained VAE."""
    out = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    check_progress(run_here(**vae_options, out=out), [10, 20, 30, 40])
    return out


@pytest.fixture(scope="module")
def unet_options(data, held_out, vae) -> dict:
    init, prompts = data.parent / "half vae.safetensors", data.parent / "prompts.txt"
    sd.save(sd.load(vae, dtype=torch.float16), init)
    lines = "".join(prompt + "\n\n" for prompt in PROMPTS)  # empty lines are no prompts
    prompts.write_text(lines, encoding="utf-8-sig")
    return {"data": data, "init": init, "validate": held_out, **OPTIONS, "prompts": prompts}


@pytest.fixture(scope="module")
def unet(unet_options, tmp_path_factory) -> Path:
    """The same model with a trained UNet."""
    out = tmp_path_factory.mktemp("unet") / "unet.safetensors"
    check_progress(run_here(**unet_options, out=out), [10, 20, 30, 40])
    return out


# ------------------------------------------------------------------------------------------------------- data


def coco(images: list[dict], captions: list[tuple[int, str]] = ()) -> str:
    annotations = [{"image_id": id, "caption": caption} for id, caption in captions]
    return json.dumps({"images": images, "annotations": annotations})


IMAGES = [{"id": 7, "file_name": "1.jpg"}, {"id": 8, "file_name": "2.JPEG"}, {"id": 9, "file_name": "3.png"}]
LINES = """{"file_name": "a.png", "text": "one"}\r
{"file_name": "a.png", "text": "two"}
{"file_name": "more/b.JPG", "text": "drei ü"}

\x20\x20
{"file_name": "a.png", "text": "three\u2028\x85"}"""
LAYOUTS = {  # files, and their captions
    "lines": (
        {"metadata.jsonl": LINES}, {"a.png": ["one", "two", "three\u2028\x85"], "more/b.JPG": ["drei ü"]},
    ),
    "COCO": (
        {"images/val/1.jpg": "", "images/val/2.JPEG": "", "images/val/not captioned.png": "",
         "notes/captions_train.json": coco(IMAGES, [(7, "one"), (9, "two"), (7, "three")]),
         "notes/captions_val.json": coco(IMAGES, [(8, "four")]), "notes/instances_val.json": "{}"},
        {"images/val/1.jpg": ["one", "three"], "images/val/2.JPEG": ["four"], "3.png": ["two"]},
    ),
    "texts": (
        {"a.png": "", "a.txt": "one\r\n", "in/b.WebP": "", "in/b.txt": " zwei ü ", "in/deep/c.bmp": "",
         "in/deep/c.txt": "three", "no text.png": "", "in/no image.gif": "", "in/no image.txt": "4"},
        {"a.png": ["one"], "in/b.WebP": ["zwei ü"], "in/deep/c.bmp": ["three"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("files, captions", LAYOUTS.values(), ids=LAYOUTS)
def test_captions_in_three_layouts(files, captions, encoding, tmp_path):
    write_files(tmp_path, files, encoding)
    assert train.read_captions(tmp_path) == {tmp_path / name: texts for name, texts in captions.items()}


def test_linked_folders_and_equal_names(tmp_path):
    data = tmp_path / "data [1]"  # no pattern
    write_files(tmp_path / "disk", {"1.png": "", "1.txt": "disk"})
    write_files(data, {"blue/1.png": "", "blue/1.txt": "blue", "no text.png": ""})
    (data / "linked").symlink_to(tmp_path / "disk")
    assert train.read_captions(data) == {data / "blue/1.png": ["blue"], data / "linked/1.png": ["disk"]}
    assert train.find_images(data) == [data / name for name in ("blue/1.png", "linked/1.png", "no text.png")]


def test_shorter_side_is_resized(tmp_path):
    file, shapes = tmp_path / "a.png", {(32, 48): (16, 24), (50, 33): (24, 16), (7, 9): (16, 21)}
    for size, resized in shapes.items():
        photograph(*size).save(file)
        [(path, tensor)] = objectives.read_pixels([file], 16)
        expected = photograph(*size).resize(resized, Image.Resampling.LANCZOS)
        assert path == file and tensor.dtype == torch.uint8
        assert (tensor.permute(1, 2, 0).numpy() == pixels(expected)).all()


def test_unreadable_images_are_left_out_and_named(data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "data")
    names = ["not there.png", "text.png", "truncated.png", "nor there.png"]
    (broken / "text.png").write_text("no image")
    (broken / "truncated.png").write_bytes((broken / "red.png").read_bytes()[:200])
    write_jsonl(broken, {name: ["a name"] for name in names} | CAPTIONS)
    result = run_here(broken, config=tiny(), steps=1, out=tmp_path / "a.safetensors", status=0)
    note, progress = result.stderr.splitlines()
    assert note.startswith("train.py: note: 4 of 8 images left out: ") and all(name in note for name in names)
    assert progress.startswith("train.py: step 1 of 1: ")

    good, bad = [data / name for name in CAPTIONS], [data / f"{i}.png" for i in range(5)]
    with pytest.warns(UserWarning, match="4 of 8 images left out"):
        assert [path for path, _ in objectives.read_pixels(bad[:2] + good + bad[2:4], 16)] == good
    with pytest.raises(ValueError, match="5 of 9 images cannot be used"):
        list(objectives.read_pixels(good + bad, 16))


def coded(height: int, width: int) -> torch.Tensor:
    """An image (3, H, W) whose pixels hold their own row and column."""
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([down, right, torch.full_like(down, 7)]).to(torch.uint8)


@pytest.mark.parametrize("flip", [False, True])
def test_vae_trains_on_random_crops(data, flip):
    objective = reconstruction(data, flip=flip)
    assert sorted(min(image.shape[1:]) for image in objective.examples) == [16, 16, 16, 16]
    objective.examples = [coded(40, 50)]  # longer than the crop both ways
    images, noise = draw(objective, 2000)
    assert images.shape == (2000, 3, 16, 16) and noise.shape == (2000, 4, 8, 8)
    crops = ((images + 1) * 127.5).round().to(torch.uint8)
    assert (crops / 127.5 - 1).equal(images)
    flipped = crops[:, 1, 0, 0] > crops[:, 1, 0, 15]
    assert abs(flipped.float().mean() - flip / 2) <= 0.05 * flip
    crops[flipped] = crops[flipped].flip(-1)
    corners = crops[:, :2, 0, 0].long()  # (B, 2)
    for image, (top, left) in zip(crops, corners.tolist()):
        assert image.equal(coded(40, 50)[:, top : top + 16, left : left + 16])
    for axis, last in ((0, 24), (1, 34)):
        assert set(corners[:, axis].tolist()) == set(range(last + 1))
        assert abs(corners[:, axis].float().mean() - last / 2) < 1
    assert abs(torch.corrcoef(corners.float().T)[0, 1]) < 0.1
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(torch.corrcoef(noise.flatten(1)[:, :20].T).fill_diagonal_(0)).max() < 0.12


@pytest.mark.parametrize("flip", [False, True])
def test_unet_trains_on_the_middle_of_images(tmp_path, flip):
    model, images = tiny_model(), {"wide": (16, 40), "tall": (36, 16)}
    for name, shape in images.items():
        Image.fromarray(coded(*shape).permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    write_jsonl(tmp_path, {f"{name}.png": [name, f"{name} thing"] for name in images})
    expected = []
    for name, image in {"wide": coded(16, 40)[:, :, 12:28], "tall": coded(36, 16)[:, 10:26]}.items():
        for version in [image, image.flip(-1)] if flip else [image]:
            with torch.no_grad():
                moments = torch.cat(model.vae.encode(version[None] / 127.5 - 1), dim=1)[0]
            expected.append((moments, [model.tokenizer(text) for text in (name, f"{name} thing")]))
    objective = noise_prediction(tmp_path, model, flip=flip)
    for (moments, ids), (wanted, wanted_ids) in zip(objective.examples, expected, strict=True):
        torch.testing.assert_close(moments, wanted, rtol=1e-5, atol=1e-5)
        assert ids.tolist() == wanted_ids


# ------------------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("gamma", [math.inf, 5, 1, 0.05])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_unet_loss_matches_diffusers(data, prediction, gamma):
    """In float64. The target is its noise or velocity, the weights are those of its training scripts."""
    model, is_v = tiny_model(), prediction == "v_prediction"
    model.config = replace(model.config, prediction=prediction)
    objective = noise_prediction(data, model, min_snr=gamma).double()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")  # SD v1's
    alphas_cumprod, roots = objective.alphas_cumprod, np.linspace(0.00085**0.5, 0.012**0.5, 1000)
    assert alphas_cumprod.numpy() == pytest.approx(np.cumprod(1 - roots**2), rel=1e-7)
    assert alphas_cumprod.numpy() == pytest.approx(scheduler.alphas_cumprod.double().numpy(), rel=1e-5)
    scheduler.alphas_cumprod = alphas_cumprod  # diffusers has its schedule in float32 only

    latents, noise, t, ids = draw(objective, 8, seed=3)
    t[:2] = torch.tensor([0, 999])
    latents, noise = latents.double(), noise.double()
    predicted = model.unet(scheduler.add_noise(latents, noise, t), t, model.text_encoder(ids))
    target = scheduler.get_velocity(latents, noise, t) if is_v else noise
    snr = compute_snr(scheduler, t)
    weights = snr.clamp(max=gamma) / (snr + is_v) if gamma < math.inf else torch.ones(8)
    losses = weights * ((predicted.float() - target) ** 2).mean(dim=(1, 2, 3))
    assert predicted.std() > 0.1 and snr.min() < 0.05 and snr.max() > 50  # on both sides of each gamma
    assert abs(objective(latents, noise, t, ids) - losses.mean()) < 1e-7
    for i, loss in enumerate(losses.tolist()):
        one = [tensor[i : i + 1] for tensor in (latents, noise, t, ids)]
        assert objective(*one).item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("share", [0, 0.1, 0.4])
def test_captions_are_drawn_evenly_and_dropped_as_often_as_asked(data, share):
    objective = noise_prediction(data, drop_text=share)
    *_, ids = draw(objective, 4000, seed=1)
    assert ids.shape == (4000, 16)

    def share_of(text: str) -> float:
        return (ids == torch.tensor(objective.model.tokenizer(text))).all(dim=1).float().mean().item()

    shares = {"": share}
    shares |= {text: (1 - share) / 4 / len(texts) for texts in CAPTIONS.values() for text in texts}
    for text, expected in shares.items():
        assert abs(share_of(text) - expected) <= 5 * (expected * (1 - expected) / 4000) ** 0.5, text
    assert sum(map(share_of, shares)) == pytest.approx(1)


def test_timesteps_are_uniform(data):
    t = draw(noise_prediction(data), 20_000, seed=4)[2]
    counts = torch.bincount(t, minlength=1000).double()
    assert len(counts) == 1000 and t.dtype == torch.int64
    assert abs(counts.view(10, 100).sum(1) - 2000).max() < 200
    assert 800 < ((counts - 20) ** 2 / 20).sum() < 1200  # chi-squared with 999 degrees of freedom
    assert abs(counts[0] - 20) < 20 and abs(counts[999] - 20) < 20


def test_latents_are_scaled_samples_from_the_moments_of_the_captioned_image(data):
    objective = noise_prediction(data, drop_text=0.0)
    assert objective.model.config.latent_scale == 0.18215
    latents, noise, _, ids = draw(objective, 12_000, seed=5)
    assert latents.shape == noise.shape == (12_000, 4, 8, 8)
    for moments, captions in objective.examples:
        mean, logvar = moments.chunk(2)
        mine = latents[(ids[:, None] == captions).all(-1).any(-1)] / 0.18215
        assert abs(len(mine) - 3000) < 250
        error = logvar.exp().sqrt() / len(mine) ** 0.5
        assert (abs(mine.mean(0) - mean) / error).max() < 6
        assert (mine.var(0) / logvar.exp() - 1).abs().max() < 0.2
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), latents.flatten()]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(noise.flatten(1)[:, :20].T).fill_diagonal_(0)).max() < 0.06


def test_vae_loss_is_its_formula(data):
    objective = reconstruction(data)
    with torch.no_grad():
        objective.model.vae.quant.weight *= 8  # moments far from a standard normal's
    images, noise = draw(objective, 4, seed=6)
    with torch.no_grad():
        mean, logvar = objective.model.vae.encode(images)
        mean, deviation = mean.double(), (logvar.double() / 2).exp()
        result = objective.model.vae.decode((mean + deviation * noise).float())
        posterior, prior = torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
        kl = 1e-3 * torch.distributions.kl_divergence(posterior, prior).mean().item()
        error = (result.double() - images).numpy()
        down, right = error[:, :, 1:] - error[:, :, :-1], error[..., 1:] - error[..., :-1]
        expected = abs(error).mean() + 0.5 * (abs(down).mean() + abs(right).mean()) + kl
        assert objective(images, noise).item() == pytest.approx(expected, rel=1e-6)
    assert kl > 1e-3 and abs(abs(down).mean() - abs(right).mean()) > 1e-3


@pytest.mark.parametrize("trained", [False, True])
def test_latent_scale_brings_latents_to_unit_variance(trained, vae, data):
    """Measured on samples, of which noise is a large part in an untrained VAE; the same at each save."""
    model = sd.load(vae) if trained else tiny_model()
    objective = train.Reconstruction(model, settings(data, flip=True), train.find_images(data))
    if not trained:
        objective.finish()
    scale = model.config.latent_scale
    with torch.no_grad():
        images, noise = draw(objective, 500, seed=9)
        sampled, mean = model.encode(images, noise), model.encode(images)
    assert sampled.std().item() == pytest.approx(1, abs=0.05) and abs(scale - 0.18215) > 0.05
    assert trained or mean.std() < 0.7
    objective.finish()
    assert model.config.latent_scale == scale


# ----------------------------------------------------------------------------------------------- optimization


def test_new_model_starts_with_zero_branches_in_the_unet():
    """All other matrices are random and follow from the seed."""
    first, again, other = (train.new_model(sd.Config(**TINY), seed) for seed in (1, 1, 2))
    parameters = zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True)
    for (name, weight), same, another in parameters:
        assert weight.equal(same), name
        last = name.startswith("unet.") and name.split(".")[-2] in ("conv2", "proj_out", "conv_out")
        if weight.ndim > 1:
            assert (weight.abs().max() == 0) == last and weight.equal(another) == last, name
    context = first.text_encoder(torch.tensor([first.tokenizer("a red thing")]))
    assert first.unet(torch.randn(1, 4, 8, 8), torch.tensor([500]), context).abs().max() == 0


@pytest.mark.parametrize("part, ema", [("vae", 0.45), ("unet", 0.45), ("unet", 0)])
def test_training_follows_the_formulas(part, ema, data, tmp_path):
    """Nine steps of three batches, against AdamW (Loshchilov and Hutter 2017, alg. 2) written out."""
    lr, warmup, weight_decay, clip, out = 0.02, 4, 0.7, 0.05, tmp_path / "a.safetensors"
    options = {"lr": lr, "warmup": warmup, "weight_decay": weight_decay, "clip": clip, "ema": ema, "steps": 9}
    options |= {"min_snr": 5.0, "train_text_encoder": True} if part == "unet" else {}
    options |= {"part": part, "config": tiny(), "accumulate": 3, "batch_size": 2, "seed": 5, "device": "cpu"}
    trainer = train.prepare(train.parse(command_line(data, options | {"out": out})))
    objective, draw_batch = copy.deepcopy(trainer.objective), trainer.objective.draw
    drawn, batches, model = [], [], objective.model

    def draw_and_keep(indices, generator):
        drawn.append(indices)
        batches.append(draw_batch(indices, generator))
        return batches[-1]

    trainer.objective.draw = draw_and_keep
    assert train.run(trainer) == 0
    drawn, batches = drawn[:27], batches[:27]  # those of training
    trained = ("unet.", "text_encoder.") if part == "unet" else ("vae.",)
    assert all(weight.requires_grad == name.startswith(trained) for name, weight in model.named_parameters())
    assert len({batch[1].numpy().tobytes() for batch in batches}) == 27  # no two alike
    assert torch.cat(drawn).unique().tolist() == [0, 1, 2, 3]
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    decaying = {layer.weight for layer in layers}
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    start, average = ({name: weight.detach().clone() for name, weight in named.items()} for _ in range(2))
    first, second = ({name: torch.zeros_like(weight) for name, weight in named.items()} for _ in range(2))
    losses = []
    for step in range(9):
        loss = sum(objective(*batch) for batch in batches[3 * step : 3 * step + 3]) / 3
        gradients = dict(zip(named, torch.autograd.grad(loss, named.values())))
        losses.append(loss.item())
        norm = sum((gradient**2).sum() for gradient in gradients.values()).sqrt()
        assert norm > 2 * clip
        rate = lr * ((step + 1) / warmup if step < 4 else (1 + math.cos(math.pi * (step - 4) / 5)) / 2)
        kept = min(ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in named.items():
                gradient = gradients[name] * clip / norm
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                weight *= 1 - rate * weight_decay * (weight in decaying)
                slope = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                weight -= rate * first[name] / (1 - 0.9 ** (step + 1)) / slope
                average[name] = kept * average[name] + (1 - kept) * weight

    assert table(out)[0] == pytest.approx(losses, rel=1e-4)
    saved = sd.load(out).state_dict()
    state = torch.load(out.with_suffix(".state"), weights_only=True)
    for (name, weight), own in zip(named.items(), state["weights"], strict=True):
        assert ema or own.equal(saved[name])
        if name.endswith("k.bias"):
            continue  # softmax does not depend on it: its gradient is rounding, which AdamW enlarges
        for theirs, ours in ((average[name], saved[name]), (weight.detach(), own.detach())):
            change = (theirs - start[name]).norm()
            assert (ours - theirs).norm() <= 2e-3 * change + 1e-7, name
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in named}
    assert others and all(saved[name].equal(tensor) for name, tensor in others.items())
    if part == "unet":
        unused = "text_encoder.token_embedding"
        rows = first[unused].abs().amax(1) == 0
        assert rows.sum() > 500 and saved[unused][rows].equal(start[unused][rows])


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_bf16(part, data, tmp_path):
    losses = {}
    for dtype in ("fp32", "bf16"):
        # The UNet's last layer starts at zero: after smaller steps both dtypes can round to the same losses.
        options = {"part": part, "config": tiny(), "steps": 4, "batch_size": 4, "lr": 1e-3, "warmup": 0}
        out = tmp_path / f"{dtype}.safetensors"
        run_here(data, **options, dtype=dtype, out=out, status=0)
        losses[dtype], _ = table(out)
        assert {tensor.dtype for tensor in sd.load(out).state_dict().values()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02) and losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_loss_falls(part, request):
    losses, validation = table(request.getfixturevalue(part))
    assert len(losses) == 40 and len(set(losses)) > 35
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:3])
    assert validation[40] < validation[10]


@pytest.mark.parametrize("part, share", [("vae", 0.8), ("unet", 0.5)])
def test_checkpointing_is_exact_and_keeps_less(part, share, data):
    gradients, sizes = [], []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[-1] += tensor.nbytes
        return tensor

    for checkpointing in (False, True):
        options = {"part": part, "config": tiny(), "lr": 0.02, "warmup": 0, "checkpointing": checkpointing}
        trainer = train.prepare(settings(data, device="cpu", **options))
        trainer.update(trainer.backward(1))  # after which no branch is zero
        sizes.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = trainer.backward(2)
        gradients.append([torch.tensor(loss), *(weight.grad for weight in trainer.weights)])
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))
    assert sizes[1] < share * sizes[0]


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_validation_loss(part, request, data, held_out, tmp_path):
    """That of the saved weights, on each held-out image once, not flipped and with captions; with the same
    noise at every call, whatever the size of the batches."""
    out, options = request.getfixturevalue(part), request.getfixturevalue(f"{part}_options")
    losses, validation = table(out)
    assert list(validation) == [10, 20, 30, 40]
    read, objective_class = train.OBJECTIVES[part]
    objective = objective_class(sd.load(out), settings(data, drop_text=0.0), read(held_out))
    generator = seeded()
    with torch.no_grad():
        loss = np.mean([objective(*objective.draw(torch.tensor([i]), generator)).item() for i in range(3)])
    assert validation[40] == pytest.approx(loss, rel=1e-5)
    for batch_size in (1, 2, 3, 4, 2):
        trainer = train.Trainer(objective, settings(data, batch_size=batch_size), objective)
        assert trainer.validate() == pytest.approx(loss, rel=1e-5)

    without = tmp_path / out.name  # the training is the same
    run_here(**options | {"validate": None, "sample_every": 0}, out=without, status=0)
    assert table(without) == (losses, {}) and without.read_bytes() == out.read_bytes()


def test_objective_is_compiled(data):
    """Which PyTorch is asked to refuse, as it takes a minute."""
    options = settings(data, config=tiny(), steps=1, batch_size=1, device="cpu", compile=True)
    refused = torch.compiler.set_stance("fail_on_recompile")
    with refused, pytest.raises(RuntimeError, match="recompile.* function name: 'forward'"):
        train.train(options)


@pytest.mark.long
def test_compiled_training_is_the_same(data, tmp_path):
    losses, config = [], tiny(vae_channels=[8], unet_channels=[8], unet_attention=[True])
    for compiled in (False, True):
        out = tmp_path / f"{compiled}.safetensors"
        result = finish(start(data, config=config, steps=5, batch_size=4, compile=compiled, out=out))
        assert result.returncode == 0, result.stderr
        losses.append(table(out)[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ------------------------------------------------------------------------------------------------ fine-tuning


@pytest.mark.parametrize("kind, train_text_encoder", [(".safetensors", False), (".ckpt", True)])
def test_fine_tuned_model_draws(data, tmp_path, kind, train_text_encoder):
    """Nothing but what is trained has changed in it."""
    init, out = tmp_path / f"init{kind}", tmp_path / "tuned.safetensors"
    make_checkpoint.write(init, small=True)
    content = init.read_bytes()
    options = {"resolution": 64, "steps": 2, "batch_size": 1, "warmup": 0, "init": init}
    run_here(data, **options, train_text_encoder=train_text_encoder, out=out, status=0)
    assert init.read_bytes() == content
    before, after = sd.load(init), sd.load(out)
    assert after.config == before.config
    for part, changes in {"vae": False, "text_encoder": train_text_encoder, "unet": True}.items():
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        changed = [not old.equal(new) for old, new in pairs]
        assert all(changed) if part == "unet" else any(changed) == changes
    [image] = after.generate("a red thing", steps=1, width=64, height=64, seed=1, progress=False)
    assert image.size == (64, 64) and pixels(image).std() > 5


def test_init_file_may_change_during_training(data, vae, tmp_path):
    init, out = shutil.copy(vae, tmp_path / "init.safetensors"), tmp_path / "a.safetensors"
    options = {"init": init, "out": out, "batch_size": 1, "steps": 1, "device": "cpu"}
    trainer = train.prepare(train.Settings(data, **options))
    with open(init, "r+b") as file:
        file.write(bytes(init.stat().st_size))
    assert train.run(trainer) == 0
    before, after = (sd.load(path).vae.state_dict() for path in (vae, out))
    assert all(after[name].equal(weight) for name, weight in before.items())


# ----------------------------------------------------------------------------------------------------- sheets


def tiles(file: Path, count: int, side: int = 16) -> list[Image.Image]:
    grid = Image.open(file)
    places = [(i % 8 * side, i // 8 * side) for i in range(count)]
    return [grid.crop((left, top, left + side, top + side)) for left, top in places]


def test_sheets_of_the_unet_show_the_prompts(unet):
    """Drawn with the averaged weights; at the last step these are the ones that are saved."""
    early, late = unet.with_suffix(".20.png"), unet.with_suffix(".40.png")
    assert Image.open(early).size == (128, 16) and pixels(early).tolist() != pixels(late).tolist()
    model, drawn = sd.load(unet), tiles(late, 3)
    for prompt, tile in zip(PROMPTS, drawn):
        [image] = model.generate(prompt, steps=20, sampler="dpm++", seed=0, progress=False)
        assert abs(pixels(image) - pixels(tile)).max() <= 1
    assert (pixels(late)[:, 48:] == 255).all()
    assert abs(pixels(drawn[0]) - pixels(drawn[1])).max() > 1  # the text changes the image


def test_sheets_of_the_vae_show_images_and_reconstructions(vae):
    assert Image.open(vae.with_suffix(".20.png")).size == (128, 64)
    model, drawn = sd.load(vae), tiles(vae.with_suffix(".40.png"), 32)
    for before, after in zip(drawn[::2], drawn[1::2]):
        with torch.no_grad():
            [image] = sd.to_images(model.decode(model.encode(sd.to_tensor(before))))
        assert abs(pixels(image) - pixels(after)).max() <= 1
    changes = [abs(pixels(one) - pixels(other)).mean() for one, other in zip(drawn[::2], drawn[1::2])]
    assert 0 < np.mean(changes) < 60


def test_captions_are_the_default_prompts(data, tmp_path):
    objective = noise_prediction(data)
    assert objective.prompts == [text for texts in CAPTIONS.values() for text in texts]
    assert [image.size for image in objective.samples()] == 6 * [(16, 16)]
    captions = {f"{i}.png": [f"{i}, one", f"{i}, two"] for i in range(9)}
    objective = noise_prediction(write_data(tmp_path / "many", captions))
    assert objective.prompts == [f"{i}, {word}" for i in range(8) for word in ("one", "two")]


# ------------------------------------------------------------------------------------------ stop and resume


@pytest.mark.parametrize(
    "number, part", [(signal.SIGKILL, "unet"), (signal.SIGINT, "vae"), (signal.SIGTERM, "unet")]
)
def test_resumed_training_equals_an_uninterrupted_one(number, part, request, tmp_path):
    """Bit for bit, from a file in fp16. SIGINT and SIGTERM save the step that they end."""
    whole, options = request.getfixturevalue(part), request.getfixturevalue(f"{part}_options")
    out = tmp_path / whole.name
    status, rest = signal_after_save(start(**options, out=out), 10, number)
    losses, validation = table(out)
    assert losses == table(whole)[0][: len(losses)] and 10 <= len(losses) < 40
    assert sd.load(out)
    if number == signal.SIGKILL:
        assert status == -number and len(losses) % 10 == 0
    else:
        assert status == 128 + number
        assert rest.endswith(f"train.py: stopped after step {len(losses)}; to continue, add --resume\n")
        assert f"step {len(losses)} of 40" in rest and all(step % 10 == 0 for step in validation)
    run_here(**options, out=out, resume=True, status=0)
    ours, theirs = files_of(out), files_of(whole)
    assert ours.keys() == theirs.keys() == {".safetensors", ".loss.csv", ".20.png", ".40.png"}
    assert [suffix for suffix in theirs if ours[suffix] != theirs[suffix]] == []


def test_finished_training_is_left_alone(unet, unet_options, tmp_path):
    """What a kill left undone is done first: the model is saved, and its temporary files are removed. Other
    files stay as they are, also behind the lock's name."""
    folder = shutil.copytree(unet.parent, tmp_path / "done")
    other = {".other.state.0f.part": b"", "mine": b"me"}
    write_files(folder, other | {".unet.state.0f.part": "", ".unet.20.png.0f.part": ""})
    (folder / f".{unet.name}.lock").symlink_to("mine")
    (folder / unet.name).unlink()
    for _ in range(2):
        run_here(**unet_options, out=folder / unet.name, resume=True, status=0)
        assert everything(folder) == everything(unet.parent) | other


def test_model_that_is_being_trained_is_not_trained_again(data, vae, tmp_path):
    options = {"init": vae, "part": "vae", "batch_size": 1, "steps": 10**6, "save_every": 1}
    out = tmp_path / "a.safetensors"
    process = start(data, **options, out=out)
    assert process.stderr.readline().startswith("train.py: step 1 of ")
    result = run_here(data, **options, out=out, resume=True)
    assert error_of(result) == f"{out}: another process is training it; use another --out"
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("number, in_batch", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_signal_inside_a_step_ends_with_that_step(number, in_batch, data, tmp_path):
    """Of the default model, in fp16; resuming from there is exact, and signal handlers are restored."""
    whole, parts = (tmp_path / name / "a.safetensors" for name in ("whole", "parts"))
    options = {"init": ROOT / "weights" / "emoji.safetensors", "resolution": 16, "warmup": 0, "steps": 3}
    options |= {"data": data, "batch_size": 1, "accumulate": 2, "device": "cpu"}
    for out in (whole, parts):
        out.parent.mkdir()
    run_here(**options, out=whole, status=0)
    trainer, drawn = train.prepare(train.Settings(**options, out=parts)), []
    draw_batch = trainer.objective.draw

    def draw_and_kill(indices, generator):
        drawn.append(draw_batch(indices, generator))
        if len(drawn) == 2 + in_batch:  # of step 2
            os.kill(os.getpid(), number)
        return drawn[-1]

    trainer.objective.draw = draw_and_kill
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert train.run(trainer) == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(table(parts)[0]) == 2
    run_here(**options, out=parts, resume=True, status=0)
    assert files_of(whole) == files_of(parts)


def test_progress_bar_on_a_terminal(data, vae, tmp_path, terminal):
    """With loss, learning rate and speed, and still a line for each save."""
    ours, its = terminal
    options = {"steps": 8, "batch_size": 2, "lr": 0.5, "warmup": 2, "save_every": 8}
    process = start(data, init=vae, **options, out=tmp_path / "a.safetensors", stderr=its)
    os.close(its)
    text = read_until(ours, b"")
    process.communicate()
    assert process.returncode == 0
    bar = rb"\r100%\|.*16/16 \[.* images/s, loss=[\d.]+, lr=0\.033\d+\]"
    assert re.search(bar, text) and b"train.py: step 8 of 8: loss " in text, text


def test_resuming_depends_on_what_was_saved_only(unet, unet_options, tmp_path):
    """Not on --init, nor on the layout in memory that another kind of device gave the state."""
    shutil.copytree(unet.parent, tmp_path / "same")
    other = shutil.copytree(unet.parent, tmp_path / "other")
    state = torch.load(other / "unet.state", weights_only=True)
    for moments in state["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].ndim == 4:
                moments[name] = moments[name].to(memory_format=torch.channels_last)
    torch.save(state, other / "unet.state")
    for name, init in {"same": unet_options["init"], "other": None}.items():
        options = unet_options | {"init": init, "out": tmp_path / name / unet.name, "steps": 43}
        run_here(**options, resume=True, status=0)
    assert files_of(tmp_path / "same" / unet.name) == files_of(tmp_path / "other" / unet.name)


@pytest.mark.parametrize("every", [0, 41])
def test_full_disk_leaves_what_was_saved(every, unet, unet_options, tmp_path):
    """Stood in for by a limit on the size of a file: smaller than the state, or than a sheet."""
    folder = shutil.copytree(unet.parent, tmp_path / "saved")
    room = 300 if every else unet.stat().st_size
    assert room < unet.with_suffix(".state").stat().st_size
    options = unet_options | {"out": folder / unet.name, "steps": 41, "sample_every": every}
    with limit(resource.RLIMIT_FSIZE, room):
        result = run_here(**options, resume=True)
    reason = "(File too large|no space left, or a failing disk)"  # PyTorch may not tell, in the state
    message = rf"\S*unet\.[\w.]+: {reason}; make room there, and add --resume"
    assert re.fullmatch(message, error_of(result) or ""), result.stderr
    assert everything(folder) == everything(unet.parent)  # the state is written before the model


def test_first_save_on_a_full_disk(data, tmp_path):
    """Leaves nothing, so that the same command can be given again."""
    options = {"config": tiny(), "out": tmp_path / "a.safetensors", "steps": 1, "batch_size": 1}
    with limit(resource.RLIMIT_FSIZE, 300):
        result = run_here(data, **options)
    assert error_of(result).endswith("; make room there, and start again") and everything(tmp_path) == {}
    run_here(data, **options, status=0)


@pytest.mark.parametrize("damage", ["truncated", "empty", "something else", "of the VAE"])
def test_state_that_does_not_fit(vae, unet, unet_options, tmp_path, damage):
    folder = shutil.copytree(unet.parent, tmp_path / "damaged")
    state = folder / "unet.state"
    contents = {
        "truncated": state.read_bytes()[: state.stat().st_size // 2], "empty": b"",
        "something else": b"step,loss\n" * 100, "of the VAE": vae.with_suffix(".state").read_bytes(),
    }  # fmt: skip
    state.write_bytes(contents[damage])
    before = everything(folder)
    result = run_here(**unet_options, out=folder / unet.name, resume=True)
    assert "unet.state: cannot be resumed from: " in (error_of(result) or ""), result.stderr[-500:]
    assert everything(folder) == before


# -------------------------------------------------------------------------------------------- skipped steps


def give_gradients(trainer: train.Trainer, seed: int, bad: float = 0.0) -> None:
    for weight in trainer.weights:
        weight.grad = torch.randn(weight.shape, generator=seeded(seed))
    trainer.weights[3].grad.view(-1)[1] += bad


def snapshot(trainer: train.Trainer) -> list[torch.Tensor]:
    """Weights, average and all that the optimizer keeps."""
    states = trainer.optimizer.state_dict()
    kept = [torch.as_tensor(value) for state in states["state"].values() for value in state.values()]
    rates = [torch.tensor([group["lr"], group["weight_decay"]]) for group in states["param_groups"]]
    return [tensor.detach().clone() for tensor in [*trainer.weights, *trainer.average, *kept, *rates]]


def trainer_of(data: Path, **options) -> train.Trainer:
    objective = noise_prediction(data, **options)
    return train.Trainer(objective, objective.settings)


@pytest.mark.parametrize("loss, bad", [(math.nan, 0), (math.inf, 0), (1.0, math.nan), (1.0, math.inf)])
def test_step_that_is_not_finite_is_skipped(data, loss, bad):
    trainer = trainer_of(data, steps=100)
    give_gradients(trainer, 0)
    trainer.update(1.0)
    before = snapshot(trainer)
    assert len(before) == 5 * len(trainer.weights) + 2
    give_gradients(trainer, 1, bad)
    with pytest.warns(UserWarning, match="step 2 skipped"):
        trainer.update(loss)
    assert all(one.equal(other) for one, other in zip(before, snapshot(trainer), strict=True))
    assert len(trainer.losses) == 2 and not math.isfinite(trainer.losses[1])
    assert all(weight.grad is None or not weight.grad.any() for weight in trainer.weights)
    give_gradients(trainer, 2)
    trainer.update(1.0)
    changed = [not one.equal(other) for one, other in zip(before, snapshot(trainer))]
    assert all(changed[: 2 * len(trainer.weights)])
    assert all(weight.isfinite().all() for weight in trainer.weights) and trainer.losses[2] == 1.0


def test_ten_steps_in_a_row_that_are_not_finite_end_training(data):
    for good_steps in (0, 1, 2):  # each after nine that are not finite, or from the first step on
        trainer = trainer_of(data)
        for bad in good_steps * [*9 * [math.nan], 0] + 9 * [math.inf]:
            give_gradients(trainer, 0, bad)
            with pytest.warns(UserWarning, match="skipped") if bad else nullcontext():
                trainer.update(1.0)
        give_gradients(trainer, 0, math.inf)
        with pytest.raises(ValueError, match="10 steps in a row are not finite; lower --lr"):
            trainer.update(1.0)


def test_training_that_diverges_stops_with_advice(data, tmp_path):
    out = tmp_path / "a.safetensors"
    result = run_here(data, config=tiny(), out=out, lr=1e30, batch_size=2)
    assert result.returncode == 2 and result.stdout == "" and list(tmp_path.iterdir()) == []
    *notes, last = result.stderr.splitlines()
    assert re.fullmatch(r"train\.py: error: 10 steps in a row .*lower --lr.*", last)
    pattern = r"train\.py: note: step (\d+) skipped: .*not finite"
    steps = [int(re.fullmatch(pattern, note)[1]) for note in notes]
    assert len(steps) >= 9 and steps[-9:] == list(range(steps[-9], steps[-9] + 9))


# ------------------------------------------------------------------------------------------ several processes


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


def test_two_processes_train_as_one(data, held_out, vae, tmp_path):
    """Only the first writes files and messages."""
    options = {"init": vae, "flip": True, "steps": 12, "lr": 1e-2, "warmup": 3, "accumulate": 2, "data": data}
    options |= {"sample_every": 6, "save_every": 6, "validate": held_out}
    outs = [tmp_path / name / "a.safetensors" for name in ("one", "two")]
    for out in outs:
        out.parent.mkdir()
    run_here(**options, batch_size=4, out=outs[0], status=0)
    result = finish(start(**options, batch_size=2, out=outs[1], launcher=TORCHRUN))
    lines = [line for line in result.stderr.splitlines(keepends=True) if "train.py" in line]
    result.stderr = "".join(lines)  # torchrun has notes of its own
    check_progress(result, [6, 12])
    names = ["a.12.png", "a.6.png", "a.loss.csv", "a.safetensors", "a.state"]
    assert sorted(everything(outs[0].parent)) == sorted(everything(outs[1].parent)) == names
    (expected, expected_validation), (losses, validation) = map(table, outs)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert list(validation) == [6, 12] and validation[12] == pytest.approx(expected_validation[12], rel=0.01)
    theirs, ours = (sd.load(out).state_dict() for out in outs)
    # So small where the gradient is zero but for rounding, of which Adam makes a step.
    far = {name: (ours[name] - tensor).norm() / tensor.norm().clamp(min=1) for name, tensor in theirs.items()}
    assert max(far.values()) < 0.02


def test_two_processes_stop_and_one_resumes(data, vae, tmp_path):
    """After one SIGTERM, as torchrun passes it on; in the warm-up, where rates do not depend on --steps."""
    options = {"data": data, "part": "vae", "init": vae, "lr": 0.1, "warmup": 100, "save_every": 5}
    out, whole = tmp_path / "a.safetensors", tmp_path / "whole.safetensors"
    process = start(**options, batch_size=1, out=out, launcher=TORCHRUN)
    status, rest = signal_after_save(process, 5, signal.SIGTERM)
    told = re.findall(r"^train\.py: stopped after step (\d+);.* --resume$", rest, re.MULTILINE)
    assert status != 0 and len(told) == 1
    steps = int(told[0])
    assert len(table(out)[0]) == steps >= 5
    assert sorted(everything(tmp_path)) == ["a.loss.csv", "a.safetensors", "a.state"]
    for path in (out, whole):
        options |= {"batch_size": 2, "steps": steps + 2, "out": path, "resume": path == out}
        run_here(**options, status=0)
    assert table(out)[0] == pytest.approx(table(whole)[0], rel=1e-5)


# --------------------------------------------------------------------------------------------------- mistakes


def test_help_fits_eighty_columns_and_has_the_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run_here(None, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 80
    entries = dict(re.findall(r"^  (?:-h, )?--([\w-]+)((?:.*\n)(?:    .*\n)*)", result.stdout, re.MULTILINE))
    defaults = vars(train.parse(["data", "--out", "a.safetensors"]))
    assert entries.keys() == {name.replace("_", "-") for name in defaults} - {"data"} | {"help"}
    for name, value in defaults.items():
        if isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value):
            shown = re.findall(r"[\d.e-]*\d", entries[name.replace("_", "-")].split("(")[-1])
            assert float(shown[0]) == value, name


OUT_OF_RANGE = """
    steps 0, steps -1, batch-size 0, accumulate 0, save-every 0, sample-every -1, warmup -1, lr 0.0, lr -1.0,
    lr nan, lr inf, clip 0.0, clip nan, min-snr 0.0, min-snr nan, ema -0.1, ema 1.0, ema nan, drop-text -0.1,
    drop-text 1.0, drop-text nan, weight-decay -1.0, weight-decay nan, resolution 15, resolution -16,
    resolution 0, resolution 16392, steps 9007199254740993, warmup 9999999999, seed -1,
    seed 18446744073709551616, dtype fp16, part text, text-encoder gpt
"""
RANGES = [option.split() for option in OUT_OF_RANGE.split(",")]
BAD_OPTIONS = [
    *(([f"--{name}", value], f"{name} is {value} and must be ") for name, value in RANGES),
    (["--steps", "abc"], "--steps"), (["--batch-size", "1.5"], "--batch-size"), (["--seed", "1.5"], "--seed"),
    (["--frobnicate"], "--frobnicate"), (["--step", 3], "--step"), (["more"], "more"),
    (["--device", "nonsense"], "nonsense"), (["--validate", "missing"], "missing: no such folder"),
    (["--config", tiny(vae_channels=[8, 8, 8, 8]), "--resolution", 20], "multiple of 8"),
    (["--init", "missing.ckpt"], "missing.ckpt"), (["--init", "text.json"], "text.json"),
    (["--init", "missing.ckpt", "--config", tiny()], "config is given and must be left out"),
    (["--bert", "folder"], "bert is set and must be used with --text-encoder bert"),
    (["--config", "{no JSON"], "config"), (["--config", ""], "config"), (["--config", "5"], "config"),
    (["--config", "[1]"], "config"), (["--config", "missing.json"], "missing.json"),
    (["--config", "text.json"], "text.json"), (["--config", '{"no_such_field": 1}'], "no_such_field"),
    (["--config", tiny(unet_heads=3)], "heads"), (["--config", tiny(vocab_size=10)], "vocab_size"),
    (["--prompts", "missing.txt"], "missing.txt"), (["--prompts", "empty.txt"], "empty.txt"),
    (["--prompts", "latin-1.txt"], "latin-1.txt"),
    (["--out", "a.ckpt"], "a.ckpt"), (["--out", "a"], "out is a "), (["--out", "."], "out is ."),
    (["--out", "missing/a.safetensors"], "missing/a.safetensors"),
    (["--out", "text.json/a.safetensors"], "out is text.json/a.safetensors"),
    (["--out", "there.safetensors"], "add --resume"), (["--out", "folder.safetensors"], "add --resume"),
    (["--out", "b.safetensors"], "b.state exists; use another name"),
    (["--out", "c.safetensors"], "c.loss.csv exists"), (["--out", "d.safetensors"], "d.20.png exists"),
    (["--resume"], "new.state"), (["--out", "there.safetensors", "--resume"], "there.state"),
    (["--batch-size", 10**13], "out of memory; try a smaller --batch-size"),
]  # fmt: skip


@pytest.mark.parametrize("options, says", BAD_OPTIONS, ids=lambda value: str(value)[:60])
def test_bad_options(options, says, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["text.json", "there.safetensors", "b.state", "c.loss.csv", "d.20.png"]
    write_files(tmp_path, dict.fromkeys(names, "mine") | {"empty.txt": "", "latin-1.txt": b"s\xfc\xdf\n"})
    Path("folder.safetensors").mkdir()
    before, paths = everything(tmp_path), sorted(tmp_path.rglob("*"))
    config = None if "--init" in options else tiny()
    result = run_here(data, *options, config=config, out="new.safetensors", steps=2, sample_every=2)
    assert says in (error_of(result) or ""), result.stderr[-500:]
    assert everything(tmp_path) == before and sorted(tmp_path.rglob("*")) == paths


def test_data_and_out_are_required(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "DATA" in error_of(run_here(None, out="a.safetensors"))
    assert "--out" in error_of(run_here(data))
    result = finish(start("none", out="a.safetensors"))  # as a user starts it
    assert error_of(result) == "none: no such folder; name one that holds images"
    assert everything(tmp_path) == {}


def test_settings_from_python(data, tmp_path, monkeypatch):
    """Paths may be strings, and ~ is the home folder; --config may be a file with a byte order mark."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "tiny.json").write_text(tiny(), encoding="utf-8-sig")
    values = {"steps": 1, "batch_size": 1, "device": "cpu", "config": "~/tiny.json", "validate": "~/data"}
    assert train.train(train.Settings(data="~/data", out="~/a.safetensors", **values)) == 0
    assert len(table(tmp_path / "a.safetensors")[0]) == 1
    assert sd.load(tmp_path / "a.safetensors").config == sd.Config(**TINY)
    with pytest.raises(ValueError, match="a.safetensors exists; use another name"):
        train.Settings(data=data, out=str(tmp_path / "a.safetensors"))


RED = '{"file_name": "red.png", "text": "red"}\n'
BAD_LINES = [  # of metadata.jsonl, and the message
    ("\n\n", "without captions"), (RED + "\nred", "metadata.jsonl, line 3: not JSON: Expecting value"),
    (4 * RED + '{"file_name": "red.png"}', "line 5: text is missing"),
    ('{"text": "red"}', "metadata.jsonl, line 1: file_name is missing"),
    ('{"file_name": "red.png", "text": 5}', "line 1: text is 5 and"),
    ('{"file_name": "red.png", "text": null}', "line 1: text is missing"),
    ('{"file_name": 5, "text": "red"}', "file_name is 5 and"),
    ('["red.png", "red"]', "line 1: file_name is missing"), (100_000 * "[", "metadata.jsonl, line 1: not"),
    (RED[:-3].encode() + b'\xff"}', "metadata.jsonl: .*utf-8"),
    ('{"file_name": "x.png", "text": "x"}', "1 of 1 .*x.png"),
]  # fmt: skip
BAD_COCO = [
    ("{\n\n", "captions_all.json, line 3: not JSON"), ("[]", "captions_all.json: images is missing"),
    ('{"annotations": []}', "captions_all.json: images is missing"),
    ('{"images": []}', "all.json: annotations is missing"), (coco([]), "without captions"),
    (coco(IMAGES, [(2, "red")]), r"all.json, annotations\[0\]: image_id is 2 and"),
    (coco(IMAGES, [(7, "a"), (8, None)]), r"ns\[1\]: caption is missing"),
    (coco([*IMAGES, {"id": 2}]), r"all.json, images\[3\]: file_name is missing"),
    (coco(IMAGES, [(7, "red")]), "1 of 1 .*1.jpg"),
]  # fmt: skip
BAD_CAPTIONS = [  # files beside red.png, and the message
    *(({"metadata.jsonl": content}, says) for content, says in BAD_LINES),
    *(({"captions_all.json": content}, says) for content, says in BAD_COCO),
    ({}, "without captions"), ({"gray.txt": "gray"}, "without captions"), ({"red.txt": b"\xff"}, "red.txt"),
    ({"red.txt": "red", "a.png": "", "a.txt": "a", "b.jpg": "x", "b.txt": "b"}, "2 of 3 .*a.png.*b.jpg"),
]  # fmt: skip


@pytest.mark.parametrize("files, says", BAD_CAPTIONS, ids=lambda value: str(value)[:60])
def test_bad_captions(files, says, tmp_path):
    """Told before the model is built: that of this Config cannot be."""
    folder = tmp_path / "data"
    folder.mkdir()
    photograph(16, 24).save(folder / "red.png")
    write_files(folder, files)
    before = everything(tmp_path)
    config = tiny() if " of " in says else "{}{"  # images are read later
    result = run_here(folder, config=config, out=tmp_path / "a.safetensors", steps=1)
    assert re.search(says, error_of(result) or ""), result.stderr[-500:]
    assert str(folder) in error_of(result) and everything(tmp_path) == before


def test_vae_needs_images_only(tmp_path):
    """Captions are not read, and may be wrong."""
    folder, options = tmp_path / "data", {"part": "vae", "steps": 1, "out": tmp_path / "a.safetensors"}
    folder.mkdir()
    assert "data is without images" in error_of(run_here(folder, config="{}{", **options))
    (folder / "metadata.jsonl").write_text("no JSON")
    (folder / "a.png").touch()
    assert "1 of 1 images cannot be used" in error_of(run_here(folder, config=tiny(), **options))
    photograph(16, 24).save(folder / "a.png")
    assert "a.png: no such folder" in error_of(run_here(folder / "a.png", config="{}{", **options))
    run_here(folder, config=tiny(), **options, status=0)


# ---------------------------------------------------------------------------------- data of the default model


@pytest.fixture(scope="module")
def font() -> ImageFont.FreeTypeFont:
    files = (emoji.NAMES, emoji.FONT, emoji.KEYWORDS)
    if missing := [file for file in files if not emoji.installed(file).is_file()]:
        packages = "unicode-data, fonts-noto-color-emoji and unicode-cldr-core"
        pytest.skip(f"{', '.join(missing)} of {packages} are not installed")
    return ImageFont.truetype(emoji.installed(emoji.FONT), emoji.GLYPH)


def test_emoji_names(font):
    """About 1,500, no two alike."""
    names = emoji.emoji_names()
    assert 1400 < len(names) < 1600 and len(set(names.values())) == len(names)
    for one, name in names.items():
        assert not re.search(r"skin tone|\bflag|keycap|o.clock|thirty|:$", name), name
        assert not re.search("[\U0001f3fb-\U0001f3ff\U0001f550-\U0001f567\U0001f1e6-\U0001f1ff\u20e3]", one)
    known = {
        "🍎": "red apple", "🐱": "cat face", "🍕": "slice of pizza", "❤️": "red heart",
        "👩‍🚀": "woman astronaut",
    }  # fmt: skip
    assert {one: names[one] for one in known} == known


def test_emoji_captions():
    assert emoji.captions(["ant", "red"], "blue") == ["ant on a blue background", "red on a blue background"]
    assert emoji.captions(["apple"], "white") == 3 * ["apple"] + ["apple on a white background"]
    names = ("artist palette", "OK hand", "unicorn", "hourglass done", "orange")
    assert [emoji.article(name) for name in names] == ["an", "an", "a", "an", "an"]


def test_emoji_texts(font):
    """Names stand there four times, rare keywords twice, others once, all with and without article."""
    texts, keywords = emoji.emoji_texts(), emoji.emoji_keywords()
    assert keywords["🍎"] == ["apple", "fruit", "red"] and {"dog", "pet", "puppy"} <= {*keywords["🐶"]}
    apple = Counter(texts["🍎"])
    assert apple["red apple"] == apple["a red apple"] == 4 and apple["apple"] == apple["an apple"] == 2
    assert apple["fruit"] == apple["a fruit"] == 1 and apple["red"] == 1
    assert "puppy" in texts["🐶"] and texts["👩‍👦"].count("family: woman, boy") == 4
    names = emoji.emoji_names()
    assert texts.keys() == names.keys()
    assert "eye" in keywords["😄"] and [one for one in names if "eye" in texts[one]] == ["👁️"]


def test_a_tenth_of_the_pairs_of_keywords_is_held_out(font):
    keywords, halves, texts = emoji.emoji_keywords(), emoji.keyword_pairs(), emoji.emoji_texts()
    assert halves == emoji.keyword_pairs() and halves.keys() == {"train", "heldout"}
    training, heldout = ({frozenset(pair) for pair in halves[half]} for half in ("train", "heldout"))
    assert len(heldout) == (len(training) + len(heldout)) // 10 > 200 and not training & heldout
    captions = {text for one in texts.values() for text in one}
    asked = {prompt for prompt, *_ in held_out_pairs()}  # without those that are names: red apple
    assert len(asked) > 200 and not asked & captions
    assert asked <= {f"{one} {other}" for one, other in halves["heldout"]}
    for one, words in keywords.items():
        found = [pair for pair in halves["train"] if set(pair) <= set(words)]
        assert all(" ".join(pair) in texts[one] for pair in found)
        assert len(words) < 2 or found or any(frozenset(pair) <= set(words) for pair in halves["heldout"])


def test_a_tenth_of_the_emoji_pairs_is_held_out(font):
    names = list(emoji.emoji_names())
    halves = emoji.split(names)
    assert halves == emoji.split(names) and halves.keys() == {"train", "heldout"}
    training, heldout = halves["train"], halves["heldout"]
    assert sorted(training + heldout) == sorted((one, color) for one in names for color in emoji.COLORS)
    assert len(heldout) == 12 * len(names) // 10 and len(emoji.COLORS) == 12
    assert {one for one, _ in training} == set(names) and {color for _, color in heldout} == set(emoji.COLORS)
    assert emoji.split(list("abc"))["heldout"] == [("a", "white"), ("b", "green"), ("b", "gray")]


def test_emoji_are_drawn_in_the_middle(font):
    for one in ("🍎", "👩‍🚀", "➖"):
        white, blue = (pixels(emoji.draw(one, color, font)) for color in ("white", "blue"))
        assert white.shape == blue.shape == (128, 128, 3)
        inside = (blue != emoji.COLORS["blue"]).any(-1)
        assert (white[~inside] == 255).all() and inside.mean() > 0.02
        [top, bottom], [left, right] = (np.flatnonzero(inside.any(axis))[[0, -1]] for axis in (1, 0))
        assert abs(top + bottom - 127) <= 2 and abs(left + right - 127) <= 2
        assert 60 < max(right - left, bottom - top) < 113
    red = pixels(emoji.draw("🍎", "white", font))[64, 64]
    assert red[0] > 150 and red[0] > 2 * red[2]


def test_emoji_folders_are_data_sets(font, tmp_path, monkeypatch):
    """Of three emoji only, as all of them take a minute."""
    (tmp_path / "names.txt").write_text(
        "# group: Food\n"
        "1F34E                  ; fully-qualified     # 🍎 E0.6 red apple\n"
        "1F44B 1F3FB            ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone\n"
        "1F984                  ; fully-qualified     # 🦄 E1.0 zebra\n"
        "2639                   ; unqualified         # ☹ E0.7 frowning face\n"
        "1F3A8                  ; fully-qualified     # 🎨 E0.6 artist palette\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(emoji, "NAMES", str(tmp_path / "names.txt"))
    emoji.main(tmp_path)
    called, halves = emoji.emoji_texts(), emoji.split(list(emoji.emoji_names()))
    assert list(emoji.emoji_names().values()) == ["red apple", "zebra", "artist palette"]
    for half, size in {"train": 33, "heldout": 3}.items():
        captions = train.read_captions(tmp_path / half)
        assert len(captions) == size == len(list((tmp_path / half).glob("*.png")))
        for (path, texts), (one, color) in zip(captions.items(), halves[half], strict=True):
            assert texts == emoji.captions(called[one], color)
            assert (pixels(path) == pixels(emoji.draw(one, color, font))).all()
    captions = train.read_captions(tmp_path / "names")
    assert [path.resolve() for path in captions] == list(train.read_captions(tmp_path / "train"))
    for texts, (one, color) in zip(captions.values(), halves["train"], strict=True):
        name = emoji.emoji_names()[one]
        assert texts == emoji.captions([name, f"{emoji.article(name)} {name}"], color)
