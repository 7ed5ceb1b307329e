"""Section 10: options, the images that are written and what they hold, one line for every mistake."""

import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
from conftest import ROOT, limit, photograph, pixels, read_until
from PIL import Image
from safetensors.torch import load_file, save_file

import sd

PROMPT = "a red apple"
METADATA = {"sd.py": json.dumps(make_checkpoint.SMALL | {"image_size": 64})}
SIZE = {"width": 64, "height": 64}
QUICK = ["--steps", 2, "--width", 64, "--height", 64]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def only_a_cpu(monkeypatch):
    """Images are compared with a CPU's, which must be the fastest device that the command line finds."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def run_main(tmp_path, monkeypatch, capfd):
    """Like run_sd, but calls main in this process, which takes no seconds for importing PyTorch."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> subprocess.CompletedProcess:
        words = [] if {"--prompt", "--settings"} & {*arguments} else ["--prompt", PROMPT]
        words += [] if "--device" in arguments else ["--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["sd.py", *map(str, arguments), *words])
        capfd.readouterr()
        return subprocess.CompletedProcess(arguments, sd.main(), *capfd.readouterr())

    return run


@pytest.fixture
def start_sd(tmp_path):
    """Starts `python sd.py --prompt "a red apple" ...` in the empty folder and returns the process."""

    def start(*arguments, **options) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "sd.py"), "--prompt", PROMPT, *map(str, arguments)]
        return subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, env=ONE_THREAD, **options)

    return start


@pytest.fixture(scope="module")
def small64(small, tmp_path_factory) -> Path:
    """The small checkpoint, made for images of 64x64."""
    path = tmp_path_factory.mktemp("small64") / "small64.safetensors"
    save_file(load_file(small), path, METADATA)
    return path


def error_of(result: subprocess.CompletedProcess, lines_before: int = 0) -> str:
    """The error of a run that ends as it should after a mistake, with exit status 2 and one line."""
    *before, last = result.stderr.splitlines() or [""]
    right = result.returncode == 2 and result.stdout == "" and len(before) == lines_before
    error = re.fullmatch(r"sd\.py: error: (.+)", last)
    assert right and error, (result.args, result.returncode, result.stdout, result.stderr)
    return error[1]


def assert_shows(path: str | Path, model: sd.StableDiffusion, prompt: str = PROMPT, **settings) -> None:
    """The file is what the model generates from Python; every pixel is within 1 of 255."""
    [expected] = model.generate(prompt, **settings)
    assert abs(pixels(Path(path)) - pixels(expected)).max() <= 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------- options


def test_help_fits_a_screen(run_main, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="^0$"):
        run_main("--help")
    text, error = capfd.readouterr()
    assert error == "" and len(text.splitlines()) <= 28 and max(map(len, text.splitlines())) <= 80
    entries = dict(re.findall(r"^  (?:-h, )?--(\w+)((?:.*\n)(?:    .*\n)*)", text, re.MULTILINE))
    defaults = {
        "weights": "emoji", "lora": ":1", "out": "out.png", "steps": "50", "guidance": "7.5",
        "sampler": "ddpm", "seed": "random", "n": "1", "width": "the image's", "strength": "0.8",
        "upscale": "0.35", "device": "fastest", "dtype": "fp32 on a CPU",
    }  # fmt: skip
    others = "prompt negative vae height image mask settings offload compile help"
    assert entries.keys() == {*defaults, *others.split()}
    for name, default in defaults.items():
        assert re.search(rf"\(.*{re.escape(default)}.*\)", entries[name]), name


def test_defaults(run_sd, small64, small_model, tmp_path):
    """The first line tells what runs. Without a terminal there is no progress bar."""
    result = run_sd("--weights", small64)
    assert result.returncode == 0 and result.stdout == "out.png\n" and names(tmp_path) == ["out.png"]
    line = r"sd\.py: small64\.safetensors on cpu in fp32, 64x64, 50 steps of ddpm, seed (\d+)\n"
    seed = int(re.fullmatch(line, result.stderr)[1])
    assert_shows(tmp_path / "out.png", small_model, seed=seed, **SIZE)


AT_HOME = {"image": "~/image.png", "mask": "~/mask.png", "strength": 0.7, "sampler": "ddim"}


@pytest.mark.parametrize("dtype, settings, more, line", [
    ("fp32", AT_HOME, ["--offload"], "cpu in fp32, 72x80, 3 steps of ddim, seed 11"),
    ("bf16", {"width": 72, "height": 64, "sampler": "dpm++"}, ["--dtype", "bf16"],
     "cpu in bf16, 72x64, 3 steps of dpm++, seed 11"),
])  # fmt: skip
def test_options_reach_the_image(
    run_main, small, small_folder, tmp_path, monkeypatch, dtype, settings, more, line
):
    """~ is the home folder in every path, from Python, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("weights").symlink_to(small_folder)
    photograph(72, 80).save("image.png")
    Image.fromarray(np.tile(np.linspace(0, 255, 72).astype(np.uint8), (80, 1))).save("mask.png")
    settings = {"steps": 3, "seed": 11, **settings}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    result = run_main("--weights", "~/weights", "--out", "~/of.png", *words, *more)
    assert result.returncode == 0 and result.stdout == f"{tmp_path}/of.png\n", result.stderr
    assert f"sd.py: weights on {line}" in result.stderr
    assert_shows("of.png", sd.load(small, dtype=sd.FLOATS[dtype]), **settings)
    assert sd.load("~/weights").name == "weights"
    assert sd.save_image(photograph(), "~/of.png") == tmp_path / "of-1.png"


@pytest.mark.long
def test_compile_gives_the_same_image(run_sd, small, small_model, tmp_path):
    result = run_sd("--weights", small, "--compile", "--seed", 5, *QUICK)
    assert result.returncode == 0, result.stderr
    assert_shows(tmp_path / "out.png", small_model, seed=5, steps=2, **SIZE)


@pytest.mark.long
def test_compile_without_a_compiler(run_sd, tmp_path):
    environment = ONE_THREAD | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    result = run_sd("--compile", "--steps", 1, env=environment)
    assert re.fullmatch("cannot compile: .*/nonexistent.*; leave out --compile", error_of(result, 1))


@pytest.mark.parametrize("more, note", [
    (["--prompt", "yak " * 75 + "zebra"], "75 tokens.*: zebra"),
    (["--prompt", "a (red:1.3) apple, (green:0.5)"], r"\(red:1\.3\) is plain text to CLIP"),
    (["--prompt", "an apple <lora:red:-0.8>", "--n", 2], "<lora:red:-0.8> is plain text to CLIP"),
    (["--prompt", "an apple (red: no)"], None), (["--negative", "((blue:2))"], r"\(blue:2\) is plain text"),
    (["--width", 32, "--height", 32], None), (["--width", 32, "--height", 24], "about 64 pixels"),
    (["--width", 96, "--height", 96], None), (["--width", 104, "--height", 96], "about 64 pixels"),
])  # fmt: skip
def test_notes(run_main, small64, more, note):
    """Beside the line that tells what runs."""
    result = run_main("--weights", small64, "--steps", 1, *more)
    about, *notes = sorted(result.stderr.splitlines(), key=lambda line: "note: " in line)
    assert result.returncode == 0 and about.startswith("sd.py: small64.safetensors on ")
    assert len(notes) == (note is not None)
    assert not notes or re.fullmatch(f"sd.py: note: .*{note}.*", notes[0])


# --------------------------------------------------------------------------------------------- files written


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings as AUTOMATIC1111's web UI reads them, these from the last line."""
    *lines, last = text.split("\n")
    prompt, _, negative = "\n".join(["", *lines]).partition("\nNegative prompt: ")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^"\\])+"|[^,]*)(?:,|$)', last)
    values = {key: json.loads(value) if value[0] == '"' else value for key, value in pairs}
    return prompt[1:], negative, values


@pytest.mark.parametrize("prompt, negative, guidance, weights, name, sampler, strength", [
    ("a red apple", "", "7.5", 'my, "own": v2.0.safetensors', 'my, "own": v2.0', "DPM++ 2M", None),
    ("ein \"Apfel\", süß: 'rot'", "blau", "1", "sd-v1.5", "sd-v1.5", "ddpm", None),
    ("", "\nSteps: 9, Seed: 9", "2", "sd-v1.5", "sd-v1.5", "ddpm", None),
    ("красное яблоко\n赤いリンゴ 🍎\n\nSteps: 3, Seed: 4", "синее\n青い, CFG scale: 2", "6.123456789",
     "mix-1.0.ckpt", "mix-1.0", "DDIM", "0.723456789"),
])  # fmt: skip
def test_image_is_made_again_from_its_png(
    run_main, small, small_folder, tmp_path, prompt, negative, guidance, weights, name, sampler, strength
):
    """By the command line, and again with --settings, and from Python; the PNG is the same."""
    (tmp_path / weights).symlink_to(small_folder if weights == "sd-v1.5" else small)
    photograph().save("image.png")
    ours = {"DPM++ 2M": "dpm++", "ddpm": "ddpm", "DDIM": "ddim"}[sampler]
    words = ["--weights", weights, "--prompt", prompt, "--negative", negative, "--guidance", guidance, *QUICK]
    words += ["--sampler", ours, "--seed", 2**64 - 2, "--n", 2]
    image_words = ["--image", "image.png"] if strength else []
    result = run_main(*words, *image_words, *(["--strength", strength] if strength else []))
    assert result.returncode == 0, result.stderr
    image = Image.open("out-1.png")
    assert list(image.info) == ["parameters"]
    assert parse_parameters(image.info["parameters"]) == (prompt, negative, {
        "Steps": "2", "Sampler": sampler, "CFG scale": guidance, "Seed": str(2**64 - 1), "Size": "64x64",
        "RNG": "CPU", "Model": name, **({"Denoising strength": strength} if strength else {}),
    })  # fmt: skip
    settings = {"image": "image.png", "strength": float(strength)} if strength else {}
    [again] = sd.load(weights).generate(
        prompt, negative, sampler=ours, steps=2, seed=2**64 - 1, guidance=float(guidance), **SIZE, **settings
    )
    path = sd.save_image(again, tmp_path / "out.png")
    assert path == tmp_path / "out-2.png" and Image.open(path).info == image.info
    assert (pixels(path) == pixels(image)).all()
    result = run_main("--weights", weights, "--settings", "out-1.png", *image_words)
    assert result.stdout == "out-3.png\n" and "note: out-1.png: not taken over: Model: " in result.stderr
    assert Path("out-3.png").read_bytes() == Path("out-1.png").read_bytes()


@pytest.mark.parametrize("sampler, name", [("ddpm", "ddpm"), ("ddim", "DDIM"), ("dpm++", "DPM++ 2M")])
def test_png_is_read_by_sd_parsers(run_main, small64, sampler, name):
    prompt, negative = 'a "red" apple,\nSteps: 3', "blue, (ugly)"
    words = ["--prompt", prompt, "--negative", negative, "--seed", 5, "--steps", 2, "--guidance", 3.5]
    assert run_main("--weights", small64, "--sampler", sampler, *words).returncode == 0
    sd_parsers = pytest.importorskip("sd_parsers", reason="needs sd-parsers")
    info = sd_parsers.ParserManager().parse("out.png")
    assert info.generator.value == "AUTOMATIC1111"
    assert [each.value for each in info.prompts + info.negative_prompts] == [prompt, negative]
    [used], [model] = info.samplers, info.models
    assert (used.name, model.name) == (name, "small64")
    found = {key: str(value) for key, value in (used.parameters | info.metadata).items()}
    assert found.items() >= {"steps": "2", "cfg_scale": "3.5", "seed": "5", "Size": "64x64"}.items()


def labeled(path: str, text: str) -> None:
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = text
    sd.save_image(image, path)


A1111 = """a (red:1.2) apple
Negative prompt: blue
Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 9, Size: 72x64, \
Model hash: 6ce0161689, Model: "v1-5, pruned", Denoising strength: 0.5, Hires upscale: 1.5, RNG: CPU, \
Version: v1.10.1"""


def test_settings_of_the_web_ui(run_main, small64, small_model):
    """Those that sd.py has are taken, the others are told; options on the command line come first."""
    labeled("theirs.png", A1111)
    words = ["--settings", "theirs.png", "--seed", 4, "--negative", "green", "--out", "ours.png"]
    result = run_main("--weights", small64, *words)
    assert result.returncode == 0, result.stderr
    told = 'Schedule type: Karras, Model hash: 6ce0161689, Model: "v1-5, pruned", Version: v1.10.1'
    assert f"sd.py: note: theirs.png: not taken over: {told}\n" in result.stderr
    text = Image.open("ours.png").info["parameters"]
    assert text == (
        "a (red:1.2) apple\nNegative prompt: green\nSteps: 3, Sampler: DPM++ 2M, CFG scale: 4, Seed: 4, "
        "Size: 72x64, RNG: CPU, Model: small64, Denoising strength: 0.5, Hires upscale: 1.5"
    )
    settings = {"negative": "green", "steps": 3, "sampler": "dpm++", "guidance": 4, "seed": 4}
    [first] = small_model.generate("a (red:1.2) apple", width=72, height=64, **settings)
    larger = {"image": first, "width": 112, "height": 96, "strength": 0.5}
    assert_shows("ours.png", small_model, "a (red:1.2) apple", **larger, **settings)


def test_settings_without_a_prompt_or_with_another_sampler(run_main, small64):
    """The web UI strips the text; a sampler that sd.py does not have is told, and ddpm is used. A long word
    that is no setting takes time that grows with its length only."""
    text = "Negative prompt: blue\nSteps: 2, Sampler: Euler a, Seed: 9, Size: 64x64, RNG: NV, "
    labeled("theirs.png", text + "a" * 300_000)
    result = run_main("--weights", small64, "--settings", "theirs.png")
    assert "theirs.png: not taken over: Sampler: Euler a, RNG: NV\n" in result.stderr
    text = Image.open("out.png").info["parameters"]
    assert text.startswith("\nNegative prompt: blue\nSteps: 2, Sampler: ddpm, CFG scale: 7.5, Seed: 9, ")


def test_upscale(run_main, small64, small_model):
    """An image, enlarged and redrawn; and the same PNG again from its settings."""
    result = run_main("--weights", small64, "--upscale", 1.37, "--steps", 8, "--seed", 3, "--n", 2)
    assert result.stdout.split() == ["out.png", "out-1.png"], result.stderr
    for seed, name in ((3, "out.png"), (4, "out-1.png")):
        [first] = small_model.generate(PROMPT, steps=8, seed=seed, **SIZE)
        larger = {"image": first, "width": 88, "height": 88, "strength": 0.35}
        assert_shows(name, small_model, steps=8, seed=seed, **larger)
    text = Image.open("out.png").info["parameters"]
    assert text.endswith("64x64, RNG: CPU, Model: small64, Denoising strength: 0.35, Hires upscale: 1.37")
    run_main("--weights", small64, "--settings", "out-1.png")
    assert Path("out-2.png").read_bytes() == Path("out-1.png").read_bytes()
    run_main("--weights", small64, "--settings", "out.png", "--strength", 0.9)
    assert abs(pixels(Path("out-3.png")) - pixels(Path("out.png"))).mean() > 1


def test_prompts_from_a_file(run_main, small64, small_model):
    Path("prompts.txt").write_bytes("\ufeffa red apple\r\n\n  \n a blue house, süß \n@home".encode())
    words = ["--prompt", "@prompts.txt", "--n", 2, "--steps", 1, "--seed", 7]
    files = run_main("--weights", small64, *words).stdout.split()
    assert files == ["out.png"] + [f"out-{i}.png" for i in range(1, 6)]
    prompts = [prompt for prompt in ("a red apple", "a blue house, süß", "@home") for _ in range(2)]
    for i, (file, prompt) in enumerate(zip(files, prompts)):
        text = Image.open(file).info["parameters"]
        assert text.startswith(f"{prompt}\nSteps: 1, ") and f", Seed: {7 + i}, " in text
        assert_shows(file, small_model, prompt, steps=1, seed=7 + i, **SIZE)
    run_main("--weights", small64, "--settings", "out-5.png")  # of @home, which is no file here
    assert Path("out-6.png").read_bytes() == Path("out-5.png").read_bytes()


def test_vae_and_loras(run_main, small64, small, tmp_path):
    """As sd.load takes them; a file's name may have a colon."""
    make_checkpoint.write_vae(tmp_path / "vae.ckpt", small=True, seed=3)
    for i, name in enumerate(["one.safetensors", "t:0.o:2"]):
        save_file(make_checkpoint.random_lora("kohya", small=True, seed=i), tmp_path / name)
    words = ["--lora", "one.safetensors:0.3", "--lora", "t:0.o:2:-.5", "--vae", "vae.ckpt", "--seed", 1]
    result = run_main("--weights", small64, *words, *QUICK)
    assert result.returncode == 0, result.stderr
    model = sd.load(small, vae="vae.ckpt", loras={"one.safetensors": 0.3, "t:0.o:2": -0.5})
    assert_shows("out.png", model, steps=2, seed=1, **SIZE)
    assert ', Model: "small64 + one:0.3 + t:0:-0.5"' in Image.open("out.png").info["parameters"]
    assert sd.parse(["--prompt", "", "--lora", "C:\\a.safetensors"]).lora == {"C:\\a.safetensors": 1.0}


def test_files_are_not_overwritten(run_main, small64, tmp_path):
    (tmp_path / "out.png").write_bytes(b"mine")
    (tmp_path / "out-1.png").mkdir()
    (tmp_path / "out-2.png").symlink_to("nowhere")
    assert run_main("--weights", small64, "--steps", 1).stdout == "out-3.png\n"
    assert (tmp_path / "out.png").read_bytes() == b"mine"
    assert names(tmp_path) == ["out-1.png", "out-2.png", "out-3.png", "out.png"]
    Image.open("out-3.png").load()
    (tmp_path / "a.b").mkdir()
    for name in ("c.d.png", "c.d-1.png"):
        words = ["--out", "a.b/c.d.png", "--steps", 1]
        assert run_main("--weights", small64, *words).stdout == f"a.b/{name}\n"


def test_simultaneous_processes(start_sd, small64, tmp_path):
    """Each image gets a name of its own, whichever process saves it."""
    words = ["--weights", small64, "--steps", 1, "--n", 4, "--seed"]
    processes = [start_sd(*words, 10 * i, stdout=subprocess.PIPE, text=True) for i in range(3)]
    claimed = [process.communicate()[0].split() for process in processes]
    everything = ["out.png"] + [f"out-{i}.png" for i in range(1, 12)]
    assert sorted(name for mine in claimed for name in mine) == sorted(everything) == names(tmp_path)
    for i, mine in enumerate(claimed):
        settings = [parse_parameters(Image.open(tmp_path / name).info["parameters"])[2] for name in mine]
        assert [int(each["Seed"]) for each in settings] == [10 * i + j for j in range(4)]


@pytest.mark.parametrize("words, moment", [
    (["--steps", 1000], rb"[1-9]\d*/1000"), (["--steps", 1, "--n", 200], rb"out-2\.png")
])  # fmt: skip
def test_ctrl_c(start_sd, small64, tmp_path, terminal, words, moment):
    """Ends at once, without a traceback; images that are complete stay, and nothing else. Until then the
    terminal has a progress bar."""
    ours, its = terminal
    process = start_sd("--weights", small64, *words, stdout=its, stderr=its)
    os.close(its)
    assert re.search(moment, read_until(ours, moment))
    process.send_signal(signal.SIGINT)
    text = read_until(ours, b"")
    assert process.wait() == 130
    assert b"Traceback" not in text and b"Error" not in text
    assert (len(names(tmp_path)) > 2) == ("--n" in words)
    for name in names(tmp_path):
        assert re.fullmatch(r"out(-\d+)?\.png", name)
        Image.open(tmp_path / name).load()


@pytest.mark.parametrize("module", ["numpy", "torch._C", "torch", "PIL.Image"])
def test_ctrl_c_during_the_imports(tmp_path, module):
    """Python tells each module when it has been imported, and is interrupted at once."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "sd.py"), "--prompt", PROMPT]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.split("|")[-1].strip() == module:
            process.send_signal(signal.SIGINT)
            break
    rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait() in (130, -signal.SIGINT) and rest == [] and names(tmp_path) == []


# --------------------------------------------------------------------------------------------------- mistakes

WITH_IMAGE, WITH_MASK = ["--image", "image.png"], ["--mask", "mask.png"]
MISTAKES = [
    ([], "missing.safetensors is missing"), (["--weights", "~nosuchuser/a.ckpt"], "~nosuchuser"),
    (["--steps", 0], "steps is 0"), (["--steps", "abc"], "--steps"), (["--steps"], "--steps"),
    (["--step", 3], "option or word .*--step "), (["--promt", "a cat"], "option or word .*--promt "),
    (["--no\nsuch"], "option or word .*--no such "), (["train"], "option or word .*train "),
    (["--n", 0], "n is 0"), (["--seed", "1.5"], "--seed"), (["--seed", 10**30], "seed is"),
    (["--guidance", "nan"], "guidance is nan"), (["--sampler", "euler"], "ddim"),
    (["--width", 0], "width is 0"), (["--height", 8 * 10**29], "height is 80+"),
    (["--dtype", "int8"], "--dtype"), (["--device", "two\nlines"], "device two lines is not"),
    (["--device", "cuda:99"], "device cuda:99 is not"), (["--device", "meta"], "device meta is not"),
    (["--image", "two\nlines"], "two lines: .*No such file"), (["--strength", 0.5], "strength is given"),
    (["--upscale", 1], "upscale is 1"), (["--upscale", 4.1], "upscale is 4.1"),
    (["--upscale", "nan"], "upscale is nan"), ([*WITH_IMAGE, "--upscale", 2], "upscale is given .* --width"),
    (["--upscale", 2, "--strength", 0], "strength is 0"),
    (["--settings", "image.png"], "image.png: 'parameters' is missing"),
    (["--settings", "mask.jpg"], "mask.jpg: No such file"), (["--settings", "other.png"], "without steps"),
    (["--prompt", "@image.png"], "image.png: .*utf-8"), (["--prompt", "@no.txt"], "no.txt: No such"),
    (["--prompt", "@empty.txt"], r"prompt is \[\]"), ([*WITH_IMAGE, "--strength", 0], "strength is 0"),
    (WITH_MASK, "mask is given"), ([*WITH_IMAGE, *WITH_MASK], "mask is .*64, 56.*64, 64"),
    (["--prompt", os.fsdecode(b"a \xff apple")], "prompt"), (["--negative", os.fsdecode(b"\xc3")], "prompt"),
    (["--out", "missing/out.png"], "missing"), (["--out", "image.png/out.png"], "image.png"),
    (["--out", "."], ".png"), (["--out", "out.jpg"], "out.jpg"), (["--out", ""], ".png"),
    (["--out", "a" * 300 + ".png"], "aaa"), (["--out", "/proc/out.png"], "/proc"),
    (["--out", "~nosuchuser/out.png"], "~nosuchuser"),
]  # fmt: skip


@pytest.mark.parametrize("words, message", MISTAKES)
def test_mistakes_are_told_before_weights_are_loaded(run_main, tmp_path, words, message):
    """Without the first, all have another mistake than the missing weights."""
    photograph().save("image.png")
    Image.new("L", (64, 56)).save("mask.png")
    Path("empty.txt").write_text("\n \n")
    labeled("other.png", "a cat\nSampler: DDIM")
    before = names(tmp_path)
    assert re.search(message, error_of(run_main("--weights", "missing.safetensors", *words)))
    assert names(tmp_path) == before


def test_prompt_is_needed(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sd.py"])
    assert sd.main() == 2 and capfd.readouterr().err.startswith("sd.py: error: --prompt is missing")


def test_without_the_default_model(tmp_path):
    """A copy of sd.py and its vocabulary alone says what to do."""
    shutil.copy(ROOT / "sd.py", tmp_path)
    shutil.copytree(ROOT / "tokenizer_vocab", tmp_path / "tokenizer_vocab")
    before = names(tmp_path)
    command = [sys.executable, "-B", "sd.py", "--prompt", PROMPT]
    error = error_of(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True))
    assert "emoji.safetensors is missing" in error and "weights/README.md" in error
    assert names(tmp_path) == before


OUT_OF_MEMORY = """
import json, resource, sys, sd
for megabytes, arguments in json.loads(sys.argv[1]):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, -1))
    sys.argv[1:] = map(str, arguments)
    assert sd.main() == 2
"""


def test_out_of_memory(small64, tmp_path):
    """While the weights, of 71 MB, are mapped and converted, and while an image is generated."""
    words = f"--prompt cat --steps 1 --device cpu --weights {small64} --out {tmp_path}/out.png".split()
    large = ["--width", 2**14, "--height", 2**14]
    cases = [(40, words), (90, [*words, "--dtype", "bf16"]), (1500, [*words, *large])]
    command = [sys.executable, "-c", OUT_OF_MEMORY, json.dumps(cases)]
    result = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True)
    errors = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert result.returncode == 0 and len(errors) == 3, result.stderr
    assert all(line.startswith("sd.py: error: out of memory; ") for line in errors), errors
    assert names(tmp_path) == []


def test_full_disk(run_main, small64, tmp_path):
    """A limit on the size of a file, smaller than the image's, stands in for it."""
    with limit(resource.RLIMIT_FSIZE, 1000):
        result = run_main("--weights", small64, "--steps", 1)
    assert "out.png" in error_of(result, 1) and names(tmp_path) == []


# ----------------------------------------------------------------------------------------------------- images


def png(width: int, height: int, depth: int, color_type: int, rows: bytes) -> bytes:
    """A PNG of a kind that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_images_that_cannot_be_used(run_main, tmp_path):
    """They, too, are told before weights are loaded."""
    photo = photograph()
    whole, jpeg = encoded(photo, "PNG"), encoded(photo, "JPEG")
    animation = {"save_all": True, "append_images": [photo.rotate(90)]}
    files = {
        "empty.png": b"", "text.png": b"not an image", "corrupt.png": whole[:60] + bytes(200) + whole[260:],
        "bomb.png": png(50_000, 50_000, 1, 0, b"\0"),
        "smaller bomb.png": png(10_000, 10_000, 1, 0, bytes(1251 * 10_000)),
        "large.png": png(10_000, 5001, 1, 0, bytes(1251 * 5001)),
        "an EPS.png": encoded(photo, "EPS"), "a PPM.png": encoded(photo, "PPM"),
        **{f"animated.{kind}": encoded(photo, kind, **animation) for kind in ("gif", "png", "webp")},
        **{f"truncated at {end}.png": whole[:end] for end in (1, 10, 40, len(whole) // 2, len(whole) - 40)},
        **{f"truncated at {end}.jpg": jpeg[:end] for end in (3, 300, len(jpeg) // 2, len(jpeg) - 100)},
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo("pipe.png")
    assert "pipe.png: it is a pipe" in error_of(run_main("--prompt", "@pipe.png"))
    photo.save("good.png")
    before = names(tmp_path)
    masks = ("missing.png", "animated.gif", "empty.png")
    cases = [["--image", name] for name in [*files, "folder.png", "pipe.png", "missing.png"]]
    for words in cases + [["--image", "good.png", "--mask", name] for name in masks]:
        error = error_of(run_main("--weights", "missing.safetensors", *words))
        assert re.search(f"{re.escape(words[-1])}.*; use another one", error), error
    assert names(tmp_path) == before


def test_what_pillow_logs_is_not_shown(run_sd, tmp_path):
    tiff, samples = encoded(photograph(), "TIFF"), struct.pack("<HHIH", 277, 3, 1, 3)  # per pixel
    (tmp_path / "image.tif").write_bytes(tiff.replace(samples, samples[:-2] + b"\xff\0"))
    assert "image.tif" in error_of(run_sd("--image", "image.tif"))


def test_images_are_converted_to_rgb(small_model, tmp_path):
    """A black mask keeps the image as it is read."""
    rgb = pixels(photograph())
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
    alpha = np.tile(ramp, (64, 1))
    over_white = rgb * (alpha[..., None] / 255) + 255 - alpha[..., None]
    gray = np.tile(ramp[:, None], 64)
    gray_over_white = gray * (alpha / 255) + 255 - alpha
    gray16 = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    rows16 = b"".join(b"\0" + row.tobytes() for row in (rgb * 257).astype(">u2"))
    palette = photograph().quantize(16)
    colors = pixels(palette.convert("RGB"))
    clear = np.where((pixels(palette) == 3)[..., None], 255, colors)
    rgba = Image.fromarray(np.dstack([rgb, alpha]).astype(np.uint8))
    turned, upright = photograph(64, 48), np.rot90(pixels(photograph(64, 48)), -1)
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned clockwise
    three = lambda one: np.repeat(one[..., None], 3, axis=2)  # noqa: E731
    cases = {  # name: (file, what it shows, allowed difference)
        "16-bit gray.png": (encoded(Image.fromarray(gray16), "PNG"), three((gray16 / 257).round()), 0),
        "16-bit RGB.png": (png(64, 64, 16, 2, rows16), rgb, 0),
        "palette.png": (encoded(palette, "PNG"), colors, 0),
        "palette.gif": (encoded(palette, "GIF"), colors, 0),
        "transparent palette.png": (encoded(palette, "PNG", transparency=3), clear, 0),
        "CMYK.jpg": (encoded(photograph().convert("CMYK"), "JPEG", quality=100), rgb, 12),
        "RGBA.png": (encoded(rgba, "PNG"), over_white, 1),
        "LA.png": (encoded(Image.fromarray(np.dstack([gray, alpha])), "PNG"), three(gray_over_white), 1),
        "1-bit.png": (encoded(Image.fromarray(gray > 99), "PNG"), three(np.where(gray > 99, 255, 0)), 0),
        "gray.png": (encoded(Image.fromarray(gray), "PNG"), three(gray), 0),
        "turned.jpg": (encoded(turned, "JPEG", exif=orientation, quality=100, subsampling=0), upright, 3),
        "turned.webp": (encoded(turned, "WEBP", exif=orientation, lossless=True), upright, 0),
    }  # fmt: skip
    for name, (data, shown, allowed) in cases.items():
        (tmp_path / name).write_bytes(data)
        mask = Image.new("L", shown.shape[1::-1], 0)
        [image] = small_model.generate("", image=tmp_path / name, mask=mask, steps=1, progress=False)
        assert image.size == mask.size and abs(pixels(image) - shown).max() <= allowed, name


# -------------------------------------------------------------------------------------------------- full size


@pytest.mark.long
def test_full_size(run_sd, full, tmp_path):
    """4.27 GB of weights give a 512x512 image."""
    result = run_sd("--weights", full, "--steps", 1, "--sampler", "dpm++", "--seed", 5)
    assert result.returncode == 0, result.stderr
    assert " 512x512, 1 steps of dpm++, seed 5" in result.stderr
    image = pixels(tmp_path / "out.png")
    assert image.shape == (512, 512, 3) and image.std() > 20
