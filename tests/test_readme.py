"""What the README shows is so: its blocks run as they stand, and its code, options and counts are sd.py's."""

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
from conftest import ROOT
from PIL import Image

import sd
from weights import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
WEIGHTS_README = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
CODE = (ROOT / "sd.py").read_text(encoding="utf-8")


def test_python_blocks_run_on_the_default_model(tmp_path, monkeypatch):
    """In one session, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    shutil.copy(sd.DEFAULT_WEIGHTS, "weights/emoji.safetensors")
    loop, *blocks = PYTHON
    assert textwrap.indent(loop, 12 * " ") in CODE
    session: dict = {}
    for block in blocks:
        exec(block, session)
    assert len(blocks) == 3 and session["image"].size == session["again"].size == (128, 128)
    assert sd.load("my-model.safetensors").config == session["model"].config
    assert not session["mean"].requires_grad and (tmp_path / "apple.png").exists()


@pytest.mark.parametrize(
    "command", re.findall(r"^    (?:python|torchrun \S+ \S+) ((?:sd|weights/train)\.py .*)$", README, re.M)
)
def test_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, *arguments = shlex.split(command)
    train.parse(arguments) if script == "weights/train.py" else sd.parse(arguments)


def test_lora_vae_and_upscaling_run_as_shown(tmp_path):
    """With the random files of weights/README.md; in few steps and small."""
    commands = re.findall(r"^    (python tests/make_checkpoint.py --small .+)$", WEIGHTS_README, re.M)
    commands += re.findall(r"^    (python sd.py .+ --lora .+)$", README, re.M)
    for command in commands:
        script, *words = shlex.split(command, comments=True)[1:]
        words += ["--steps", "2", "--width", "64", "--height", "64"] if script == "sd.py" else []
        subprocess.run([sys.executable, str(ROOT / script), *words], cwd=tmp_path, check=True)
    assert len(commands) == 4 and Image.open(tmp_path / "out.png").size == (96, 96)


def test_lines_of_the_figures():
    """Each range begins and ends with the lines that are meant."""
    ends = {
        "1": ("def noise_schedule", "return alphas_cumprod**0.5 * x0"),
        "2": ("for i, t in enumerate(sampler.timesteps)", "yield Step"),
        "3": ("def forward(self, x: Tensor, context", "return self.out("),
        "4": ("def predict_noise", "return predicted"),
        "5": ("if s.image:", "latents = add_noise(original, noise"),
        "6": ("def encode(self, images: Tensor) -> tuple", "return self.decoder("),
        "7": ("if s.mask:", "latents = torch.where(redrawn"),
    }
    ranges = re.findall(r"(\d): \[(\d+)-(\d+)\]\(sd\.py#L(\d+)-L(\d+)\)", README)
    assert sorted(number for number, *_ in ranges) == sorted(ends)
    for number, first, last, *linked in ranges:
        begin, end = (CODE.splitlines()[int(line) - 1].strip() for line in (first, last))
        assert begin.startswith(ends[number][0]) and end.startswith(ends[number][1]), number
        assert linked == [first, last]


def test_options_are_all_there(run_sd):
    """Those of --help, and no others."""
    shown = set(re.findall(r"--[a-z]+", run_sd("--help").stdout)) - {"--help"}
    table = README[README.index("## Options") : README.index("A mistake ends")]
    assert shown == set(re.findall(r"`(--[a-z]+)", table))


def test_line_counts_of_the_sections():
    banners = enumerate((re.match(r"# -+ (\d+) ", line) for line in CODE.splitlines()), 1)
    starts = [(int(match[1]), line) for line, match in banners if match] + [(11, CODE.count("\n") + 1)]
    counts = {number: end - start for (number, start), (_, end) in pairwise(starts)}
    table = re.findall(r"^\| (\d+) [\w ]+ \| (\d+) \|", README, re.M)
    assert {int(number): int(lines) for number, lines in table} == counts
