"""What the README shows runs as it stands there."""

import re
import shlex
from dataclasses import replace

import pytest
from conftest import ROOT

import sd

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(small, tmp_path, monkeypatch):
    """In one go, as in a notebook, with a small random model of small pictures in the place of SD v1.5."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    model = sd.StableDiffusion.load(small)
    model.config = replace(model.config, image_size=64)
    model.save("weights/v1-5-pruned-emaonly.safetensors")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    cells = {}
    for block in blocks:
        exec(block, cells)
    assert cells["picture"].size == cells["again"].size == (64, 64)
    assert sd.StableDiffusion.load("my-model.safetensors").config == cells["model"].config


@pytest.mark.parametrize("command", re.findall(r"^    python (sd\.py .*)$", README, re.MULTILINE))
def test_commands_parse(command):
    _, *arguments = shlex.split(command)
    sd.parse_train(arguments[1:]) if arguments[0] == "train" else sd.parse(arguments)


def test_options_are_all_there(run_sd):
    """Those of --help, and no others."""
    shown = set(re.findall(r"--[a-z]+", run_sd("--help").stdout)) - {"--help"}
    assert shown == set(
        re.findall(r"`(--[a-z]+)", README[README.index("## Options") : README.index("## From")])
    )
