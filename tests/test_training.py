"""train: data sets, both objectives, the optimizer, what is written, and that nothing is lost."""

import argparse
import copy
import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from PIL import Image, ImageFont
from test_command_line import read_until, terminal
from torch import nn

import sd

TINY = {
    "image_size": 16, "vocab_size": 600, "text_length": 16, "text_width": 16, "text_layers": 1,
    "text_heads": 2, "vae_widths": [8, 8], "vae_blocks": 1, "unet_widths": [8, 16],
    "unet_attends": [True, True], "unet_blocks": 1, "unet_heads": 2, "norm_groups": 4,
}  # fmt: skip
CAPTIONS = {
    "red.png": ["a red thing", "something red", "red"], "green.png": ["a green thing"],
    "blue.png": ["a blue thing"], "grey.png": ["a grey thing"],
}  # fmt: skip
PROMPTS = ["a red thing", "a blue thing", "a thing"]
# A training that shows everything in little time; after a stop at step 60 there are two more saves to come.
SETTINGS = ["--steps", 100, "--save-every", 20, "--sample-every", 50, "--lr", 1e-2, "--warmup", 10,
            "--ema", 0.9, "--batch-size", 8]  # fmt: skip
LEFT_BEHIND = [".100.png", ".50.png", ".loss.csv", ".loss.png", ".safetensors", ".state"]


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """Sums come out the same, to the bit, only where they are split in the same way."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photograph(seed: int, width: int, height: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def tensor_of(picture: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8"""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def pixels(picture) -> np.ndarray:
    """Of a picture or a file."""
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture)).astype(int)


def write_captions(folder: Path, captions: dict[str, list[str]]) -> None:
    lines = [{"file_name": name, "text": text} for name, texts in captions.items() for text in texts]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_data(folder: Path, captions: dict[str, list[str]] = CAPTIONS) -> Path:
    """A data set of pictures that have no two shapes alike."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(captions):
        photograph(i, 16 + 5 * i, 24).save(folder / name)
    write_captions(folder, captions)
    return folder


def arguments(data: Path, *options, resolution: int = 16) -> argparse.Namespace:
    args = sd.parse_train([str(data), "--out", "model.safetensors", *map(str, options)])
    args.resolution = resolution
    return args


def tiny_model(seed: int = 0) -> sd.StableDiffusion:
    """Of random weights, in which no branch of the denoiser is silent."""
    torch.manual_seed(seed)
    return sd.StableDiffusion(sd.Config.from_json(json.dumps(TINY)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def losses_of(file: Path) -> list[float]:
    head, *rows = (line.split(",") for line in file.read_text().splitlines())
    assert head == ["step", "loss"] and [int(step) for step, _ in rows] == list(range(1, len(rows) + 1))
    return [float(loss) for _, loss in rows]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def made(out: Path) -> dict[str, bytes]:
    """What a training left, by what its names end in, without the state."""
    stem = out.name.removesuffix(".safetensors")
    files = {file.name.removeprefix(stem): file.read_bytes() for file in out.parent.iterdir()}
    assert sorted(files) == LEFT_BEHIND
    return {kind: data for kind, data in files.items() if kind != ".state"}


def train_here(*options, status: int = 0) -> None:
    """`python sd.py train ...` in this process, which afterwards is as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with warnings.catch_warnings():
            assert sd.main(["train", *map(str, options), "--device", "cpu"]) == status
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(*command, **options) -> subprocess.Popen:
    """A Python process on one core; `command` begins with a script or -m."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, env=environment, **options)


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    with process:
        try:
            stdout, stderr = process.communicate(timeout=1800)
            return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        finally:
            process.kill()


def run(*command, **options) -> subprocess.CompletedProcess:
    """A Python process from its start to its end."""
    return finish(start(*command, **options))


def run_train(*options, **process_options) -> subprocess.CompletedProcess:
    return run(ROOT / "sd.py", "train", *options, **process_options)


def run_torchrun(*command, **options) -> subprocess.CompletedProcess:
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command, **options)


def run_forked(*options, cwd: Path) -> subprocess.CompletedProcess:
    """`python sd.py train ...` in a process that is forked from this one, for the many mistakes that end it
    before it trains: to import PyTorch takes longer than all that it does."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = os.fork()
        if process == 0:
            signal.alarm(60)
            torch.set_num_threads(1)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            os.chdir(cwd)
            sys.stdout, sys.stderr, status = os.fdopen(1, "w"), os.fdopen(2, "w"), 1
            try:
                status = sd.main(["train", "--device", "cpu", *map(str, options)])
            except SystemExit as stop:
                status = stop.code
            finally:
                if sys.exception():
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(options, status, stdout.read(), stderr.read())


def error_of(result: subprocess.CompletedProcess) -> str | None:
    """What is said where a run ends as it should after a mistake: exit status 2 and one line."""
    one_line = re.fullmatch(r"sd\.py: error: ([^\n]+)\n", result.stderr)
    return one_line[1] if one_line and result.returncode == 2 and result.stdout == "" else None


# ---------------------------------------------------------------------------------- trainings that are shared


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The tiny Config as a file."""
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY), encoding="utf-8-sig")  # as Windows' editors write it
    return path


@pytest.fixture(scope="module")
def vae_options(data, config) -> list:
    return [data, "--part", "vae", "--config", config, *SETTINGS, "--flip"]


@pytest.fixture(scope="module")
def vae(vae_options, tmp_path_factory) -> Path:
    """A VAE, trained in one go."""
    out = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    result = run_train(*vae_options, "--out", out)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    return out


@pytest.fixture(scope="module")
def unet_options(data, vae) -> list:
    prompts = data.parent / "prompts.txt"
    lines = "".join(prompt + "\n\n" for prompt in PROMPTS)  # lines without a prompt do not count
    prompts.write_text(lines, encoding="utf-8-sig")
    return [data, "--part", "unet", "--init", vae, *SETTINGS, "--prompts", prompts]


@pytest.fixture(scope="module")
def unet(unet_options, tmp_path_factory) -> Path:
    """The same model with a UNet, trained in one go."""
    out = tmp_path_factory.mktemp("unet") / "unet.safetensors"
    result = run_train(*unet_options, "--out", out)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    return out


# ------------------------------------------------------------------------------------------------------- data


def test_captions_are_read_in_three_layouts(tmp_path):
    lines, coco, texts = (tmp_path / name for name in ("lines", "coco", "texts"))
    for folder in (lines, coco / "images" / "val", coco / "notes", texts / "in" / "deep"):
        folder.mkdir(parents=True)
    write_captions(lines, {"a.png": ["one", "two"], "more/b.JPG": ["drei ü"]})
    with open(lines / "metadata.jsonl", "a") as file:
        file.write('\n  \n{"file_name": "a.png", "text": "three\u2028\x85"}')
    assert sd.read_captions(lines) == {
        lines / "a.png": ["one", "two", "three\u2028\x85"],
        lines / "more/b.JPG": ["drei ü"],
    }

    for name in ("1.jpg", "2.JPEG", "not captioned.png"):
        (coco / "images" / "val" / name).touch()
    for half, captions in {"train": [(7, "one"), (9, "two"), (7, "three")], "val": [(8, "four")]}.items():
        images = [
            {"id": 7, "file_name": "1.jpg"},
            {"id": 8, "file_name": "2.JPEG"},
            {"id": 9, "file_name": "3.png"},
        ]
        annotations = [{"id": i, "image_id": id, "caption": text} for i, (id, text) in enumerate(captions)]
        file = coco / "notes" / f"captions_{half}.json"
        file.write_text(json.dumps({"images": images, "annotations": annotations}))
    (coco / "notes" / "instances_val.json").write_text("{}")
    found = coco / "images" / "val"
    assert sd.read_captions(coco) == {
        found / "1.jpg": ["one", "three"], found / "2.JPEG": ["four"], coco / "3.png": ["two"],
    }  # fmt: skip

    for name in ("a.png", "in/b.WebP", "in/deep/c.bmp", "no text.png", "in/no picture.gif"):
        (texts / name).touch()
    for name, text in {
        "a": "one\n",
        "in/b": " zwei ü ",
        "in/deep/c": "three",
        "in/no picture": "four",
    }.items():
        (texts / f"{name}.txt").write_text(text, encoding="utf-8")
    assert sd.read_captions(texts) == {
        texts / "a.png": ["one"], texts / "in/b.WebP": ["zwei ü"], texts / "in/deep/c.bmp": ["three"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions_a.json", "a.txt"])
def test_captions_may_begin_with_the_mark_that_windows_writes(name, tmp_path):
    texts = {
        "metadata.jsonl": '{"file_name": "a.png", "text": "one"}\r\n',
        "captions_a.json": json.dumps({
            "images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "one"}]
        }),
        "a.txt": "one\r\n",
    }  # fmt: skip
    (tmp_path / "a.png").touch()
    (tmp_path / name).write_bytes(texts[name].encode("utf-8-sig"))
    assert sd.read_captions(tmp_path) == {tmp_path / "a.png": ["one"]}


def test_folders_that_are_linked_are_read(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.png").touch()
    (tmp_path / "disk" / "a.txt").write_text("one")
    data = tmp_path / "data [1]"  # no pattern
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "disk")
    assert sd.read_captions(data) == {data / "linked" / "a.png": ["one"]}


def test_pictures_of_one_name_in_two_folders_are_two_pictures(tmp_path):
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
        (tmp_path / name / "1.txt").write_text(name)
    assert sd.read_captions(tmp_path) == {tmp_path / name / "1.png": [name] for name in ("red", "blue")}


def test_the_shorter_side_is_resized(tmp_path):
    for size, becomes in {
        (32, 48): (16, 24),
        (50, 33): (24, 16),
        (7, 9): (16, 21),
        (16, 40): (16, 40),
    }.items():
        photograph(1, *size).save(tmp_path / "a.png")
        [(path, picture)] = sd.read_pictures([tmp_path / "a.png"], 16)
        assert path == tmp_path / "a.png" and picture.dtype == torch.uint8
        assert picture.equal(tensor_of(photograph(1, *size).resize(becomes, Image.Resampling.LANCZOS)))


def test_pictures_that_cannot_be_read_are_left_out_and_named(data, config, tmp_path):
    broken = shutil.copytree(data, tmp_path / "data")
    names = ["not there.png", "text.png", "cut off.png", "nor there.png"]
    (broken / "text.png").write_text("no picture")
    (broken / "cut off.png").write_bytes((broken / "red.png").read_bytes()[:200])
    write_captions(broken, {name: ["a name"] for name in names} | CAPTIONS)
    options = ["--config", config, "--steps", 1, "--batch-size", 1, "--out", tmp_path / "a.safetensors"]
    result = run_train(broken, *options)
    assert result.returncode == 0 and result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("sd.py: note: 4 of 8 pictures left out: ") and all(name in line for name in names)


def test_half_the_pictures_may_fail_and_no_more(data):
    good, bad = [data / name for name in CAPTIONS], [data / f"{i}.png" for i in range(5)]
    with pytest.warns(UserWarning, match="4 of 8 pictures left out"):
        assert [path for path, _ in sd.read_pictures(bad[:2] + good + bad[2:4], 16)] == good
    with pytest.raises(ValueError, match="5 of 9 pictures cannot be used"):
        list(sd.read_pictures(good + bad, 16))


def coded(height: int, width: int) -> torch.Tensor:
    """A picture that tells of each of its pixels where it stands."""
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([down, right, torch.full_like(down, 7)]).to(torch.uint8)


def test_a_cut_is_a_square_from_where_it_is_asked():
    picture = coded(20, 50)
    for place, top, left in [
        ((0.5, 0.5), 2, 17),
        ((0, 0), 0, 0),
        ((1, 1), 4, 34),
        ((0.25, 0.5), 1, 17),
        ((1, 0), 4, 0),
    ]:
        assert sd.cut(picture, 16, place).equal(picture[:, top : top + 16, left : left + 16])
    assert sd.cut(picture, 16).equal(picture[:, 2:18, 17:33])


@pytest.fixture(scope="module")
def coded_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    for name, shape in {"wide": (16, 40), "tall": (36, 16)}.items():
        Image.fromarray(coded(*shape).permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    write_captions(folder, {"wide.png": ["wide"], "tall.png": ["tall"]})
    return folder


@pytest.mark.parametrize("flip", [[], ["--flip"]])
def test_the_vae_learns_from_squares_from_everywhere(coded_data, flip):
    objective = sd.Reconstruction(tiny_model(), arguments(coded_data, *flip))
    images, noise = objective.draw(3000, seeded())
    assert images.shape == (3000, 3, 16, 16) and noise.shape == (3000, 4, 8, 8)
    squares = ((images + 1) * 127.5).round().to(torch.uint8)
    assert (squares / 127.5 - 1).equal(images)
    mirrored = squares[:, 1, 0, 0] > squares[:, 1, 0, 15]
    assert abs(mirrored.float().mean() - (0.5 if flip else 0)) < (0.04 if flip else 1e-9)
    squares[mirrored] = squares[mirrored].flip(-1)
    corners = squares[:, :2, 0, 0].long()  # (B, 2)
    wide = squares[:, 1, 0, 0] > 0
    for square, (top, left) in zip(squares, corners.tolist()):
        assert square.equal(coded(40, 50)[:, top : top + 16, left : left + 16])
    tall = corners[:, 0] > 0
    assert not (wide & tall).any()  # a square at the corner may be of either
    assert abs(wide.float().mean() - 0.5) < 0.05 and abs(tall.float().mean() - 0.5) < 0.05
    assert (
        set(corners[wide, 1].tolist()) == set(range(1, 25)) and abs(corners[wide, 1].float().mean() - 12) < 1
    )
    assert (
        set(corners[tall, 0].tolist()) == set(range(1, 21)) and abs(corners[tall, 0].float().mean() - 10) < 1
    )
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(torch.corrcoef(noise.flatten(1)[:, :20].T).fill_diagonal_(0)).max() < 0.1


def test_the_places_of_a_square_do_not_depend_on_each_other(tmp_path):
    Image.fromarray(coded(16, 16).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    write_captions(tmp_path, {"a.png": ["a"]})
    objective = sd.Reconstruction(tiny_model(), arguments(tmp_path, resolution=16))
    objective.pictures = [coded(40, 50)]  # as no picture is that is resized: longer both ways
    images, _ = objective.draw(2000, seeded())
    corners = ((images[:, :2, 0, 0] + 1) * 127.5).T
    assert abs(torch.corrcoef(corners)[0, 1]) < 0.1 and corners.amax(1).round().tolist() == [24, 34]


@pytest.mark.parametrize("flip", [[], ["--flip"]])
def test_the_unet_learns_from_the_middle(coded_data, flip):
    model = tiny_model()
    objective = sd.NoisePrediction(model, arguments(coded_data, *flip))
    wide, tall = coded(16, 40)[:, :, 12:28], coded(36, 16)[:, 10:26]
    versions = [wide, tall] + ([wide.flip(-1), tall.flip(-1)] if flip else [])
    with torch.no_grad():
        moments = torch.cat(model.vae.encode(torch.stack(versions) / 127.5 - 1), dim=1)
    torch.testing.assert_close(torch.stack(objective.moments), moments, rtol=1e-5, atol=1e-5)
    ids = [[model.tokenizer(name)] for name in ("wide", "tall")] * (2 if flip else 1)
    assert [one.tolist() for one in objective.ids] == ids


def test_pictures_are_in_minus_one_to_one(tmp_path):
    Image.fromarray(np.full((16, 16, 3), [0, 255, 51], dtype=np.uint8)).save(tmp_path / "a.png")
    write_captions(tmp_path, {"a.png": ["a"]})
    images, _ = sd.Reconstruction(tiny_model(), arguments(tmp_path)).draw(2, seeded())
    expected = torch.tensor([-1, 1, -0.6]).view(3, 1, 1).expand(2, 3, 16, 16)
    torch.testing.assert_close(images, expected)


# ------------------------------------------------------------------------------------------------- objectives


def noise_prediction(data: Path, *options, seed: int = 0) -> sd.NoisePrediction:
    return sd.NoisePrediction(tiny_model(seed), arguments(data, *options))


@pytest.fixture(scope="module")
def scheduler() -> DDPMScheduler:
    """SD v1's."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
        clip_sample=False,
    )  # fmt: skip


@pytest.fixture
def batch(data) -> tuple[torch.Tensor, ...]:
    """In float64, with the first and the last timestep."""
    latent, noise, t, ids = noise_prediction(data).draw(8, seeded(3))
    t[:2] = torch.tensor([0, 999])
    return latent.double(), noise.double(), t, ids


def test_the_unets_loss_is_the_noise_it_does_not_tell(data, scheduler, batch):
    objective = noise_prediction(data).double()
    levels = objective.alphas_cumprod
    roots = np.linspace(0.00085**0.5, 0.012**0.5, 1000)
    assert levels.numpy() == pytest.approx(np.cumprod(1 - roots**2), rel=1e-7)
    assert levels.numpy() == pytest.approx(scheduler.alphas_cumprod.double().numpy(), rel=1e-5)
    exact = copy.copy(scheduler)
    exact.alphas_cumprod = levels  # diffusers has its schedule in float32 only
    latent, noise, t, ids = batch
    with torch.no_grad():
        model = objective.model
        predicted = model.unet(exact.add_noise(latent, noise, t), t, model.text_encoder(ids))
        expected = ((predicted.float() - noise) ** 2).mean().item()
        assert abs(objective(*batch).item() - expected) < 1e-7
        rounded = model.unet(scheduler.add_noise(latent, noise, t), t, model.text_encoder(ids))
    assert predicted.std() > 0.1 and expected == pytest.approx(
        ((rounded - noise) ** 2).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("gamma", [5, 1, 0.05])
def test_weights_are_those_of_min_snr(data, scheduler, batch, gamma):
    plain, weighted = noise_prediction(data).double(), noise_prediction(data, "--min-snr", gamma).double()
    snr = compute_snr(scheduler, batch[2]).double()
    weights = snr.clamp(max=gamma) / snr
    assert weights.min() < 0.1 and weights.max() == 1
    with torch.no_grad():
        for i, weight in enumerate(weights.tolist()):
            one = [tensor[i : i + 1] for tensor in batch]
            assert (weighted(*one) / plain(*one)).item() == pytest.approx(weight, rel=1e-5)
        every = torch.stack([plain(*(tensor[i : i + 1] for tensor in batch)) for i in range(8)])
        assert weighted(*batch).item() == pytest.approx((every * weights).mean().item(), rel=1e-5)


@pytest.mark.parametrize("share", [0, 0.1, 0.4])
def test_text_is_dropped_as_often_as_asked(data, share):
    objective = noise_prediction(data, "--drop-text", share)
    *_, ids = objective.draw(4000, seeded(1))
    empty = torch.tensor(objective.model.tokenizer(""))
    dropped = (ids == empty).all(dim=1)
    assert (
        ids.shape == (4000, 16)
        and abs(dropped.float().mean() - share) <= 5 * (share * (1 - share) / 4000) ** 0.5
    )
    known = {tuple(objective.model.tokenizer(text)) for texts in CAPTIONS.values() for text in texts}
    assert {tuple(one) for one in ids[~dropped].tolist()} == known


def test_one_of_several_captions_is_drawn(data):
    objective = noise_prediction(data, "--drop-text", 0)
    *_, ids = objective.draw(6000, seeded(2))
    for texts in CAPTIONS.values():
        for text in texts:
            found = (ids == torch.tensor(objective.model.tokenizer(text))).all(dim=1).float().mean()
            assert abs(found - 1 / 4 / len(texts)) < 0.025


def test_timesteps_are_drawn_evenly(data):
    t = noise_prediction(data).draw(20_000, seeded(4))[2]
    counts = torch.bincount(t, minlength=1000).double()
    assert len(counts) == 1000 and t.dtype == torch.int64
    assert abs(counts.view(10, 100).sum(1) - 2000).max() < 200
    assert 800 < ((counts - 20) ** 2 / 20).sum() < 1200  # chi-squared, of 999 degrees of freedom
    assert abs(counts[0] - 20) < 20 and abs(counts[999] - 20) < 20


@pytest.mark.parametrize("flip", [[], ["--flip"]])
def test_latents_are_drawn_from_the_pictures_moments(data, flip):
    """Each from those of the picture that the caption is of, and scaled."""
    objective = noise_prediction(data, "--drop-text", 0, *flip)
    model = objective.model
    assert model.config.latent_scale == 0.18215
    latent, noise, _, ids = objective.draw(16_000, seeded(5))
    assert latent.shape == noise.shape == (16_000, 4, 8, 8)
    latent = latent / 0.18215
    for name, texts in CAPTIONS.items():
        picture = Image.open(data / name)
        picture = picture.resize(
            [round(size * 16 / min(picture.size)) for size in picture.size], Image.LANCZOS
        )
        top, left = (picture.height - 16) // 2, round((picture.width - 16) / 2)
        square = sd.to_tensor(picture.crop((left, top, left + 16, top + 16)))
        with torch.no_grad():
            mean, logvar = model.vae.encode(torch.cat([square, square.flip(-1)] if flip else [square]))
        texts = torch.tensor([model.tokenizer(text) for text in texts])
        mine = latent[(ids[:, None] == texts).all(-1).any(-1)]
        assert abs(len(mine) - 4000) < 300
        error = logvar.exp().mean(0).sqrt() / len(mine) ** 0.5
        assert (abs(mine.mean(0) - mean.mean(0)) / error).max() < 6
        variance = logvar.exp().mean(0) + mean.var(0, unbiased=False)
        assert (mine.var(0) / variance - 1).abs().max() < 0.2
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), latent.flatten()]))[0, 1]) < 0.01
    assert abs(torch.corrcoef(noise.flatten(1)[:, :20].T).fill_diagonal_(0)).max() < 0.05


def test_the_vaes_loss_is_its_formula(data):
    objective = sd.Reconstruction(tiny_model(), arguments(data))
    with torch.no_grad():
        objective.model.vae.quant.weight *= 8  # moments that are far from a standard normal's
    image, noise = objective.draw(4, seeded(6))
    with torch.no_grad():
        mean, logvar = objective.model.vae.encode(image)
        mean, deviation = mean.double(), (logvar.double() / 2).exp()
        result = objective.model.vae.decode((mean + deviation * noise).float())
        posterior, prior = torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
        kl = torch.distributions.kl_divergence(posterior, prior).mean().item()
        error = (result.double() - image).numpy()
        down, right = error[:, :, 1:] - error[:, :, :-1], error[..., 1:] - error[..., :-1]
        edges = abs(down).mean() + abs(right).mean()
        expected = abs(error).mean() + 0.5 * edges + sd.KL_WEIGHT * kl
        assert objective(image, noise).item() == pytest.approx(expected, rel=1e-6)
    assert sd.KL_WEIGHT * kl > 1e-3 and abs(abs(down).mean() - abs(right).mean()) > 1e-3


def test_only_the_part_that_is_trained_gets_gradients(data):
    for objective, trained in [
        (sd.Reconstruction(tiny_model(), arguments(data)), {"vae"}),
        (noise_prediction(data), {"unet"}),
        (noise_prediction(data, "--train-text-encoder"), {"unet", "text_encoder"}),
    ]:
        objective(*objective.draw(2, seeded())).backward()
        parts = {"vae": 0, "unet": 0, "text_encoder": 0}
        for name, weight in objective.model.named_parameters():
            parts[name.split(".")[0]] += 0 if weight.grad is None else weight.grad.abs().sum().item()
        assert {part for part, total in parts.items() if total > 0} == trained
        wanted = {name.split(".")[0] for name, w in objective.model.named_parameters() if w.requires_grad}
        assert wanted == trained


def test_latent_scale_brings_the_latents_to_unit_deviation(vae, data):
    model = sd.StableDiffusion.load(vae)
    place, squares = random.Random(7), []
    for name in CAPTIONS:
        picture = Image.open(data / name)
        size = [round(length * 16 / min(picture.size)) for length in picture.size]
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        for _ in range(50):
            left, top = (place.randint(0, length - 16) for length in size)
            square = sd.to_tensor(picture.crop((left, top, left + 16, top + 16)))
            squares.append(square.flip(-1) if place.random() < 0.5 else square)
    with torch.no_grad():
        latents = model.encode(torch.cat(squares), torch.randn(200, 4, 8, 8, generator=seeded(8)))
    assert latents.std().item() == pytest.approx(1, abs=0.04)
    assert abs(model.config.latent_scale - 0.18215) > 0.05


@pytest.mark.parametrize("flip", [[], ["--flip"]])
def test_latent_scale_is_measured_on_samples(data, flip):
    """Which the noise is a large part of in a VAE that has not learnt; and on the same ones at each save."""
    objective = sd.Reconstruction(tiny_model(), arguments(data, *flip))
    objective.finish()
    first = objective.model.config.latent_scale
    images, noise = objective.draw(500, seeded(9))
    with torch.no_grad():
        sampled, mean = objective.model.encode(images, noise), objective.model.encode(images)
    assert sampled.std().item() == pytest.approx(1, abs=0.05) and mean.std() < 0.7
    objective.finish()
    assert objective.model.config.latent_scale == first


# ----------------------------------------------------------------------------------------------- optimisation


def test_a_new_denoiser_predicts_nothing():
    model = sd.new_model(sd.Config.from_json(json.dumps(TINY)), 0)
    context = model.text_encoder(torch.tensor([model.tokenizer("a red thing")]))
    predicted = model.unet(torch.randn(1, 4, 8, 8), torch.tensor([500]), context)
    assert predicted.abs().max() == 0


def test_branches_of_a_new_denoiser_add_nothing():
    """Their last layers have weights of zero, and all else is random and follows from the seed."""
    first, again, other = (sd.new_model(sd.Config.from_json(json.dumps(TINY)), seed) for seed in (1, 1, 2))
    for (name, weight), same, another in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert weight.equal(same), name
        last = name.startswith("unet.") and name.split(".")[-2] in ("conv2", "proj_out", "conv_out")
        if name.endswith("weight") and weight.ndim > 1:
            assert (weight.abs().max() == 0) == last and weight.equal(another) == last, name


def kinds(model: nn.Module) -> dict[str, bool]:
    """The name of each parameter and whether it should decay: weights of linear and convolutional layers."""
    return {
        f"{owner}.{kind}": kind == "weight" and isinstance(module, nn.Linear | nn.Conv2d)
        for owner, module in model.named_modules()
        for kind, _ in module.named_parameters(recurse=False)
    }


class Recorded:
    """An objective that keeps what a training starts from and each batch of two that it draws."""

    before, batches = None, []

    def __init__(self, model, args):
        super().__init__(model, args)
        Recorded.before, Recorded.batches = copy.deepcopy(model), []

    def draw(self, count, generator):
        drawn = super().draw(count, generator)
        Recorded.batches += [drawn] * (count == 2)
        return drawn


OPTIMISER = {"lr": 0.02, "warmup": 4, "steps": 9, "weight_decay": 0.7, "clip": 0.05, "ema": 0.45}


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_training_follows_the_formulas(part, data, config, tmp_path, monkeypatch):
    """Nine steps of three batches, against AdamW (Loshchilov and Hutter 2017, alg. 2) written out."""
    plain = sd.OBJECTIVES[part]
    monkeypatch.setitem(sd.OBJECTIVES, part, type("Recorded", (Recorded, plain), {}))
    o = argparse.Namespace(**OPTIMISER)
    options = [word for name, value in OPTIMISER.items() for word in (f"--{name.replace('_', '-')}", value)]
    more = ["--min-snr", 5, "--train-text-encoder"] if part == "unet" else []
    out = tmp_path / "a.safetensors"
    train_here(
        data, "--part", part, "--config", config, "--out", out, *options, "--accumulate", 3,
        "--batch-size", 2, "--seed", 5, *more,
    )  # fmt: skip

    batches, model = Recorded.batches, Recorded.before
    assert len({drawn[1].numpy().tobytes() for drawn in batches}) == len(batches) == 27  # no two alike
    objective = plain(model, arguments(data, *more))
    decays = kinds(model)
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    start = {name: weight.detach().clone() for name, weight in named.items()}
    average = {name: weight.detach().clone() for name, weight in named.items()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in named.items()} for _ in range(2))
    losses = []
    for step in range(9):
        loss = sum(objective(*drawn) for drawn in batches[3 * step : 3 * step + 3]) / 3
        gradients = dict(zip(named, torch.autograd.grad(loss, named.values())))
        losses.append(loss.item())
        norm = sum((gradient**2).sum() for gradient in gradients.values()).sqrt()
        assert norm > 2 * o.clip
        lr = o.lr * ((step + 1) / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 5)) / 2)
        kept = min(o.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, weight in named.items():
                gradient = gradients[name] * o.clip / norm
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                weight *= 1 - lr * o.weight_decay * decays[name]
                slope = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                weight -= lr * first[name] / (1 - 0.9 ** (step + 1)) / slope
                average[name] = kept * average[name] + (1 - kept) * weight

    assert losses_of(out.with_suffix(".loss.csv")) == pytest.approx(losses, rel=1e-4)
    saved = sd.StableDiffusion.load(out).state_dict()
    state = torch.load(out.with_suffix(".state"), weights_only=True)
    assert len(state["weights"]) == len(named)
    for (name, weight), own in zip(named.items(), state["weights"]):
        for theirs, ours in ((average[name], saved[name]), (weight.detach(), own.detach())):
            change = (theirs - start[name]).norm()
            assert (ours - theirs).norm() <= 2e-3 * change + 1e-7, name
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in named}
    assert others and all(saved[name].equal(tensor) for name, tensor in others.items())
    if part == "unet":
        unused = "text_encoder.token_embedding.weight"
        rows = first[unused].abs().amax(1) == 0
        assert rows.sum() > 500 and saved[unused][rows].equal(start[unused][rows])


def test_weights_decay_in_layers_only(data):
    for objective in (
        noise_prediction(data, "--train-text-encoder", "--weight-decay", 0.3),
        sd.Reconstruction(tiny_model(), arguments(data, "--weight-decay", 0.3)),
    ):
        trainer = sd.Trainer(objective, objective.args)
        names = {id(weight): name for name, weight in objective.model.named_parameters()}
        decay = {
            names[id(w)]: group["weight_decay"]
            for group in trainer.optimizer.param_groups
            for w in group["params"]
        }
        wanted = {
            name: 0.3 if decays else 0.0 for name, decays in kinds(objective.model).items() if name in decay
        }
        assert decay == wanted and set(decay.values()) == {0.0, 0.3}
        assert len(decay) == sum(weight.requires_grad for weight in objective.parameters())


def test_without_an_average_the_weights_themselves_are_saved(data, vae, tmp_path):
    out = tmp_path / "a.safetensors"
    train_here(data, "--init", vae, "--steps", 3, "--batch-size", 2, "--out", out, "--ema", 0, "--warmup", 0)
    saved = sd.StableDiffusion.load(out).unet.state_dict()
    state = torch.load(out.with_suffix(".state"), weights_only=True)
    assert len(saved) == len(state["weights"])
    assert all(weight.equal(tensor) for weight, tensor in zip(state["weights"], saved.values(), strict=True))


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_bf16_runs(part, data, config, tmp_path):
    losses = {}
    for dtype in ("fp32", "bf16"):
        out = tmp_path / f"{dtype}.safetensors"
        # The UNet's last layer starts at zero: after smaller steps both dtypes can round to the same losses.
        options = ["--part", part, "--config", config, "--steps", 4, "--batch-size", 4, "--lr", 1e-3]
        train_here(data, *options, "--warmup", 0, "--dtype", dtype, "--out", out)
        losses[dtype] = losses_of(out.with_suffix(".loss.csv"))
        assert {tensor.dtype for tensor in sd.StableDiffusion.load(out).state_dict().values()} == {
            torch.float32
        }
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02) and losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("part, share", [("vae", 0.6), ("unet", 0.5)])
def test_the_loss_falls(part, share, request):
    losses = losses_of(request.getfixturevalue(part).with_suffix(".loss.csv"))
    assert np.mean(losses[-20:]) < share * np.mean(losses[:3])


def test_without_a_compiler_nothing_is_compiled(data, config, tmp_path, monkeypatch):
    """Which shows, without the minute that it takes, that it would be."""
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing is compiled already
    out = tmp_path / "a.safetensors"
    result = run_train(data, "--config", config, "--out", out, "--steps", 1, "--batch-size", 1, "--compile")
    assert re.fullmatch(r"cannot compile: .*/nonexistent.*; leave out --compile", error_of(result))
    assert not out.exists()


@pytest.mark.long
def test_compiled_training_is_the_same(data, config, tmp_path):
    losses = []
    for more in ([], ["--compile"]):
        out = tmp_path / f"{len(more)}.safetensors"
        result = run_train(data, "--config", config, "--steps", 5, "--batch-size", 4, "--out", out, *more)
        assert result.returncode == 0, result.stderr
        losses.append(losses_of(out.with_suffix(".loss.csv")))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ------------------------------------------------------------------------------------------------ fine-tuning


@pytest.mark.parametrize("kind, more", [(".safetensors", []), (".ckpt", ["--train-text-encoder"])])
def test_fine_tuning_changes_the_unet_and_what_is_asked(small, data, tmp_path, kind, more):
    init, out = tmp_path / f"init{kind}", tmp_path / "out" / "tuned.safetensors"
    make_checkpoint.write(init, small=True)
    out.parent.mkdir()
    content = init.read_bytes()
    options = ["--init", init, "--resolution", 64, "--steps", 2, "--batch-size", 1, "--warmup", 0, *more]
    result = run_train(data, *options, "--out", out)
    assert result.returncode == 0, result.stderr
    assert init.read_bytes() == content
    before, after = sd.StableDiffusion.load(small), sd.StableDiffusion.load(out)
    assert after.config == before.config
    same = {}
    for part in ("vae", "text_encoder", "unet"):
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        same[part] = all(tensor.equal(new) for tensor, new in pairs)
    assert same == {"vae": True, "text_encoder": not more, "unet": False}
    changed = [
        not tensor.equal(new) for tensor, new in zip(before.unet.parameters(), after.unet.parameters())
    ]
    assert all(changed)
    for model in (before, after):
        [picture] = model.generate("a red thing", steps=1, width=64, height=64, seed=1, progress=False)
        assert picture.size == (64, 64) and pixels(picture).std() > 5


# ------------------------------------------------------------------------------------------------- to look at


def test_a_sheet_has_its_pictures_in_rows():
    pictures = [photograph(i, 16, 24) for i in range(11)]
    grid = pixels(sd.sheet(pictures))
    assert grid.shape == (48, 128, 3)
    for i, picture in enumerate(pictures):
        top, left = i // 8 * 24, i % 8 * 16
        assert (grid[top : top + 24, left : left + 16] == pixels(picture)).all()
    assert (grid[24:, 48:] == 255).all()
    assert sd.sheet(pictures[:6], columns=2).size == (32, 72)


def tiles(file: Path, count: int, side: int = 16) -> list[Image.Image]:
    grid = Image.open(file)
    places = [(i % 8 * side, i // 8 * side) for i in range(count)]
    return [grid.crop((left, top, left + side, top + side)) for left, top in places]


def test_the_unets_sheets_show_the_prompts_by_the_average_weights(unet):
    """At the last step these are the weights that are saved."""
    assert Image.open(unet.with_suffix(".50.png")).size == (128, 16)
    assert pixels(unet.with_suffix(".50.png")).tolist() != pixels(unet.with_suffix(".100.png")).tolist()
    model = sd.StableDiffusion.load(unet)
    drawn = tiles(unet.with_suffix(".100.png"), 3)
    for prompt, tile in zip(PROMPTS, drawn):
        [picture] = model.generate(prompt, steps=20, sampler="dpm++", seed=0, progress=False)
        assert abs(pixels(picture) - pixels(tile)).max() <= 1
    assert (pixels(unet.with_suffix(".100.png"))[:, 48:] == 255).all()
    assert abs(pixels(drawn[0]) - pixels(drawn[1])).max() > 1  # the text has its say


def test_the_vaes_sheets_show_pictures_before_what_becomes_of_them(vae):
    assert Image.open(vae.with_suffix(".50.png")).size == (128, 64)
    model = sd.StableDiffusion.load(vae)
    drawn = tiles(vae.with_suffix(".100.png"), 32)
    for before, after in zip(drawn[::2], drawn[1::2]):
        with torch.no_grad():
            [picture] = sd.to_pictures(model.decode(model.encode(sd.to_tensor(before))))
        assert abs(pixels(picture) - pixels(after)).max() <= 1
    changes = [abs(pixels(one) - pixels(other)).mean() for one, other in zip(drawn[::2], drawn[1::2])]
    assert 0 < np.mean(changes) < 50


def test_captions_are_the_prompts_where_none_are_given(data, vae, tmp_path):
    wide = write_data(tmp_path / "many", {f"{i}.png": [f"{i}, one", f"{i}, two"] for i in range(9)})
    objective = sd.NoisePrediction(sd.StableDiffusion.load(vae), arguments(wide))
    assert objective.prompts == [f"{i}, {word}" for i in range(8) for word in ("one", "two")]
    assert len(objective.samples()) == 16


def test_every_step_has_a_row_and_the_losses_are_drawn(vae, unet):
    for out in (vae, unet):
        losses = losses_of(out.with_suffix(".loss.csv"))
        assert len(losses) == 100 and all(map(math.isfinite, losses)) and len(set(losses)) > 90
        picture = Image.open(out.with_suffix(".loss.png"))
        assert picture.format == "PNG" and picture.size == (800, 400)
        assert (pixels(out.with_suffix(".loss.png")) == pixels(sd.draw_curve(torch.tensor(losses)))).all()


def curve(losses: torch.Tensor) -> np.ndarray:
    """How far down the line is in each column of the picture, below what is written; NaN where it is not."""
    blue = (pixels(sd.draw_curve(losses)) == [0, 0, 128]).all(-1)
    rows = np.where(blue, np.arange(400)[:, None], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(rows, axis=0)


def test_the_curve_is_logarithmic_and_of_medians():
    exponential = curve(torch.logspace(0, -3, 8000))
    assert np.isfinite(exponential[:795]).all()
    assert exponential[:795] == pytest.approx(np.linspace(0, 399, 800)[:795], abs=2)
    spikes = torch.logspace(0, -3, 8000)
    spikes[::10] = 1e6  # one in each column
    spikes[3::10] = math.nan
    assert np.nanmax(abs(curve(spikes) - exponential)) < 3


@pytest.mark.parametrize(
    "losses",
    [
        [1.0],
        [0.5, 0.5],
        [math.nan, math.nan],
        [1.0, math.nan, 0.5],
        [0.0, 1.0],
        [1.0, math.inf, 0.5],
        [3e38, 1.0],
    ],
    ids=str,
)
def test_a_curve_of_any_losses_is_drawn(losses):
    assert sd.draw_curve(torch.tensor(losses)).size == (800, 400)


# ----------------------------------------------------------------------------------------------- nothing lost


def wait_for_row(process: subprocess.Popen, out: Path, step: int) -> None:
    """Until the losses have a row for `step`: they are saved after the state."""
    file = out.with_suffix(".loss.csv")
    while process.poll() is None and not (file.is_file() and len(file.read_text().splitlines()) > step):
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_training_that_was_killed_goes_on_as_if_it_had_not_been(part, request, tmp_path):
    whole, options = request.getfixturevalue(part), request.getfixturevalue(f"{part}_options")
    out = tmp_path / "parts" / "parts.safetensors"
    out.parent.mkdir()
    process = start(ROOT / "sd.py", "train", *options, "--out", out)
    with process:
        wait_for_row(process, out, 60)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    left = len(losses_of(out.with_suffix(".loss.csv")))
    assert left in (60, 80) and sd.StableDiffusion.load(out)
    for unfinished in out.parent.glob(".*.part"):  # of a save that it was killed in
        unfinished.unlink()
    result = run_train(*options, "--out", out, "--resume")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    ours, theirs = made(out), made(whole)
    assert [kind for kind in theirs if ours[kind] != theirs[kind]] == []


@pytest.mark.parametrize("number, part", [(signal.SIGINT, "unet"), (signal.SIGTERM, "vae")])
def test_a_training_that_is_asked_to_stop_saves_its_step(number, part, request, tmp_path):
    whole, options = request.getfixturevalue(part), request.getfixturevalue(f"{part}_options")
    out = tmp_path / "parts" / "parts.safetensors"
    out.parent.mkdir()
    process = start(ROOT / "sd.py", "train", *options, "--out", out)
    wait_for_row(process, out, 20)
    process.send_signal(number)
    result = finish(process)
    assert result.returncode == 128 + number and result.stdout == ""
    step = int(re.fullmatch(r"sd\.py: stopped after step (\d+);.* --resume\n", result.stderr)[1])
    assert 20 <= step < 100
    losses = losses_of(out.with_suffix(".loss.csv"))
    assert losses == losses_of(whole.with_suffix(".loss.csv"))[:step]
    kinds = {file.name.removeprefix("parts") for file in out.parent.iterdir()}
    assert {".safetensors", ".state", ".loss.csv", ".loss.png"} <= kinds <= set(LEFT_BEHIND)
    result = run_train(*options, "--out", out, "--resume")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    ours, theirs = made(out), made(whole)
    assert [kind for kind in theirs if ours[kind] != theirs[kind]] == []


def test_a_progress_bar_on_a_terminal(data, vae, tmp_path):
    """With loss, learning rate and pictures per second."""
    ours, its = terminal()
    options = [data, "--init", vae, "--out", tmp_path / "a.safetensors", "--steps", 8, "--batch-size", 2]
    process = start(ROOT / "sd.py", "train", *options, "--lr", 0.5, "--warmup", 2, stderr=its)
    os.close(its)
    text = read_until(ours, b"").decode()
    os.close(ours)
    assert finish(process).returncode == 0
    assert re.search(r"100%\|.*16/16 \[.* pictures/s, loss=[\d.]+, lr=0\.033\d+\]\r\n$", text), text


def test_what_becomes_of_the_file_it_began_with_does_not_matter(data, vae, tmp_path, monkeypatch):
    init = shutil.copy(vae, tmp_path / "init.safetensors")

    class Overwriting(sd.NoisePrediction):
        def draw(self, count, generator):
            with open(init, "r+b") as file:
                file.write(bytes(init.stat().st_size))
            return super().draw(count, generator)

    monkeypatch.setitem(sd.OBJECTIVES, "unet", Overwriting)
    out = tmp_path / "a.safetensors"
    train_here(data, "--init", init, "--out", out, "--batch-size", 1, "--steps", 1)
    before, after = (sd.StableDiffusion.load(path).vae.state_dict() for path in (vae, out))
    assert all(after[name].equal(weight) for name, weight in before.items())


@pytest.mark.parametrize("in_batch", [1, 2])
def test_a_signal_inside_a_step_ends_with_that_step(in_batch, data, vae, tmp_path, monkeypatch):
    class Signalled(sd.NoisePrediction):
        def draw(self, count, generator):
            self.batches = getattr(self, "batches", 0) + 1
            if self.batches == 2 * 3 + in_batch:  # of step 4
                os.kill(os.getpid(), signal.SIGTERM)
            return super().draw(count, generator)

    monkeypatch.setitem(sd.OBJECTIVES, "unet", Signalled)
    out = tmp_path / "a.safetensors"
    options = [data, "--init", vae, "--out", out, "--batch-size", 1, "--accumulate", 2, "--steps", 9]
    train_here(*options, status=128 + signal.SIGTERM)
    assert len(losses_of(out.with_suffix(".loss.csv"))) == 4


@pytest.mark.parametrize("killed_before_the_model", [False, True])
def test_a_training_that_is_done_is_left_alone(killed_before_the_model, unet, unet_options, tmp_path):
    folder = shutil.copytree(unet.parent, tmp_path / "done")
    if killed_before_the_model:
        (folder / unet.name).unlink()
    train_here(*unet_options, "--out", folder / unet.name, "--resume")
    assert everything(folder) == everything(unet.parent)


def test_a_training_goes_on_from_what_it_made_whatever_it_began_with(unet, unet_options, data, tmp_path):
    """Without --init, with another, and with a state that another kind of device laid out in its own way."""
    shutil.copytree(unet.parent, tmp_path / "same")
    other = shutil.copytree(unet.parent, tmp_path / "other")
    state = torch.load(other / "unet.state", weights_only=True)
    for moments in state["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[name].ndim == 4:
                moments[name] = moments[name].to(memory_format=torch.channels_last)
    torch.save(state, other / "unet.state")
    begin = unet_options.index("--init")
    for name, init in {"same": unet_options[begin : begin + 2], "other": []}.items():
        options = unet_options[:begin] + init + unet_options[begin + 2 :]
        train_here(*options, "--out", tmp_path / name / unet.name, "--resume", "--steps", 103)
    same, other = (made(tmp_path / name / unet.name) for name in ("same", "other"))
    assert [kind for kind in same if same[kind] != other[kind]] == []


def test_a_full_disk_leaves_what_was_saved(unet, unet_options, tmp_path):
    """Stood in for by a limit on the size of a file that the model is under and its state over."""
    room = unet.stat().st_size
    assert room < unet.with_suffix(".state").stat().st_size
    folder = shutil.copytree(unet.parent, tmp_path / "saved")
    result = run_train(
        *unet_options,
        "--out",
        folder / unet.name,
        "--resume",
        "--steps",
        101,
        "--sample-every",
        0,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert re.search(r"unet\.safetensors cannot be saved: .*; make room", error_of(result))
    assert everything(folder) == everything(unet.parent)  # the state goes first, the model only after it


def test_a_training_of_one_part_goes_on_from_its_own_state_only(
    vae, vae_options, unet, unet_options, tmp_path
):
    for ours, options, theirs in ((vae, vae_options, unet), (unet, unet_options, vae)):
        folder = shutil.copytree(ours.parent, tmp_path / ours.stem)
        shutil.copy(theirs.with_suffix(".state"), (folder / ours.name).with_suffix(".state"))
        before = everything(folder)
        result = run_forked(*options, "--out", folder / ours.name, "--resume", cwd=tmp_path)
        assert "state" in (error_of(result) or ""), result.stderr[-500:]
        assert everything(folder) == before


@pytest.mark.parametrize("damage", ["cut off", "empty", "something else"])
def test_a_damaged_state_is_told(unet, unet_options, tmp_path, damage):
    folder = shutil.copytree(unet.parent, tmp_path / "damaged")
    state = folder / "unet.state"
    content = state.read_bytes()
    contents = {"cut off": content[: len(content) // 2], "empty": b"", "something else": b"step,loss\n" * 100}
    state.write_bytes(contents[damage])
    before = everything(folder)
    result = run_forked(*unet_options, "--out", folder / unet.name, "--resume", cwd=tmp_path)
    assert "unet.state" in (error_of(result) or ""), result.stderr[-500:]
    assert everything(folder) == before


def give_gradients(trainer: sd.Trainer, seed: int, bad: float = 0.0) -> None:
    for weight in trainer.weights:
        weight.grad = torch.randn(weight.shape, generator=seeded(seed))
    trainer.weights[3].grad.view(-1)[1] += bad


def snapshot(trainer: sd.Trainer) -> list[torch.Tensor]:
    """Weights, average and all that the optimizer keeps."""
    states = trainer.optimizer.state_dict()
    kept = [torch.as_tensor(value) for state in states["state"].values() for value in state.values()]
    rates = [torch.tensor([group["lr"], group["weight_decay"]]) for group in states["param_groups"]]
    return [tensor.detach().clone() for tensor in [*trainer.weights, *trainer.average, *kept, *rates]]


@pytest.fixture
def trainer(data) -> sd.Trainer:
    objective = noise_prediction(data, "--steps", 100)
    trainer = sd.Trainer(objective, objective.args)
    give_gradients(trainer, 0)
    trainer.update(1.0)
    return trainer


@pytest.mark.parametrize("loss, bad", [(math.nan, 0), (math.inf, 0), (1.0, math.nan), (1.0, math.inf)])
def test_a_step_that_is_not_finite_changes_nothing(trainer, loss, bad):
    before = snapshot(trainer)
    assert len(before) == 2 * len(trainer.weights) + 3 * len(trainer.weights) + 2
    give_gradients(trainer, 1, bad)
    with pytest.warns(UserWarning, match="step 2 left out"):
        trainer.update(loss)
    after = snapshot(trainer)
    assert all(one.equal(other) for one, other in zip(before, after, strict=True))
    assert len(trainer.losses) == 2 and not math.isfinite(trainer.losses[1])
    assert all(weight.grad is None or not weight.grad.any() for weight in trainer.weights)
    give_gradients(trainer, 2)
    trainer.update(1.0)
    changed = [not one.equal(other) for one, other in zip(before, snapshot(trainer))]
    assert all(changed[: 2 * len(trainer.weights)])
    assert all(weight.isfinite().all() for weight in trainer.weights) and trainer.losses[2] == 1.0


def test_the_average_is_short_at_first(data):
    """It keeps (1 + step) / (10 + step) of what it was until that is more than --ema."""
    objective = noise_prediction(data, "--ema", 0.5, "--lr", 0.01, "--warmup", 0)
    trainer = sd.Trainer(objective, objective.args)
    assert all(average.equal(weight) for average, weight in zip(trainer.average, trainer.weights))
    for step in range(20):
        before = [average.clone() for average in trainer.average]
        give_gradients(trainer, step)
        trainer.update(1.0)
        kept = min(0.5, (1 + step) / (10 + step))
        for average, old, weight in zip(trainer.average, before, trainer.weights, strict=True):
            torch.testing.assert_close(
                average, kept * old + (1 - kept) * weight.detach(), rtol=1e-5, atol=1e-6
            )


def test_ten_steps_in_a_row_that_are_not_finite_are_enough(trainer):
    for _ in range(2):
        for i in range(9):
            give_gradients(trainer, i)
            with pytest.warns(UserWarning, match="left out"):
                trainer.update(math.nan)
        give_gradients(trainer, 20)
        trainer.update(1.0)
    for i in range(10):
        give_gradients(trainer, i, math.inf)
        with (
            pytest.warns(UserWarning, match="left out") if i < 9 else pytest.raises(ValueError, match="--lr")
        ):
            trainer.update(1.0)


def test_ten_steps_from_the_first_are_enough(data):
    objective = noise_prediction(data)
    trainer = sd.Trainer(objective, objective.args)
    for i in range(10):
        give_gradients(trainer, i)
        with (
            pytest.warns(UserWarning, match="left out")
            if i < 9
            else pytest.raises(ValueError, match="10 steps")
        ):
            trainer.update(math.nan)


def test_a_training_that_explodes_stops_with_advice(data, config, tmp_path):
    result = run_train(
        data, "--config", config, "--out", tmp_path / "a.safetensors", "--lr", 1e30, "--batch-size", 2
    )
    assert result.returncode == 2 and result.stdout == "" and list(tmp_path.iterdir()) == []
    *notes, last = result.stderr.splitlines()
    assert re.fullmatch(r"sd\.py: error: 10 steps in a row .*lower --lr.*", last)
    steps = [
        int(re.fullmatch(r"sd\.py: note: step (\d+) left out: .*not finite.*", note)[1]) for note in notes
    ]
    assert len(steps) >= 9 and steps[-9:] == list(range(steps[-9], steps[-9] + 9))


# ------------------------------------------------------------------------------------------ several processes


TOGETHER = ["--steps", 20, "--lr", 1e-2, "--warmup", 5, "--sample-every", 10, "--save-every", 10]


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_two_processes_train_as_one_does(part, data, vae, tmp_path):
    """Rank 1 has an --out of its own, to which nothing is to be written."""
    options = [data, "--part", part, "--init", vae, "--flip", *TOGETHER, "--accumulate", 2]
    for name in ("one", "two0", "two1"):
        (tmp_path / name).mkdir()
    train_here(*options, "--batch-size", 4, "--out", tmp_path / "one" / "a.safetensors")
    script = f'exec "$0" {ROOT / "sd.py"} train "$@" --out {tmp_path}/two$RANK/a.safetensors'
    result = run_torchrun("--no-python", "bash", "-c", script, sys.executable, *options, "--batch-size", 2)
    assert result.returncode == 0, result.stderr
    assert "sd.py" not in result.stderr and result.stdout == ""
    names = ["a.10.png", "a.20.png", "a.loss.csv", "a.loss.png", "a.safetensors", "a.state"]
    assert sorted(everything(tmp_path / "two0")) == sorted(everything(tmp_path / "one")) == names
    assert everything(tmp_path / "two1") == {}
    one, two = (losses_of(tmp_path / folder / "a.loss.csv") for folder in ("one", "two0"))
    assert len(one) == 20 and two == pytest.approx(one, abs=1e-4)
    ours, theirs = (
        sd.StableDiffusion.load(tmp_path / f / "a.safetensors").state_dict() for f in ("one", "two0")
    )
    # So small where the gradient is zero but for rounding, which Adam makes a step of.
    far = {name: (ours[name] - tensor).norm() / tensor.norm().clamp(min=1) for name, tensor in theirs.items()}
    assert max(far.values()) < 0.02


def test_two_processes_started_as_the_manual_says(data, vae, tmp_path):
    """And stopped, as torchrun passes it on, by one SIGTERM; one set of files is left."""
    out = tmp_path / "a.safetensors"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "sd.py", "train"]
    process = start(*command, data, "--init", vae, "--batch-size", 1, "--save-every", 5, "--out", out)
    wait_for_row(process, out, 5)
    process.terminate()
    result = finish(process)
    assert result.returncode != 0
    told = re.findall(r"^sd\.py: stopped after step (\d+);.* --resume$", result.stderr, re.MULTILINE)
    assert len(told) == 1 and len(losses_of(out.with_suffix(".loss.csv"))) == int(told[0])
    assert sorted(everything(tmp_path)) == ["a.loss.csv", "a.loss.png", "a.safetensors", "a.state"]
    assert sd.StableDiffusion.load(out)
    more = ["--init", vae, "--batch-size", 1, "--steps", int(told[0]) + 2, "--out", out, "--resume"]
    result = run_torchrun(ROOT / "sd.py", "train", data, *more)
    assert result.returncode == 0, result.stderr
    assert len(losses_of(out.with_suffix(".loss.csv"))) == int(told[0]) + 2


def test_two_processes_draw_as_one_does(unet, tmp_path):
    drawing = [ROOT / "sd.py", "--prompt", "a red thing", "--weights", unet, "--steps", 3, "--n", 3]
    folders = {name: tmp_path / name for name in ("one", "two", "random", "again")}
    for folder in folders.values():
        folder.mkdir()
    assert run(*drawing, "--seed", 7, cwd=folders["one"]).returncode == 0
    result = run_torchrun("--", *drawing, "--seed", 7, cwd=folders["two"])
    assert result.returncode == 0, result.stderr
    assert sorted(re.findall(r"out(?:-\d)?\.png", result.stdout)) == ["out-1.png", "out-2.png", "out.png"]
    assert len(re.findall("^sd.py: .* seed 7$", result.stderr, re.MULTILINE)) == 1
    assert everything(folders["two"]) == everything(folders["one"]) and len(everything(folders["one"])) == 3

    result = run_torchrun("--", *drawing, cwd=folders["random"])
    assert result.returncode == 0, result.stderr
    [seed] = re.findall(r"^sd.py: .* seed (\d+)$", result.stderr, re.MULTILINE)
    for i, name in enumerate(("out.png", "out-1.png", "out-2.png")):
        assert f"Seed: {int(seed) + i}, " in Image.open(folders["random"] / name).info["parameters"]
    assert run(*drawing, "--seed", seed, cwd=folders["again"]).returncode == 0
    assert everything(folders["random"]) == everything(folders["again"])


# --------------------------------------------------------------------------------------------------- mistakes


def test_help_fits_eighty_columns_and_has_the_defaults(tmp_path):
    result = run_forked("--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 80
    entries = dict(re.findall(r"^  (?:-h, )?--([\w-]+)((?:.*\n)(?:    .*\n)*)", result.stdout, re.MULTILINE))
    defaults = vars(sd.parse_train(["data", "--out", "a.safetensors"]))
    assert entries.keys() == {name.replace("_", "-") for name in defaults} - {"data"} | {"help"}
    for name, value in defaults.items():
        if isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value):
            shown = re.findall(r"[\d.e-]*\d", entries[name.replace("_", "-")].split("(")[-1])
            assert float(shown[0]) == value, name


BAD_OPTIONS = [
    (["--steps", 0], "steps is 0"), (["--steps", -1], "steps is -1"), (["--steps", "abc"], "--steps"),
    (["--batch-size", 0], "batch-size is 0"), (["--batch-size", "1.5"], "--batch-size"),
    (["--accumulate", 0], "accumulate is 0"), (["--save-every", 0], "save-every is 0"),
    (["--sample-every", -1], "sample-every is -1"), (["--warmup", -1], "warmup is -1"),
    (["--lr", 0], "lr is 0"), (["--lr", -1], "lr is -1"), (["--lr", "nan"], "lr is nan"),
    (["--lr", "inf"], "lr is inf"),
    (["--clip", 0], "clip is 0"), (["--clip", "nan"], "clip is nan"),
    (["--min-snr", 0], "min-snr is 0"), (["--min-snr", "nan"], "min-snr is nan"),
    (["--ema", -0.1], "ema is -0.1"), (["--ema", 1], "ema is 1"), (["--ema", "nan"], "ema is nan"),
    (["--drop-text", -0.1], "drop-text is -0.1"), (["--drop-text", 1], "drop-text is 1"),
    (["--drop-text", "nan"], "drop-text is nan"),
    (["--weight-decay", -1], "weight-decay is -1"), (["--weight-decay", "nan"], "weight-decay is nan"),
    (["--resolution", 15], "resolution is 15"), (["--resolution", -16], "resolution is -16"),
    (["--resolution", 0], "resolution is 0"),
    (["--config", json.dumps(TINY | {"vae_widths": [8, 8, 8, 8]}), "--resolution", 20], "multiple of 8"),
    (["--seed", -1, "--sample-every", 0], "seed is -1"), (["--seed", 2**64], "seed is"),
    (["--seed", "1.5"], "--seed"),
    (["--dtype", "fp16"], "--dtype"), (["--part", "text"], "vae"), (["--device", "nonsense"], "nonsense"),
    (["--frobnicate"], "--frobnicate"), (["--step", 3], "--step"), (["more"], "more"),
    (["--init", "missing.ckpt"], "missing.ckpt"), (["--init", "text.json"], "text.json"),
    (["--config", "{no JSON"], "config"), (["--config", ""], "config"), (["--config", "5"], "config"),
    (["--config", "[1]"], "config"), (["--config", "missing.json"], "missing.json"),
    (["--config", "text.json"], "text.json"),
    (["--config", '{"no_such_field": 1}'], "no_such_field"),
    (["--config", json.dumps(TINY | {"unet_heads": 3})], "heads"),
    (["--config", json.dumps(TINY | {"norm_groups": 3})], "config"),
    (["--config", json.dumps(TINY | {"vae_widths": "abc"})], "config"),
    (["--config", json.dumps(TINY | {"vae_widths": []})], "config"),
    (["--config", json.dumps(TINY | {"unet_blocks": "1"})], "config"),
    (["--config", json.dumps(TINY | {"vocab_size": 10})], "vocab_size"),
    (["--prompts", "missing.txt"], "missing.txt"), (["--prompts", "empty.txt"], "empty.txt"),
    (["--prompts", "latin-1.txt"], "latin-1.txt"),
    (["--out", "a.ckpt"], "a.ckpt"), (["--out", "a"], "out is a "), (["--out", "."], "out is ."),
    (["--out", "missing/a.safetensors"], "missing/a.safetensors"),
    (["--out", "text.json/a.safetensors"], "out is text.json/a.safetensors"),
    (["--out", "there.safetensors"], "--resume"), (["--out", "folder.safetensors"], "--resume"),
    (["--resume"], "new.state"), (["--out", "there.safetensors", "--resume"], "there.safetensors"),
    (["--batch-size", 10**13], "out of memory; try a smaller --batch-size"),
]  # fmt: skip


@pytest.mark.parametrize("options, says", BAD_OPTIONS, ids=lambda value: str(value)[:60])
def test_options_that_cannot_be_used(options, says, data, config, tmp_path):
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin-1.txt").write_bytes(b"s\xfc\xdf\n")
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    (tmp_path / "folder.safetensors").mkdir()
    before, paths = everything(tmp_path), sorted(tmp_path.rglob("*"))
    usual = [
        "--config",
        config,
        "--out",
        "new.safetensors",
        "--steps",
        2,
        "--batch-size",
        1,
        "--sample-every",
        2,
    ]
    result = run_forked(data, *usual, *options, cwd=tmp_path)
    assert says in (error_of(result) or ""), result.stderr[-500:]
    assert everything(tmp_path) == before and sorted(tmp_path.rglob("*")) == paths


def test_what_to_train_on_and_where_to_is_asked_for(data, tmp_path):
    """These through a process of their own, as `python sd.py` starts it."""
    for options, says in {
        ("--out", "a.safetensors"): "DATA",
        (data,): "--out",
        ("none", "--out", "a.safetensors"): "none",
    }.items():
        result = run_train(*options, "--config", json.dumps(TINY), cwd=tmp_path)
        assert says in (error_of(result) or ""), result.stderr
    assert everything(tmp_path) == {}


def coco(images, annotations) -> dict[str, str]:
    return {"captions_all.json": json.dumps({"images": images, "annotations": annotations})}


IMAGES = [{"id": 1, "file_name": "red.png"}]
BAD_DATA = {
    "empty": ({}, "no pictures with captions"),
    "no captions": ({"red.txt": None}, "no pictures with captions"),
    "no pictures": ({"grey.txt": "grey"}, "no pictures with captions"),
    "no lines": ({"metadata.jsonl": "\n\n"}, "no pictures with captions"),
    "no JSON": ({"metadata.jsonl": '{"file_name": "red.png", "text": "red"}\nred'}, "metadata.jsonl"),
    "no text": ({"metadata.jsonl": '{"file_name": "red.png"}'}, "metadata.jsonl: .*text"),
    "no file_name": ({"metadata.jsonl": '{"text": "red"}'}, "metadata.jsonl: .*file_name"),
    "text that is a number": ({"metadata.jsonl": '{"file_name": "red.png", "text": 5}'}, "metadata.jsonl"),
    "text that is null": ({"metadata.jsonl": '{"file_name": "red.png", "text": null}'}, "metadata.jsonl"),
    "file_name that is a number": ({"metadata.jsonl": '{"file_name": 5, "text": "red"}'}, "metadata.jsonl"),
    "lines that are lists": ({"metadata.jsonl": '["red.png", "red"]'}, "metadata.jsonl"),
    "lines not in UTF-8": ({"metadata.jsonl": b'{"file_name": "red.png", "text": "\xff"}'}, "metadata.jsonl"),
    "lines that fit nothing": ({"metadata.jsonl": '{"file_name": "x.png", "text": "x"}'}, "1 of 1 .*x.png"),
    "COCO, no JSON": ({"captions_all.json": "{"}, "captions_all.json"),
    "COCO, a list": ({"captions_all.json": "[]"}, "captions_all.json"),
    "COCO, no images": ({"captions_all.json": '{"annotations": []}'}, "captions_all.json: .*images"),
    "COCO, no annotations": ({"captions_all.json": '{"images": []}'}, "captions_all.json: .*annotations"),
    "COCO, nothing in it": (coco([], []), "no pictures with captions"),
    "COCO, an unknown image": (coco(IMAGES, [{"image_id": 2, "caption": "red"}]), "all.json: .*image"),
    "COCO, no text": (coco(IMAGES, [{"image_id": 1, "caption": None}]), "captions_all.json"),
    "COCO, fits nothing": (
        coco([{"id": 1, "file_name": "x.jpg"}], [{"image_id": 1, "caption": "red"}]), "1 of 1 .*x.jpg",
    ),
    "text not in UTF-8": ({"red.txt": b"\xff"}, "red.txt"),
    "most pictures unreadable": (
        {"red.txt": "red", "a.png": "", "a.txt": "a", "b.jpg": "x", "b.txt": "b"}, "2 of 3 .*a.png.*b.jpg",
    ),
}  # fmt: skip


@pytest.mark.parametrize("part", ["vae", "unet"])
@pytest.mark.parametrize("kind", BAD_DATA)
def test_data_that_cannot_be_used(kind, part, config, tmp_path):
    files, says = BAD_DATA[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    if files and kind != "no pictures":
        photograph(0, 16, 24).save(folder / "red.png")
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    before = everything(tmp_path)
    options = ["--config", config, "--part", part, "--steps", 1, "--batch-size", 1, "--out", "a.safetensors"]
    result = run_forked(folder, *options, cwd=tmp_path)
    assert re.search(says, error_of(result) or ""), result.stderr[-500:]
    assert str(folder) in error_of(result)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("data", ["missing", "file.png"])
def test_data_that_is_no_folder(data, config, tmp_path):
    photograph(0, 16, 16).save(tmp_path / "file.png")
    result = run_forked(data, "--config", config, "--steps", 1, "--out", "a.safetensors", cwd=tmp_path)
    assert data in error_of(result) and "folder" in error_of(result)
    assert list(everything(tmp_path)) == ["file.png"]


# ----------------------------------------------------------------------------------- the default model's data


@pytest.fixture(scope="module")
def emoji():
    spec = importlib.util.spec_from_file_location("emoji_data", ROOT / "weights" / "emoji.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [file for file in (module.NAMES, module.FONT) if not module.installed(file).is_file()]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} of Debian's unicode-data and fonts-noto-color-emoji are not installed"
        )
    return module


def test_emoji_are_about_1500_and_no_two_of_one_name(emoji):
    names = emoji.emoji_names()
    assert 1400 < len(names) < 1600 and len(set(names.values())) == len(names)
    for name in names.values():
        assert not re.search(r"skin tone|\bflag|keycap|o.clock|thirty|:$", name), name
    assert not any(0x1F3FB <= ord(character) <= 0x1F3FF for one in names for character in one)
    assert not any(0x1F550 <= ord(character) <= 0x1F567 for one in names for character in one)
    assert not any(
        0x1F1E6 <= ord(character) <= 0x1F1FF or ord(character) == 0x20E3 for one in names for character in one
    )
    known = {
        "🍎": "red apple",
        "🐱": "cat face",
        "🍕": "slice of pizza",
        "❤️": "red heart",
        "👩‍🚀": "woman astronaut",
    }
    assert {one: names[one] for one in known} == known


def test_emoji_are_called_what_a_person_would_call_them(emoji):
    assert emoji.captions("red apple", "blue") == [
        "a red apple on a blue background", "red apple on a blue background",
    ]  # fmt: skip
    assert emoji.captions("red apple", "white") == [
        "a red apple", "red apple", "a red apple on a white background", "red apple on a white background",
    ]  # fmt: skip
    first = {name: emoji.captions(name, "orange")[0].removesuffix(" on an orange background") for name in (
        "artist palette", "OK hand", "unicorn", "hourglass done",
    )}  # fmt: skip
    assert [*first.values()] == ["an artist palette", "an OK hand", "a unicorn", "an hourglass done"]


def test_a_tenth_of_the_emojis_pairs_is_held_out(emoji):
    names = list(emoji.emoji_names())
    halves = emoji.split(names)
    assert halves == emoji.split(names) and halves.keys() == {"train", "heldout"}
    train, heldout = set(halves["train"]), set(halves["heldout"])
    pairs = {(one, colour) for one in names for colour in emoji.COLOURS}
    assert not train & heldout and train | heldout == pairs and len(emoji.COLOURS) == 12
    assert len(halves["train"]) + len(halves["heldout"]) == len(pairs) == 12 * len(names)
    assert len(heldout) == len(pairs) // 10
    assert len({one for one, _ in train}) == len(names) and {colour for _, colour in heldout} == set(
        emoji.COLOURS
    )
    code = "import emoji; print(emoji.split(list('abc')))"
    assert (
        run("-B", "-c", code, cwd=ROOT / "weights").stdout == f"{emoji.split(list('abc'))}\n"
    )  # also in another process


def test_emoji_stand_in_the_middle_of_their_colour(emoji):
    font = ImageFont.truetype(emoji.installed(emoji.FONT), emoji.GLYPH)
    for one in ("🍎", "👩‍🚀", "➖"):
        white, blue = (pixels(emoji.draw(one, colour, font)) for colour in ("white", "blue"))
        assert white.shape == blue.shape == (128, 128, 3)
        inside = (blue != emoji.COLOURS["blue"]).any(-1)
        assert (white[~inside] == 255).all() and inside.mean() > 0.02
        [top, bottom], [left, right] = (np.flatnonzero(inside.any(axis))[[0, -1]] for axis in (1, 0))
        assert (
            abs(top + bottom - 127) <= 2
            and abs(left + right - 127) <= 2
            and 60 < max(right - left, bottom - top) < 113
        )
    red = pixels(emoji.draw("🍎", "white", font))[64, 64]
    assert red[0] > 150 and red[0] > 2 * red[2]


def test_the_emojis_folders_can_be_trained_on(emoji, tmp_path, monkeypatch):
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
    names, halves = emoji.emoji_names(), emoji.split(list(emoji.emoji_names()))
    assert list(names.values()) == ["red apple", "zebra", "artist palette"]
    font = ImageFont.truetype(emoji.installed(emoji.FONT), emoji.GLYPH)
    for half, size in {"train": 33, "heldout": 3}.items():
        captions = sd.read_captions(tmp_path / half)
        assert len(captions) == size == len(list((tmp_path / half).glob("*.png")))
        expected = [(emoji.captions(names[one], colour), one, colour) for one, colour in halves[half]]
        for (path, texts), (called, one, colour) in zip(captions.items(), expected, strict=True):
            assert texts == called and (pixels(path) == pixels(emoji.draw(one, colour, font))).all()


def test_the_default_models_config_is_one():
    config = sd.Config.from_json((ROOT / "weights" / "emoji.json").read_text())
    assert config.image_size == 128 and asdict(config) != asdict(sd.Config())
    with torch.device("meta"):
        sd.StableDiffusion(config)
