"""Section 8: every kind of checkpoint that people have gives the same weights, and `save` loses nothing."""

import json
import math
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, measured
from make_checkpoint import layout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sd

TINY = sd.Config(  # no field but latent_channels is Stable Diffusion's
    image_size=64, vocab_size=600, text_length=16, text_width=32, text_layers=1, text_heads=2,
    latent_scale=0.5, vae_widths=(8, 16), vae_blocks=1, unet_widths=(8, 16), unet_attends=(True, False),
    unet_blocks=1, unet_heads=2, norm_groups=4, timesteps=100, beta_start=0.001, beta_end=0.02,
)  # fmt: skip

save_zip = torch.save
save_legacy = partial(torch.save, _use_new_zipfile_serialization=False)
SAVE = {"safetensors": save_file, "zip": save_zip, "legacy": save_legacy}


def random_model(config: sd.Config) -> sd.StableDiffusion:
    torch.manual_seed(0)
    return sd.StableDiffusion(config)


@pytest.fixture(scope="module")
def tensors(small) -> dict[str, torch.Tensor]:
    """The small CompVis checkpoint as the safetensors library reads it."""
    return load_file(small)


@pytest.fixture(scope="module")
def expected(small_model) -> dict[str, torch.Tensor]:
    return small_model.state_dict()


def load(path, **options) -> sd.StableDiffusion:
    """A model of whose checkpoint no tensor was left over, nor anything else warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sd.StableDiffusion.load(path, **options)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, NaNs included."""
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same(ours[name], theirs[name])] == []


# -------------------------------------------------------------------------------------- CompVis's single file


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", SAVE)
def test_content_decides_and_not_the_name(kind, suffix, tmp_path, tensors, expected):
    path = tmp_path / f"model{suffix}"
    SAVE[kind](tensors, path)
    assert_same(load(path).state_dict(), expected)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (
            "text_encoder.layers.3.attention.qkv.bias",
            "cond_stage_model.transformer.text_model.encoder.layers.3.self_attn.{}_proj.bias",
        ),
        (
            "unet.up.1.blocks.2.transformer.cross_attention.kv.weight",
            "model.diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_{}.weight",
        ),
        (
            "unet.middle.0.transformer.self_attention.qkv.weight",
            "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_{}.weight",
        ),
        ("vae.decoder.middle.1.qkv.weight", "first_stage_model.decoder.mid.attn_1.{}.weight"),
    ],
)
def test_q_k_and_v_are_joined_in_this_order(ours, theirs, tensors, expected):
    letters = ours.split(".")[-2]
    joined = torch.cat([tensors[theirs.format(letter)] for letter in letters])
    assert same(expected[ours], joined.view_as(expected[ours]))


@pytest.mark.parametrize("save", [save_zip, save_legacy], ids=["zip", "legacy"])
def test_a_state_dict_level(save, tmp_path, tensors, expected):
    save({"state_dict": tensors, "global_step": 470000, "epoch": 1}, tmp_path / "model.ckpt")
    assert_same(load(tmp_path / "model.ckpt").state_dict(), expected)


# What training loops leave beside the weights, of a module that is there when they write, not when we read.
TRAINING_LOOP = """
import collections, dataclasses, enum, functools, datetime, decimal, pathlib
import numpy as np, torch

class ModelCheckpoint:
    def hook(self): pass

class AttributeDict(dict):
    pass

class History(list):
    pass

class Tags(set):
    pass

class Stage(enum.Enum):
    FIT = "fit"

class Precision(enum.IntFlag):
    HALF, FULL = 1, 2

@dataclasses.dataclass
class Settings:
    rate: float = 1e-4

@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    rate: float = 1e-4

Point = collections.namedtuple("Point", "x y")

class Stateful:
    def __getstate__(self):
        return [1, 2, 3]
    def __setstate__(self, state):
        raise RuntimeError("this must not run")

class Reduced:
    def __reduce__(self):
        return Reduced, (), {"state": 1}, iter([1, 2]), iter({"a": 1, "b": 2}.items())
    def append(self, item): pass
    def extend(self, items): pass
    def __setitem__(self, key, item): pass

class NewWithArguments:
    def __new__(cls, number, *, name): return super().__new__(cls)
    def __getnewargs_ex__(self): return (1,), {"name": "x"}

def relic():
    callback = ModelCheckpoint()
    callback.owner = callback
    return {
        "epoch": 250, "global_step": np.int64(470000), "pytorch-lightning_version": "1.4.2",
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.1), "self": callback}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [{"_step_count": 5, "lr_lambdas": [None, functools.partial(max, 1)]}],
        "hparams_name": "config", "hyper_parameters": AttributeDict(a=AttributeDict(b=1)),
        "objects": [
            History([1, 2, 3]), Tags("ab"), Stage.FIT, Precision.HALF, Settings(), Frozen(), Point(1, 2),
            Stateful(), Reduced(), NewWithArguments(1, name="x"), callback.hook, Stage, relic,
        ],
        "numpy": [
            np.float32(1), np.bool_(True), np.arange(3), np.dtype("float32"), np.random.RandomState(0),
        ],
        "python": [
            {1, 2}, frozenset({1}), 1j, b"bytes", bytearray(b"bytes"), slice(1), range(3), Ellipsis, 2**100,
            datetime.datetime(2022, 8, 22), decimal.Decimal("0.1"), pathlib.PurePosixPath("logs"), "\\u20ac",
            collections.Counter("ab"), collections.defaultdict(list, a=[1]), collections.deque([1]), max,
        ],
        "torch": [
            torch.device("cpu"), torch.float16, torch.Size([1, 2]), torch.get_rng_state(),
            torch.nn.Linear(2, 2),
        ],
    }
"""


@contextmanager
def training_loop():
    """The module of TRAINING_LOOP, under a name that no longer leads anywhere afterwards."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    sys.modules |= {"pytorch_lightning": module, "pytorch_lightning.callbacks": module, name: module}
    try:
        exec(TRAINING_LOOP, module.__dict__)
        yield module
    finally:
        for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
            del sys.modules[name]


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("save", [save_zip, save_legacy], ids=["zip", "legacy"])
def test_foreign_objects_beside_the_weights(save, protocol, tmp_path, tensors, expected):
    path = tmp_path / "sd-v1-4.ckpt"
    with training_loop() as loop:
        before, after = (list(loop.relic().items()) for _ in range(2))
        content = dict(before[:4]) | {"state_dict": tensors} | dict(after[4:])
        save(content, path, pickle_protocol=protocol)
    with pytest.raises((ImportError, AttributeError)):  # an ordinary reader does need the module
        torch.load(path, weights_only=False)
    assert_same(load(path).state_dict(), expected)
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def test_an_object_is_inert_whatever_it_is_told(tmp_path):
    """Each of pickle's opcodes that makes or changes an object, on one of a class that is not there."""
    opcodes = {
        "REDUCE": b"cnowhere\nThing\n(K\x01tR",
        "NEWOBJ": b"\x80\x02cnowhere\nThing\n(K\x01t\x81",
        "NEWOBJ_EX": b"\x80\x04cnowhere\nThing\n(K\x01t}\x92",
        "INST": b"(K\x01inowhere\nThing\n",
        "OBJ": b"(cnowhere\nThing\nK\x01o",
        "STACK_GLOBAL": b"\x80\x04\x8c\x07nowhere\x8c\x09Outer.Own\x93)R",
        "BUILD": b"cnowhere\nThing\n)R}X\x01\x00\x00\x00aK\x01sb",
        "BUILD, of slots": b"cnowhere\nThing\n)RN}X\x01\x00\x00\x00aK\x01s\x86b",
        "APPEND": b"cnowhere\nThing\n)RK\x01a",
        "APPENDS": b"cnowhere\nThing\n)R(K\x01K\x02e",
        "SETITEM": b"cnowhere\nThing\n)RK\x01K\x02s",
        "SETITEMS": b"cnowhere\nThing\n)R(K\x01K\x02u",
        "ADDITEMS": b"\x80\x04cnowhere\nThing\n)R(K\x01K\x02\x90",
    }
    for name, code in opcodes.items():
        write_pickle(tmp_path / "model.ckpt", b"}X\x01\x00\x00\x00x" + code + b"s.")
        assert list(sd.read_file(tmp_path / "model.ckpt")[0]) == ["x"], name


# ----------------------------------------------------------------------------------- a pickle never runs code


def write_pickle(path, code: bytes, kind: str = "zip") -> None:
    """A file in one of PyTorch's formats, without storages, whose object is the pickle `code`."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", code)
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + code + pickle.dumps([], 2))


class Call:
    """Pickled as a call, with what else `__reduce__` may return: it runs where it is unpickled."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args, state)

    def __reduce__(self):
        return self.call


def attacks(trace: str) -> dict[str, bytes]:
    """Pickles each of which makes the folder `trace` when Python unpickles it."""

    def text(string: str) -> bytes:
        return b"X" + struct.pack("<I", len(string)) + string.encode()

    call = Call(os.mkdir, trace)
    pickled = {
        "os.system": Call(os.system, f"mkdir {trace}"),
        "subprocess": Call(subprocess.check_call, ["mkdir", trace]),
        "eval": Call(eval, f"__import__('os').mkdir({trace!r})"),
        "exec": Call(exec, f"import os; os.mkdir({trace!r})"),
        "a call's result, called": Call(partial(os.mkdir, trace)),
        "as a weight": {"state_dict": {"model.weight": call}},
        "as a name": {"state_dict": {call: 1}},
        "deep in a callback": {"callbacks": [[({"a": call},)]], "state_dict": {}},
        "as an argument of a tensor": Call(torch._utils._rebuild_tensor_v2, call, 0, (), (), False, {}),
        "as an argument of a dict": Call(dict, call),
        "as a state": Call(types.SimpleNamespace, state={"a": call}),
    }
    mkdir = b"cos\nmkdir\n"
    assembled = {
        "GLOBAL and REDUCE": mkdir + b"(" + text(trace) + b"tR.",
        "STACK_GLOBAL": b"\x8c\x02os\x8c\x05mkdir\x93(" + text(trace) + b"tR.",
        "STACK_GLOBAL, dotted": b"\x8c\x07pathlib\x8c\x0aPath.mkdir\x93(cpathlib\nPath\n("
        + text(trace) + b"tRtR.",
        "INST": b"(" + text(trace) + b"ios\nmkdir\n.",
        "OBJ": b"(" + mkdir + text(trace) + b"o.",
        "BUILD": b"ctypes\nSimpleNamespace\n)R}" + text("__setstate__") + mkdir + b"sb" + text(trace) + b"b.",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR" + text("mkdir")
        + b"tR("
        + text(trace) + b"tR.",
        "in a storage's name": b"((" + text("storage") + mkdir + b"(" + text(trace) + b"tRtQ.",
        "on import": b"cmodule_that_acts\nanything\n.",
    }  # fmt: skip
    return {name: pickle.dumps(value, 2) for name, value in pickled.items()} | {
        name: b"\x80\x04" + code for name, code in assembled.items()
    }


@pytest.mark.parametrize("name", attacks(""))
def test_a_pickle_runs_nothing(name, tmp_path, monkeypatch):
    trace = tmp_path / "trace"
    attack = attacks(str(trace))[name]
    (tmp_path / "module_that_acts.py").write_text(f"import os; os.mkdir({str(trace)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    with suppress(Exception):
        pickle.loads(attack)
    trace.rmdir()  # it was there: the attack works on who lets it
    sys.modules.pop("module_that_acts", None)

    path = tmp_path / "model.ckpt"
    for kind in ("zip", "legacy", "alone"):
        path.write_bytes(attack) if kind == "alone" else write_pickle(path, attack, kind)
        with pytest.raises(ValueError, match="model.ckpt: "):
            sd.StableDiffusion.load(path)
        assert not trace.exists() and "module_that_acts" not in sys.modules


def test_code_beside_the_weights_is_passed_over(tmp_path, tensors, expected):
    trace = tmp_path / "trace"
    content = {"callbacks": {"a": Call(os.mkdir, str(trace))}, "state_dict": tensors}
    torch.save(content, tmp_path / "model.ckpt")
    assert_same(load(tmp_path / "model.ckpt").state_dict(), expected)
    assert not trace.exists()


# ------------------------------------------------------------------------------------------------- fine-tunes


def without(pattern: str):
    return lambda tensors: {name: value for name, value in tensors.items() if not re.search(pattern, name)}


def renamed(pattern: str, replacement: str):
    return lambda tensors: {re.sub(pattern, replacement, name): value for name, value in tensors.items()}


def with_averages(tensors):
    """Averaged weights as CompVis's LitEma names them, without dots."""
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value * 2
        for name, value in tensors.items() if name.startswith("model.diffusion_model.")
    }  # fmt: skip
    settings = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}
    return tensors | averages | settings


FINE_TUNES = {
    "no position_ids": without("position_ids"),
    "position_ids in floats": lambda tensors: tensors | {
        name: value.float() for name, value in tensors.items() if "position_ids" in name
    },
    "no averages and no schedule": without(r"^model_ema\.|^\w+$"),
    "averages": with_averages,
    "more of the schedule": lambda tensors: tensors | {"logvar": torch.ones(9), "scale": torch.ones(())},
    "what served the autoencoder's training": lambda tensors: tensors | {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4),
    },
    "what CLIP compares with pictures": lambda tensors: tensors | {
        "cond_stage_model.transformer.text_projection.weight": torch.zeros(64, 64),
        "cond_stage_model.transformer.text_model.text_projection": torch.zeros(64, 64),
        "cond_stage_model.logit_scale": torch.zeros(()),
    },
    "no text_model": renamed(r"transformer\.text_model\.", "transformer."),
    "another order": lambda tensors: dict(sorted(tensors.items(), reverse=True)),
    "1x1 convolutions as matrices": lambda tensors: {
        name: value.flatten(1) if value.shape[2:] == (1, 1) else value for name, value in tensors.items()
    },
    "matrices as 1x1 convolutions": lambda tensors: tensors | {
        name: value[:, :, None, None]
        for name, value in tensors.items() if re.search(r"(attn\d\.to_\w|net\.2|embed\.\d)\.weight", name)
    },
}  # fmt: skip


@pytest.mark.parametrize("change", FINE_TUNES.values(), ids=FINE_TUNES)
def test_fine_tunes(change, tmp_path, tensors, expected):
    changed = change(tensors)
    assert list(changed) != list(tensors) or any(changed[name] is not tensors[name] for name in tensors)
    torch.save(changed, tmp_path / "model.ckpt")
    assert_same(load(tmp_path / "model.ckpt").state_dict(), expected)


def weights_to(dtype: torch.dtype, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


@pytest.mark.parametrize("kind", SAVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype, kind, tmp_path, tensors, expected):
    path = tmp_path / "model"
    SAVE[kind](weights_to(dtype, tensors), path)
    rounded = weights_to(dtype, expected)
    assert_same(load(path, dtype=dtype).state_dict(), rounded)
    assert_same(load(path).state_dict(), weights_to(torch.float32, rounded))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_of_eight_bits(dtype, tmp_path, tensors, expected):
    """As some keep them in .safetensors to save room; they are computed with in other dtypes only."""
    save_file(weights_to(dtype, tensors), tmp_path / "model.safetensors")
    rounded = weights_to(torch.float16, weights_to(dtype, expected))
    assert_same(load(tmp_path / "model.safetensors", dtype=torch.float16).state_dict(), rounded)


def test_dtypes_side_by_side(tmp_path, tensors, expected):
    """Some merges keep the autoencoder in float32 and the rest in float16."""
    vae = {name: value for name, value in tensors.items() if name.startswith("first_stage_model.")}
    save_file(weights_to(torch.float16, tensors) | vae, tmp_path / "model.safetensors")
    rounded = weights_to(torch.float32, weights_to(torch.float16, expected))
    vae = {name: value for name, value in expected.items() if name.startswith("vae.")}
    assert_same(load(tmp_path / "model.safetensors").state_dict(), rounded | vae)


@pytest.mark.parametrize("save", [save_zip, save_legacy], ids=["zip", "legacy"])
def test_views_and_parameters_in_a_pickle(save, tmp_path, tensors, expected):
    """Transposed, sharing a storage, expanded, and parameters: all are stored as such."""
    joined = torch.cat([tensor.flatten() for tensor in tensors.values() if tensor.dtype == torch.float32])
    views, start = {}, 0
    for i, (name, tensor) in enumerate(tensors.items()):
        if tensor.dtype == torch.float32:
            views[name] = joined[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()
        if i % 3 == 0:
            view = tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
            views[name] = nn.Parameter(view, requires_grad=tensor.is_floating_point())
    zeros = next(name for name in tensors if name.endswith("out.2.bias"))
    views[zeros] = torch.zeros(1).expand_as(tensors[zeros])
    save(views, tmp_path / "model.ckpt")
    without_bias = expected | {"unet.conv_out.bias": torch.zeros_like(expected["unet.conv_out.bias"])}
    assert_same(load(tmp_path / "model.ckpt").state_dict(), without_bias)


def header(entries: Iterable[tuple[str, list[int], str]], length: Callable[[int], int]) -> tuple[bytes, int]:
    """A safetensors file's start, filled up to `length` of its natural length, and how much is to follow."""
    places, end = {}, 0
    for name, shape, dtype in entries:
        begin, end = end, end + math.prod(shape) * int(dtype[1:]) // 8
        places[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(places).encode()
    text = text.ljust(length(len(text)))
    return struct.pack("<Q", len(text)) + text, end


@pytest.mark.parametrize(
    "length",
    [
        lambda n: n // 8 * 8 + 9,
        lambda n: n // 8 * 8 + 12,
        lambda n: n // 0x100 * 0x100 + 0x100 + ord("<"),
        lambda n: n // 0x10000 * 0x10000 + 0x10000 + ord("<") * 0x100 + ord(" "),
    ],
    ids=["by 1", "by 4", "like a web page", "like a web page after a space"],
)
def test_a_header_of_any_length(length, tmp_path, tensors, expected):
    """The format asks for no alignment, and the length itself may look like text."""
    path = tmp_path / "model.safetensors"
    dtypes = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32"}
    head, _ = header(
        [(name, list(value.shape), dtypes[value.dtype]) for name, value in tensors.items()], length
    )
    path.write_bytes(head + b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
    assert_same(load_file(path), tensors)  # the library agrees that it is a good file
    model = load(path)
    assert_same(model.state_dict(), expected)
    assert all(parameter.data_ptr() % parameter.itemsize == 0 for parameter in model.parameters())


# ------------------------------------------------------------------------------------------ diffusers' folder


@pytest.fixture
def folder(small_folder, tmp_path):
    """A copy of the small diffusers folder, to be changed."""
    return shutil.copytree(small_folder, tmp_path / "folder", ignore=shutil.ignore_patterns("tokenizer"))


def weights_of(folder) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def test_diffusers_folder(folder, expected, small_model):
    assert [path.parent.name for path in weights_of(folder)] == ["text_encoder", "unet", "vae"]
    model = load(folder)
    assert_same(model.state_dict(), expected)
    assert model.config == small_model.config


BIN_NAMES = {
    "text_encoder": "pytorch_model.bin",
    "unet": "diffusion_pytorch_model.bin",
    "vae": "diffusion_pytorch_model.bin",
}


def test_diffusers_bin(folder, expected):
    for path in weights_of(folder):
        torch.save(load_file(path), path.with_name(BIN_NAMES[path.parent.name]))
        path.unlink()
    assert_same(load(folder).state_dict(), expected)


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_diffusers_fp16_variant(kind, folder, expected):
    exact = weights_of(folder)
    for path in exact:
        name = Path(path.name if kind == "safetensors" else BIN_NAMES[path.parent.name])
        SAVE[kind](
            weights_to(torch.float16, load_file(path)), path.with_name(f"{name.stem}.fp16{name.suffix}")
        )
    assert_same(load(folder).state_dict(), expected)  # where there are both, the exact ones
    for path in exact:
        path.unlink()
    assert_same(load(folder, dtype=torch.float16).state_dict(), weights_to(torch.float16, expected))


@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "1x1 convolution"])
def test_diffusers_old_attention_names(convolution, folder, expected):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = load_file(path)
    for ours, theirs in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        old = {name.replace(f".{ours}.", f".{theirs}."): value for name, value in old.items()}
    changed = [name for name in old if re.search(r"\.(query|key|value|proj_attn)\.weight$", name)]
    assert len(changed) == 8
    if convolution:
        old |= {name: old[name][:, :, None, None] for name in changed}
    save_file(old, path)
    assert_same(load(folder).state_dict(), expected)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_diffusers_text_encoder_with_and_without_prefix(prefix, folder, expected):
    path = folder / "text_encoder" / "model.safetensors"
    names = {name: prefix + name.removeprefix("text_model.") for name in load_file(path)}
    save_file({names[name]: value for name, value in load_file(path).items()}, path)
    assert_same(load(folder).state_dict(), expected)


def test_diffusers_folder_without_configs(folder, expected, small_model):
    for path in folder.rglob("*.json"):
        path.unlink()
    model = load(folder)
    assert_same(model.state_dict(), expected)
    assert model.config == small_model.config


def test_diffusers_configs_say_what_shapes_do_not(folder, small_model):
    changes = {
        "text_encoder": {"num_attention_heads": 2}, "vae": {"scaling_factor": 0.5},
        "unet": {"attention_head_dim": 4, "norm_num_groups": 16},
    }  # fmt: skip
    for part, change in changes.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    changed = replace(small_model.config, text_heads=2, latent_scale=0.5, unet_heads=4, norm_groups=16)
    assert load(folder).config == changed


# --------------------------------------------------------------------------------- every tensor has its place


def test_every_name_of_the_released_checkpoint(tmp_path):
    """Each of v1-5-pruned-emaonly is one of ours or known as unneeded; the file is full-size, a hole."""
    path = tmp_path / "model.safetensors"
    head, size = header(layout(), lambda n: n // 8 * 8 + 8)
    path.write_bytes(head)
    os.truncate(path, len(head) + size)

    config, found, _ = sd.read_model(path)
    assert config == sd.Config()
    with torch.device("meta"):
        wanted = sd.StableDiffusion(config).state_dict()
    shapes = {}
    for name, tensor in wanted.items():
        owner, layer, kind = name.rsplit(".", 2)
        letters = layer if layer in ("qkv", "kv") else [layer]  # these are one of ours and several of theirs
        for letter in letters:
            shapes[f"{owner}.{letter}.{kind}"] = (
                tensor.shape[0] // len(letters),
                tensor.numel() // len(letters),
            )
    assert {name: (tensor.shape[0], tensor.numel()) for name, tensor in found.items()} == shapes


def test_unused_tensors_are_named(tmp_path, tensors, expected):
    extra = {f"guide{dot}{i}{dot}weight": torch.zeros(2) for i, dot in enumerate("..__.")}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    with pytest.warns(
        UserWarning, match=r"model\.safetensors: 5 tensors .*guide.\d.weight, .*, .* and 2 more"
    ) as record:
        model = sd.StableDiffusion.load(tmp_path / "model.safetensors")
    assert len(record) == 1 and len(set(re.findall(r"guide.\d.weight", str(record[0].message)))) == 3
    assert_same(model.state_dict(), expected)


# ------------------------------------------------------------------------------------------------ safetensors


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def assorted_tensors() -> dict[str, torch.Tensor]:
    """Random bits in each dtype and several shapes, in an order that aligns none of them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for shape in [(), (0,), (3, 0, 2), (1,), (3, 5), (2, 1, 3, 7)]:
        for dtype in DTYPES:
            bits = torch.randint(
                0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator
            )
            tensor = bits.bool() if dtype == torch.bool else bits.view(dtype)
            tensors[f'{dtype} {list(shape)} \u00e9 \U0001f34e " \\ \n'] = tensor.view(shape)
    return tensors


METADATA = {"format": "pt", "\u4f5c\u8005": '\U0001f34e " \\ \n', "empty": ""}


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    name_of = lambda file: os.readlink(f"/proc/self/fd/{file}")
    monkeypatch.setattr(os, "fsync", lambda file: done.append(name_of(file)) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append(names) or replace(*names))
    path = tmp_path / "ours.safetensors"
    sd.write_safetensors(path, {"a": torch.zeros(3)}, {})
    [synced, (temporary, name)] = done
    assert synced == str(temporary) != str(name) == str(path) and load_file(path)["a"].shape == (3,)


def test_the_library_reads_ours(tmp_path):
    path, tensors = tmp_path / "ours.safetensors", assorted_tensors()
    tensors["transposed"] = torch.arange(12).view(3, 4).T
    sd.write_safetensors(path, tensors, METADATA)
    assert_same(load_file(path), tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == METADATA


def test_we_read_the_library_s(tmp_path):
    path, tensors = tmp_path / "theirs.safetensors", assorted_tensors()
    save_file(tensors, path, METADATA)
    ours, metadata, _ = sd.read_file(path)
    assert_same(ours, tensors)
    assert metadata == METADATA
    save_file({}, path)
    assert sd.read_file(path)[:2] == ({}, {})


# ----------------------------------------------------------------------------------------------- our own file


def test_own_file_keeps_config_and_weights(tmp_path):
    model, path = random_model(TINY), tmp_path / "tiny.safetensors"
    model.save(path)
    again = load(path)
    assert again.config == model.config == TINY
    assert_same(again.state_dict(), model.state_dict())
    assert_same(load_file(path), model.state_dict())
    with safe_open(path, "pt") as file:
        [config] = [value for key, value in file.metadata().items() if key != "format"]
    assert json.loads(config) == json.loads(json.dumps(asdict(TINY)))
    assert list(tmp_path.iterdir()) == [path]


def test_own_file_of_a_checkpoint(tmp_path, small_model, expected):
    small_model.save(tmp_path / "own")
    model = load(tmp_path / "own")
    assert model.config == small_model.config
    assert_same(model.state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_so(dtype, tmp_path, small, expected):
    load(small, dtype=dtype).save(tmp_path / "half.safetensors")
    halves = weights_to(dtype, expected)
    assert_same(load_file(tmp_path / "half.safetensors"), halves)
    assert_same(load(tmp_path / "half.safetensors", dtype=dtype).state_dict(), halves)


def test_saved_over_the_file_it_is_mapped_from(tmp_path, small, expected):
    path = tmp_path / "model.safetensors"
    shutil.copy(small, path)
    for _ in range(2):
        model = load(path)
        model.save(path)
        assert_same(model.state_dict(), expected)
    assert_same(load(path).state_dict(), expected)
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def full_disk(folder):
    """No file can grow over 100 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def no_permission(folder):
    """Nothing can be written in the folder; root, who may everything, becomes nobody."""
    user = os.geteuid()
    folder.chmod(0o555)
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def unwritable(model: sd.StableDiffusion) -> sd.StableDiffusion:
    """The last tensors of the model can no longer be written."""
    model.unet.to("meta")
    return model


@pytest.mark.parametrize(
    "trouble, spoil, error",
    [
        (full_disk, lambda model: model, OSError),
        (no_permission, lambda model: model, PermissionError),
        (nullcontext, unwritable, NotImplementedError),
    ],
    ids=["full disk", "no permission", "an exception midway"],
)
def test_a_failed_save_leaves_the_old_file(trouble, spoil, error, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "model.safetensors"
    random_model(TINY).save(path)
    old, model = path.read_bytes(), spoil(random_model(TINY))
    with trouble(folder), pytest.raises(error):
        model.save(path)
    assert path.read_bytes() == old
    assert list(folder.iterdir()) == [path]


def test_save_to_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        random_model(TINY).save(tmp_path / "missing" / "model.safetensors")
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_weights_stay_in_the_file(kind, tmp_path, tensors):
    """All but q, k and v, which are joined, lie in the file's map; the map is private, the file stays."""
    path = tmp_path / "model"
    SAVE[kind](tensors, path)
    content = path.read_bytes()
    model = load(path)
    lines = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))
    ]
    ranges = [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines]
    outside = [
        name
        for name, tensor in model.state_dict().items()
        if not any(tensor.data_ptr() in place for place in ranges)
    ]
    assert [name for name in outside if ".qkv." not in name and ".kv." not in name] == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == content


def test_converted_convolutions_are_channels_last(tmp_path, tensors):
    """What stays in the file is as it is there; what a device or a dtype takes along has the fast layout."""
    SAVE["safetensors"](tensors, path := tmp_path / "model")
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
        weight = sd.StableDiffusion.load(path, dtype=dtype).unet.conv_in.weight
        assert weight.is_contiguous(memory_format=layout)


CONVERT = """
import sys, sd

def peak_gigabytes():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20

before = peak_gigabytes()
model = sd.StableDiffusion.load(sys.argv[1], dtype=sd.DTYPES["bf16"])
print(peak_gigabytes() - before, sum(parameter.nbytes for parameter in model.parameters()) / 2**30)
"""


def test_a_conversion_takes_the_memory_of_its_result(full):
    """And not of what it was made of, which is twice as large."""
    result = subprocess.run(
        [sys.executable, "-c", CONVERT, full], cwd=ROOT, capture_output=True, text=True, check=True
    )
    peak, weights = map(float, result.stdout.split())
    assert weights < measured("gigabytes at peak to load 4.27 GB as bf16", peak) < 1.2 * weights


FAULTS = """
import resource, sys, torch, sd

if sys.argv[1:]:
    sd.reuse_memory()
for _ in range(20):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is a matter of Linux")
def test_freed_memory_is_used_again():
    """64 MiB, 20 times: 16,384 pages each time, or once."""
    command = [sys.executable, "-c", FAULTS]
    plain, reused = (
        int(subprocess.run([*command, *more], cwd=ROOT, capture_output=True, check=True).stdout)
        for more in ([], ["reuse"])
    )
    assert plain - reused > 10 * 16384


MEASURE = """
import sys, time, sd

def private_megabytes():
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

before, start = private_megabytes(), time.perf_counter()
model = sd.StableDiffusion.load(sys.argv[1])
print(time.perf_counter() - start, private_megabytes() - before)
assert sum(parameter.nbytes for parameter in model.parameters()) > 4e9
"""


def test_full_size_loads_without_a_copy(full):
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, full], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, megabytes = map(float, result.stdout.split())
    measured("seconds to load 4.27 GB", seconds)
    assert measured("megabytes of private memory for it", megabytes) < 500
