"""The command line as a user runs it: options, pictures and what they carry, one line for every mistake."""

import fcntl
import io
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import sd

QUICK = ["--steps", "2", "--width", "64", "--height", "64"]


@pytest.fixture(autouse=True)
def only_a_cpu(monkeypatch):
    """What is drawn is compared with pictures of a CPU, so that must be the fastest device there is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def run_each(run_sd):
    """Runs several command lines, a core each; returns them with their results."""

    def run(command_lines, **options):
        options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(
                zip(command_lines, pool.map(lambda arguments: run_sd(*arguments, **options), command_lines))
            )

    return run


@pytest.fixture
def start_sd(tmp_path):
    """Starts `python sd.py --prompt "a red apple" ...` in the empty folder and returns the process."""

    def start(*arguments, **options) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "sd.py"), "--prompt", "a red apple", *map(str, arguments)]
        return subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.DEVNULL, **options)

    return start


def error_of(result: subprocess.CompletedProcess) -> str | None:
    """What is said where a run ends as it should after a mistake: exit status 2 and one line."""
    one_line = re.fullmatch(r"sd\.py: error: ([^\n]+)\n", result.stderr)
    return one_line[1] if one_line and result.returncode == 2 and result.stdout == "" else None


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(picture) -> np.ndarray:
    """Of a picture or a file."""
    return np.asarray(picture if isinstance(picture, Image.Image) else Image.open(picture)).astype(int)


def photograph(width: int = 64, height: int = 64) -> Image.Image:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------- options


def test_help_fits_a_screen(run_sd):
    text = run_sd("--help", env={**os.environ, "COLUMNS": "80"})
    assert text.returncode == 0 and text.stderr == ""
    lines = text.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    entries = dict(re.findall(r"^  (?:-h, )?--(\w+)((?:.*\n)(?:    .*\n)*)", text.stdout, re.MULTILINE))
    defaults = {
        "prompt": "", "negative": "", "weights": "emoji", "out": "out.png", "steps": "50",
        "guidance": "7.5", "sampler": "ddpm", "seed": "random", "n": "1", "width": "the image's",
        "height": "", "image": "",
        "strength": "0.8", "mask": "", "device": "fastest", "dtype": "fp32 on a CPU", "offload": "",
        "compile": "",
        "help": "",
    }  # fmt: skip
    assert entries.keys() == defaults.keys()
    for name, default in defaults.items():
        assert not default or re.search(rf"\(.*{re.escape(default)}.*\)", entries[name]), name


def test_defaults(run_sd, small, small_model, tmp_path):
    """50 steps of ddpm, guidance 7.5, the CPU, fp32, 512x512, a random seed that the first line tells."""
    result = run_sd("--weights", small, "--width", 64, "--height", 64)
    assert result.returncode == 0 and result.stdout == "out.png\n" and names(tmp_path) == ["out.png"]
    says = r"sd\.py: small\.safetensors on cpu in fp32, 64x64, 50 steps of ddpm, guidance 7\.5, seed (\d+)\n"
    seed = int(re.fullmatch(says, result.stderr)[1])
    [expected] = small_model.generate("a red apple", seed=seed, width=64, height=64)
    assert abs(pixels(tmp_path / "out.png") - pixels(expected)).max() <= 1
    assert " 512x512, 1 steps " in run_sd("--weights", small, "--steps", 1, "--guidance", 1).stderr
    assert Image.open(tmp_path / "out-1.png").size == (512, 512)


def test_every_option_reaches_the_picture(run_sd, small, small_folder, small_model, tmp_path):
    photograph(72, 80).save(tmp_path / "image.png")
    Image.fromarray(np.tile(np.linspace(0, 255, 72).astype(np.uint8), (80, 1))).save(tmp_path / "mask.png")
    drawn = {"steps": 3, "seed": 11, "sampler": "dpm++", "guidance": 3.25}
    image = {"image": tmp_path / "image.png", "mask": tmp_path / "mask.png", "strength": 0.7}
    half = sd.StableDiffusion.load(small, dtype=torch.bfloat16)
    cases = [
        (
            small_model,
            {"negative": "blue", "width": 72, "height": 64, **drawn},
            [],
            "dpm++, guidance 3.25, seed 11",
        ),
        (
            small_model,
            {**image, **drawn, "sampler": "ddim"},
            ["--offload", "--device", "cpu"],
            "cpu in fp32, 72x80",
        ),
        (
            half,
            {"width": 64, "height": 64, **drawn, "guidance": 1.0},
            ["--dtype", "bf16"],
            "in bf16, 64x64, 3 steps",
        ),
    ]
    for model, settings, more, says in cases:
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        result = run_sd("--weights", small_folder, "--out", "of.png", *arguments, *more)
        assert result.returncode == 0 and says in result.stderr, result.stderr
        [expected] = model.generate("a red apple", **settings)
        assert abs(pixels(tmp_path / result.stdout.strip()) - pixels(expected)).max() <= 1


def test_n_pictures_have_seeds_in_a_row(run_sd, small, small_model, tmp_path):
    result = run_sd("--weights", small, "--n", 3, "--seed", 7, *QUICK)
    assert result.stdout.split() == ["out.png", "out-1.png", "out-2.png"]
    assert result.stderr.count("\n") == 1 and result.stderr.endswith(" seed 7\n")
    expected = small_model.generate("a red apple", seed=7, n=3, steps=2, width=64, height=64)
    for name, picture in zip(result.stdout.split(), expected):
        assert abs(pixels(tmp_path / name) - pixels(picture)).max() <= 1


@pytest.mark.long
def test_compile_draws_the_same(run_sd, small, small_model, tmp_path):
    result = run_sd("--weights", small, "--compile", "--seed", 5, *QUICK)
    assert result.returncode == 0, result.stderr
    [expected] = small_model.generate("a red apple", seed=5, steps=2, width=64, height=64)
    assert abs(pixels(tmp_path / "out.png") - pixels(expected)).max() <= 1


def test_without_a_compiler_nothing_is_compiled(run_sd, small, tmp_path_factory):
    """Which shows, without the minute that it takes, that it would be."""
    cache = tmp_path_factory.mktemp("cache")  # nothing is compiled already
    environment = os.environ | {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    error = last_line_of(run_sd("--weights", small, "--compile", *QUICK, env=environment))
    assert re.fullmatch(r"sd\.py: error: cannot compile: .*/nonexistent.*; leave out --compile", error)


def test_tensors_that_are_not_used_are_told(run_sd, small, tmp_path):
    """After the line that says what runs; an error is told alone."""
    save_file(load_file(small) | {"guide.weight": torch.zeros(2)}, tmp_path / "more.safetensors")
    first, note = run_sd("--weights", "more.safetensors", *QUICK).stderr.splitlines()
    assert first.startswith("sd.py: more.safetensors on ")
    assert re.fullmatch(r"sd\.py: note: more\.safetensors: 1 tensors not used: guide\.weight", note)
    assert error_of(run_sd("--weights", "more.safetensors", "--steps", 0))


def test_words_that_are_dropped_are_told(run_sd, small):
    result = run_sd("--weights", small, "--prompt", "yak " * 75 + "zebra", *QUICK)
    assert result.returncode == 0 and result.stderr.count("\n") == 2
    assert re.search("^sd.py: note: .* 75 tokens.*: zebra$", result.stderr, re.MULTILINE)


# -------------------------------------------------------------------------------------------- what is written


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings as AUTOMATIC1111's web UI reads them, these from the last line."""
    *lines, last = text.strip().split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^"\\])+"|[^,]*)(?:,|$)', last)
    return prompt, negative, {key: json.loads(value) if value[0] == '"' else value for key, value in pairs}


@pytest.mark.parametrize(
    "prompt, negative, guidance",
    [
        ("a red apple", "", "7.5"),
        ("ein Apfel, süß: rot", "blau", "1"),
        ("красное яблоко\n赤いリンゴ 🍎\n\nSteps: 3, Seed: 4", "синее\n青い, CFG scale: 2", "6.123456789"),
    ],
    ids=["plain", "Latin-1", "any script"],
)
def test_a_picture_can_be_made_again_from_what_it_carries(
    run_sd, small, tmp_path, prompt, negative, guidance
):
    weights = tmp_path / 'of, "mine": v2.0.safetensors'
    weights.symlink_to(small)
    arguments = [
        "--weights",
        weights,
        "--sampler",
        "dpm++",
        "--seed",
        2**64 - 2,
        "--n",
        2,
        "--guidance",
        guidance,
    ]
    result = run_sd("--prompt", prompt, "--negative", negative, *arguments, *QUICK)
    assert result.returncode == 0, result.stderr
    picture = Image.open(tmp_path / "out-1.png")
    assert list(picture.info) == ["parameters"]
    read_prompt, read_negative, settings = parse_parameters(picture.info["parameters"])
    assert (read_prompt, read_negative) == (prompt, negative)
    assert settings.pop("Size") == "64x64" and settings.pop("Model") == weights.stem
    assert settings == {"Steps": "2", "Sampler": "DPM++ 2M", "CFG scale": guidance, "Seed": str(2**64 - 1)}
    again = [
        "--weights",
        weights,
        "--sampler",
        "dpm++",
        "--seed",
        settings["Seed"],
        "--guidance",
        settings["CFG scale"],
    ]
    run_sd("--prompt", read_prompt, "--negative", read_negative, "--out", "again.png", *again, *QUICK)
    assert (pixels(tmp_path / "again.png") == pixels(picture)).all()


@pytest.mark.parametrize("weights, name", [("sd-v1.5", "sd-v1.5"), ("a/mix-1.0.ckpt", "mix-1.0")])
def test_a_model_has_its_whole_name(weights, name):
    text = sd.webui_parameters(sd.parse(["--prompt", "a", "--weights", weights]), 1, 64, 64)
    assert parse_parameters(text)[2]["Model"] == name


@pytest.mark.parametrize("sampler, theirs", [("ddpm", "DDPM"), ("ddim", "DDIM")])
def test_image_to_image_tells_its_strength(run_sd, small, tmp_path, sampler, theirs):
    photograph().save(tmp_path / "image.png")
    run_sd(
        "--weights",
        small,
        "--image",
        "image.png",
        "--strength",
        "0.123456789",
        "--sampler",
        sampler,
        "--steps",
        9,
    )
    settings = parse_parameters(Image.open(tmp_path / "out.png").info["parameters"])[2]
    assert settings["Denoising strength"] == "0.123456789" and settings["Sampler"] == theirs


def test_nothing_is_overwritten(run_sd, small, tmp_path):
    (tmp_path / "out.png").write_bytes(b"mine")
    (tmp_path / "out-1.png").mkdir()
    (tmp_path / "out-2.png").symlink_to("nowhere")
    assert run_sd("--weights", small, *QUICK).stdout == "out-3.png\n"
    assert (tmp_path / "out.png").read_bytes() == b"mine"
    assert names(tmp_path) == ["out-1.png", "out-2.png", "out-3.png", "out.png"]
    Image.open(tmp_path / "out-3.png").load()
    (tmp_path / "a.b").mkdir()
    for name in ("c.d.png", "c.d-1.png"):
        assert run_sd("--weights", small, *QUICK, "--out", "a.b/c.d.png").stdout == f"a.b/{name}\n"


def test_processes_at_once_do_not_clash(start_sd, small, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ["--weights", small, *QUICK, "--n", 4, "--seed"]
    processes = [start_sd(*arguments, 10 * i, stdout=subprocess.PIPE, text=True, env=env) for i in range(3)]
    claimed = [process.communicate()[0].split() for process in processes]
    everything = ["out.png"] + [f"out-{i}.png" for i in range(1, 12)]
    assert sorted(sum(claimed, [])) == sorted(everything) == names(tmp_path)
    for i, mine in enumerate(claimed):
        settings = [parse_parameters(Image.open(tmp_path / name).info["parameters"])[2] for name in mine]
        assert [int(each["Seed"]) for each in settings] == [10 * i + j for j in range(4)]


def terminal() -> tuple[int, int]:
    """Our side of a new terminal of 80 columns, and the side of a process that runs in it."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    return ours, its


def read_until(terminal: int, pattern: bytes) -> bytes:
    """What a process writes to its terminal until `pattern` shows up or, without one, until it ends."""
    text = b""
    while not (pattern and re.search(pattern, text)):
        try:
            text += os.read(terminal, 1 << 16)
        except OSError:  # the other side is closed
            break
    return text


def test_a_progress_bar_on_a_terminal(start_sd, small):
    ours, its = terminal()
    process = start_sd("--weights", small, *QUICK, stdout=subprocess.DEVNULL, stderr=its)
    os.close(its)
    text = read_until(ours, b"").decode()
    os.close(ours)
    assert process.wait() == 0
    assert "\r100%|" in text and "2/2" in text


def test_no_progress_bar_where_none_is_wanted(small):
    """From Python, on a terminal: none, and one unless it is said."""
    ours, its = terminal()
    script = "import sys, sd; model = sd.StableDiffusion.load(sys.argv[1]); "
    script += "model.generate('a', steps=2, width=64, height=64, progress=False); "
    script += "print('then', file=sys.stderr); model.generate('a', steps=3, width=64, height=64)"
    process = subprocess.Popen([sys.executable, "-c", script, small], cwd=ROOT, stderr=its)
    os.close(its)
    text = read_until(ours, b"").decode()
    os.close(ours)
    assert process.wait() == 0 and text.startswith("then\r\n") and "3/3" in text


@pytest.mark.parametrize(
    "arguments, moment",
    [(["--steps", 1000], rb"[1-9]\d*/1000"), (["--steps", 1, "--n", 200], rb"out-2\.png")],
)
def test_ctrl_c(start_sd, small, tmp_path, arguments, moment):
    """Ends at once and in silence; pictures that are complete stay, and nothing else."""
    ours, its = terminal()
    process = start_sd("--weights", small, "--width", 64, "--height", 64, *arguments, stdout=its, stderr=its)
    os.close(its)
    assert re.search(moment, read_until(ours, moment))
    process.send_signal(signal.SIGINT)
    text = read_until(ours, b"")
    os.close(ours)
    assert process.wait() == 130
    assert b"Traceback" not in text and b"Error" not in text
    assert (len(names(tmp_path)) > 2) == ("--n" in arguments)
    for name in names(tmp_path):
        assert re.fullmatch(r"out(-\d+)?\.png", name)
        Image.open(tmp_path / name).load()


# --------------------------------------------------------------------------------------------------- mistakes


def test_options_out_of_range(run_each, small, tmp_path):
    photograph().save(tmp_path / "image.png")
    Image.new("L", (64, 56)).save(tmp_path / "mask.png")
    image, mask = ["--image", "image.png"], ["--mask", "mask.png"]
    before = names(tmp_path)
    cases = [
        (["--steps", "0"], "steps is 0"), (["--steps", "-1"], "steps is -1"),
        (["--steps", "1001"], "steps is 1001"),
        (["--steps", "abc"], "--steps"), (["--frobnicate"], "--frobnicate"), (["--step", "3"], "--step"),
        (["--no\nsuch"], "--no such; see --help"), (["more"], "more"), (["--n", "0"], "n is 0"),
        (["--n", "-1"], "n is -1"),
        ([*image, "--strength", "0"], "strength is 0"), ([*image, "--strength", "-0.1"], "strength is -0.1"),
        ([*image, "--strength", "1.1"], "strength is 1.1"),
        ([*image, "--strength", "nan"], "strength is nan"),
        (["--strength", "0.5"], "strength"), (mask, "mask"), ([*image, *mask], "mask is"),
        (["--width", "-64"], "width is -64"), (["--width", "0"], "width is 0"),
        (["--width", "100"], "width is 100"),
        (["--height", "-64"], "height is -64"), (["--height", "0"], "height is 0"),
        (["--height", "1"], "height is 1"),
        (["--guidance", "nan"], "guidance is nan"), (["--guidance", "inf"], "guidance is inf"),
        (["--seed", "-1"], "seed is -1"), (["--seed", 2**64], "seed is"), (["--seed", 10**30], "seed is"),
        (["--seed", 2**64 - 1, "--n", "2"], "seed is"), (["--seed", "1.5"], "--seed"),
        (["--sampler", "euler"], "ddim"),
        (["--image", "two\nlines"], "two lines: not a picture that can be used: No such file"),
        (["--dtype", "int8"], "--dtype"), (["--device", "cuda"], "device cuda is not there"),
        (["--device", "nonsense"], "device nonsense is not there"),
        (["--device", "meta"], "device meta is not there"),
        (["--device", "two\nlines"], "device two lines is not there"),
        (["--prompt", os.fsdecode(b"a \xff apple")], "prompt"),
        (["--negative", os.fsdecode(b"\xc3")], "negative"),
        (["--out", "missing/out.png"], "missing"), (["--out", "image.png/out.png"], "image.png"),
        (["--out", "."], ".png"), (["--out", "out.jpg"], "out.jpg"), (["--out", ""], ".png"),
        (["--out", "a" * 300 + ".png"], "aaa"), (["--out", "/proc/out.png"], "/proc"),
    ]  # fmt: skip
    results = run_each([["--weights", small, "--steps", "1", *arguments] for arguments, _ in cases])
    wrong = [
        (arguments, result.stderr)
        for (arguments, word), (_, result) in zip(cases, results, strict=True)
        if word not in (error_of(result) or "")
    ]
    assert wrong == [] and names(tmp_path) == before


def test_a_prompt_is_needed(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "sd.py"], cwd=tmp_path, capture_output=True, text=True)
    assert "--prompt" in error_of(result) and names(tmp_path) == []


def test_without_the_default_model(tmp_path):
    """A copy of sd.py and its vocabulary alone says what to do."""
    shutil.copy(ROOT / "sd.py", tmp_path)
    shutil.copytree(ROOT / "tokenizer_vocab", tmp_path / "tokenizer_vocab")
    before = names(tmp_path)
    result = subprocess.run(
        [sys.executable, "-B", "sd.py", "--prompt", "a red apple"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    error = error_of(result)
    assert "emoji.safetensors: no such file" in error and "weights/README.md" in error
    assert names(tmp_path) == before


def last_line_of(result: subprocess.CompletedProcess) -> str:
    """The error of a run that had begun, and so had said what it runs."""
    assert result.returncode == 2 and result.stdout == ""
    *first, last = result.stderr.splitlines()
    assert len(first) <= 1 and last.startswith("sd.py: error: ")
    return last


@pytest.mark.parametrize("size", [10**7, 8 * 10**29])
def test_a_picture_larger_than_memory(run_sd, small, tmp_path, size):
    assert re.search(
        "memory|width", last_line_of(run_sd("--weights", small, "--width", size, "--height", size))
    )
    assert names(tmp_path) == []


def test_what_is_not_finite_is_not_saved(run_sd, small, tmp_path):
    tensors = load_file(small)
    tensors["model.diffusion_model.out.2.weight"] *= 1e38  # still finite
    save_file(tensors, tmp_path / "wild.safetensors")
    assert "not finite" in last_line_of(run_sd("--weights", "wild.safetensors", *QUICK))
    assert names(tmp_path) == ["wild.safetensors"]


def test_a_full_disk(run_sd, small, tmp_path):
    """Stood in for by a limit on the size of a file, smaller than the picture's."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    error = last_line_of(run_sd("--weights", small, *QUICK, preexec_fn=limit))
    assert "out.png cannot be saved" in error and "make room" in error
    assert names(tmp_path) == []


# ----------------------------------------------------------------------------------------------------- images


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG by hand, of what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_images_that_cannot_be_used(run_each, small, tmp_path):
    photo = photograph()
    whole, jpeg = encoded(photo, "PNG"), encoded(photo, "JPEG")
    animation = {"save_all": True, "append_images": [photo.rotate(90)]}
    files = {
        "empty.png": b"", "text.png": b"not a picture", "corrupt.png": whole[:60] + bytes(200) + whole[260:],
        "bomb.png": png(50_000, 50_000, 1, 0, b"\0"),
        "smaller bomb.png": png(10_000, 10_000, 1, 0, bytes(1251 * 10_000)),
        "animated.gif": encoded(photo, "GIF", **animation),
        "animated.png": encoded(photo, "PNG", **animation),
        "animated.webp": encoded(photo, "WEBP", **animation),
        **{f"truncated at {end}.png": whole[:end] for end in (1, 10, 40, len(whole) // 2, len(whole) - 40)},
        **{f"truncated at {end}.jpg": jpeg[:end] for end in (3, 300, len(jpeg) // 2, len(jpeg) - 100)},
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder.png").mkdir()
    photo.save(tmp_path / "good.png")
    before = names(tmp_path)
    cases = [["--image", name] for name in [*files, "folder.png", "missing.png"]]
    cases += [
        ["--image", "good.png", "--mask", name] for name in ("missing.png", "animated.gif", "empty.png")
    ]
    results = run_each([["--weights", small, *QUICK, *arguments] for arguments in cases])
    wrong = [
        (arguments, result.stderr) for arguments, (_, result) in zip(cases, results, strict=True)
        if not re.search(f"{re.escape(arguments[-1])}.*; use a still PNG", error_of(result) or "")
    ]  # fmt: skip
    assert wrong == [] and names(tmp_path) == before


def test_images_that_are_converted(run_each, small, tmp_path):
    """What a picture was taken for is seen where a black mask keeps it as it is."""
    rgb = pixels(photograph())
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
    alpha = np.tile(ramp, (64, 1))
    over_white = rgb * (alpha[..., None] / 255) + 255 - alpha[..., None]
    grey = np.tile(ramp[:, None], 64)
    grey_over_white = grey * (alpha / 255) + 255 - alpha
    grey16 = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    rows16 = b"".join(b"\0" + row.tobytes() for row in (rgb * 257).astype(">u2"))
    palette = photograph().quantize(16)
    colours = pixels(palette.convert("RGB"))
    clear = np.where((pixels(palette) == 3)[..., None], 255, colours)
    turned, upright = photograph(64, 48), np.rot90(pixels(photograph(64, 48)), -1)
    orientation = Image.Exif()
    orientation[0x0112] = 6  # the camera stood on its side: turn it clockwise
    three = lambda one: np.repeat(one[..., None], 3, axis=2)  # noqa: E731
    cases = {  # name: (file, what it shows, allowed difference)
        "16-bit grey.png": (encoded(Image.fromarray(grey16), "PNG"), three((grey16 / 257).round()), 0),
        "16-bit RGB.png": (png(64, 64, 16, 2, rows16), rgb, 0),
        "palette.png": (encoded(palette, "PNG"), colours, 0),
        "palette.gif": (encoded(palette, "GIF"), colours, 0),
        "transparent palette.png": (encoded(palette, "PNG", transparency=3), clear, 0),
        "CMYK.jpg": (encoded(photograph().convert("CMYK"), "JPEG", quality=100), rgb, 12),
        "RGBA.png": (
            encoded(Image.fromarray(np.dstack([rgb, alpha]).astype(np.uint8)), "PNG"),
            over_white,
            1,
        ),
        "LA.png": (encoded(Image.fromarray(np.dstack([grey, alpha])), "PNG"), three(grey_over_white), 1),
        "1-bit.png": (encoded(Image.fromarray(grey > 99), "PNG"), three(np.where(grey > 99, 255, 0)), 0),
        "grey.png": (encoded(Image.fromarray(grey), "PNG"), three(grey), 0),
        "grey.jpg": (encoded(Image.fromarray(grey), "JPEG", quality=100), three(grey), 3),
        "turned.jpg": (encoded(turned, "JPEG", exif=orientation, quality=100, subsampling=0), upright, 3),
        "turned.webp": (encoded(turned, "WEBP", exif=orientation, lossless=True), upright, 0),
    }
    for name, (data, shown, _) in cases.items():
        (tmp_path / name).write_bytes(data)
        Image.new("L", shown.shape[1::-1], 0).save(tmp_path / f"{name}.mask.png")
    lines = [["--image", name, "--mask", f"{name}.mask.png", "--out", f"{name}.png"] for name in cases]
    results = run_each([["--weights", small, "--steps", "1", *line] for line in lines])
    for (name, (_, shown, allowed)), (_, result) in zip(cases.items(), results, strict=True):
        assert result.returncode == 0, result.stderr
        got = pixels(tmp_path / result.stdout.strip())
        assert got.shape == shown.shape and abs(got - shown).max() <= allowed, name


# -------------------------------------------------------------------------------------------------- full size


def test_full_size_from_each_layout(run_sd, full, tmp_path):
    """The same weights, 4.27 GB, in all three layouts draw the same 512x512 picture."""
    ckpt, folder = tmp_path / "full.ckpt", tmp_path / "full"

    def draw(weights: Path) -> np.ndarray:
        result = run_sd("--weights", weights, "--steps", 2, "--sampler", "dpm++", "--seed", 5)
        assert result.returncode == 0, result.stderr
        assert " 512x512, 2 steps of dpm++, guidance 7.5, seed 5" in result.stderr
        return pixels(tmp_path / result.stdout.strip())

    from_safetensors = draw(full)
    torch.save({"state_dict": load_file(full), "global_step": 470000}, ckpt)
    from_ckpt = draw(ckpt)
    ckpt.unlink()
    make_checkpoint.reference_pipeline(full, folder).save_pretrained(folder)
    from_folder = draw(folder)
    shutil.rmtree(folder)
    assert from_safetensors.shape == (512, 512, 3) and from_safetensors.std() > 20
    assert (from_ckpt == from_safetensors).all() and (from_folder == from_safetensors).all()
