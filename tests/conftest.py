"""What several tests share: random checkpoints, made once, and the command line as a user runs it."""

import fcntl
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers and transformers are imported
# A shell's background job ignores Ctrl-C, and what it starts does likewise; what is tested here must not.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import make_checkpoint  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import sd  # noqa: E402


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A small random checkpoint, CompVis layout, .safetensors, fp32."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    make_checkpoint.write(path, small=True)
    return path


@pytest.fixture(scope="session")
def small_folder(small) -> Path:
    """The same weights as a diffusers folder, written by diffusers."""
    path = small.parent / "diffusers"
    make_checkpoint.reference_pipeline(small, path, small=True).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def small_model(small) -> sd.StableDiffusion:
    return sd.load(small)


@contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    """Inside, this process's limit of a resource is `value`."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    """A full-size random checkpoint, 4.27 GB, CompVis layout, .safetensors, fp32; gone after the tests."""
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    make_checkpoint.write(path)
    yield path
    path.unlink()


@pytest.fixture
def run_sd(tmp_path):
    """Runs `python sd.py ...` in an empty folder, with a prompt if there is none among the arguments."""

    def run(*arguments, **options) -> subprocess.CompletedProcess:
        arguments = [str(argument) for argument in arguments]
        if "--prompt" not in arguments:
            arguments += ["--prompt", "a red apple"]
        command = [sys.executable, str(ROOT / "sd.py"), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options
        )

    return run


@pytest.fixture
def terminal():
    """Our side of a new terminal of 80 columns, and the side of a process that runs in it."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    yield ours, its
    os.close(ours)


def read_until(terminal: int, pattern: bytes) -> bytes:
    """What a process writes to its terminal until `pattern` shows up or, without one, until it ends."""
    text = b""
    while not (pattern and re.search(pattern, text)):
        try:
            text += os.read(terminal, 1 << 16)
        except OSError:  # the other side is closed
            break
    return text


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photograph(width: int = 64, height: int = 64, seed: int = 0, rows: int = 6) -> Image.Image:
    """An image with smooth colors, no two regions alike, so that wrong resizing and cropping show."""
    colors = np.random.default_rng(seed).integers(0, 256, (rows, rows * 4 // 3, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image)).astype(int)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the output's largest magnitude."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


MEASURED: dict[str, float] = {}


def measured(figure: str, value: float) -> float:
    """`value`, the largest of which, for each figure, is printed when the tests are through."""
    MEASURED[figure] = float(max(value, MEASURED.get(figure, value)))
    return value


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist, which runs the tests in several processes
        session.config.workeroutput["measured"] = MEASURED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for figure, value in getattr(node, "workeroutput", {"measured": {}})["measured"].items():
        measured(figure, value)


def pytest_terminal_summary(terminalreporter):
    if MEASURED:
        terminalreporter.section("measured (the largest of each)")
    for figure, value in MEASURED.items():
        terminalreporter.write_line(f"{figure:<64} {value:.2g}")
