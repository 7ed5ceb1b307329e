"""Section 9: each kind of checkpoint loads to the same weights, and `save` writes what other programs open."""

import importlib
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import make_checkpoint
import pytest
import torch
from conftest import ROOT, measured, relative_error
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import sd

TINY = sd.Config(  # no field is as in Stable Diffusion v1
    image_size=64, vocab_size=600, text_length=16, text_dim=32, text_layers=1, text_heads=2, latent_channels=6,
    latent_scale=0.5, vae_channels=(8, 16), vae_blocks=1, unet_channels=(8, 16, 24),
    unet_attention=(True, False, True), unet_blocks=1, unet_heads=2, norm_groups=4, timesteps=100,
    beta_start=0.001, beta_end=0.02,
)  # fmt: skip
TINY_FOLDER = {  # the same in diffusers' words
    "text_encoder": {
        "vocab_size": 600, "max_position_embeddings": 16, "hidden_size": 32, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 32, "bos_token_id": 598,
        "eos_token_id": 599, "pad_token_id": 599,
    },
    "vae": {
        "sample_size": 64, "latent_channels": 6, "scaling_factor": 0.5, "block_out_channels": [8, 16],
        "layers_per_block": 1, "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "unet": {
        "sample_size": 32, "in_channels": 6, "out_channels": 6, "block_out_channels": [8, 16, 24],
        "layers_per_block": 1, "attention_head_dim": 2, "cross_attention_dim": 32, "norm_num_groups": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "scheduler": {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.02},
}  # fmt: skip
METADATA = {"sd.py": json.dumps(asdict(TINY))}
Tensors = dict[str, torch.Tensor]


def save_zip(tensors: Tensors, path: Path, metadata: dict = METADATA, **options) -> None:
    torch.save({"epoch": 1, "state_dict": tensors} | metadata, path, **options)


save_legacy = partial(save_zip, _use_new_zipfile_serialization=False)
SAVE = {
    "safetensors": lambda tensors, path, metadata=METADATA: save_file(tensors, path, metadata),
    "zip": save_zip,
    "legacy": save_legacy,
}


def random_model(config: sd.Config) -> sd.StableDiffusion:
    torch.manual_seed(0)
    model = sd.StableDiffusion(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def load(path: Path, **options) -> sd.StableDiffusion:
    """Loads without any warning, so that no tensor is left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sd.load(path, **options)


def refusal(path: Path) -> str | None:
    """The one line, with the path in it, that says why a checkpoint is refused; None if it loads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sd.load(path)
    except (ValueError, OSError) as error:
        [line] = str(error).splitlines()
        assert str(path) in line and len(line) < 700 + len(str(path))
        return line


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit-equal, NaN included."""
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not same(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    sd.save(random_model(TINY), path)
    return path


@pytest.fixture(scope="module")
def expected() -> Tensors:
    return random_model(TINY).state_dict()


@pytest.fixture(scope="module")
def tensors(tiny) -> Tensors:
    """The tiny checkpoint as the safetensors library reads it, with the other tensors of the released file."""
    others = {name: shape for name, shape, _ in make_checkpoint.layout() if "." not in name}
    return load_file(tiny) | {name: torch.zeros(shape) for name, shape in others.items()}


@pytest.fixture(scope="module")
def released() -> Tensors:
    """All tensors of v1-5-pruned-emaonly, without their numbers."""
    dtypes = make_checkpoint.SAVED_DTYPES
    return {
        name: torch.empty(shape, dtype=dtypes[dtype], device="meta")
        for name, shape, dtype in make_checkpoint.layout()
    }


def header(
    tensors: Tensors, metadata: dict | None = None, align: int = 1, extra: int = 0
) -> tuple[bytes, int]:
    """The start of a .safetensors file, filled up to a multiple of `align` and more, and the size of the rest."""
    names = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32"}
    entries, end = {"__metadata__": metadata or {}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % align + extra)
    return struct.pack("<Q", len(text)) + text, end


def write_sparse(tensors: Tensors, path: Path) -> None:
    """A .safetensors file of zeros, however large, that takes no room on the disk."""
    head, size = header(tensors)
    path.write_bytes(head)
    os.truncate(path, len(head) + size)


# -------------------------------------------------------------------------------------- CompVis's single file


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", SAVE)
def test_content_decides_and_not_the_suffix(kind, suffix, tmp_path, tensors, expected):
    path = tmp_path / f"sd-v1.5{suffix}"
    SAVE[kind](tensors, path)
    model = load(path)
    assert_same(model.state_dict(), expected)
    assert model.config == TINY and model.name == "sd-v1.5"


def test_names_of_the_released_checkpoint(small, small_model):
    """A sample, written out; test_models.py compares the outputs of all."""
    theirs, ours = load_file(small), small_model.state_dict()
    layer, clip = "transformer_blocks.0.attn", "cond_stage_model.transformer.text_model.encoder.layers.3"
    for name, its_name in {
        "text_encoder.layers.3.attention.k.bias": f"{clip}.self_attn.k_proj.bias",
        "unet.up.1.2.transformer.cross_attention.v.weight": f"model.diffusion_model.output_blocks.5.1.{layer}2.to_v.weight",
        "unet.middle.0.transformer.self_attention.q.weight": f"model.diffusion_model.middle_block.1.{layer}1.to_q.weight",
        "unet.upsample.0.conv.weight": "model.diffusion_model.output_blocks.2.1.conv.weight",
        "vae.decoder.middle.1.out.weight": "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "vae.decoder.up.0.1.conv2.weight": "first_stage_model.decoder.up.3.block.1.conv2.weight",
    }.items():  # fmt: skip
        assert same(ours[name], theirs[its_name].view_as(ours[name])), name


def test_save_writes_the_released_layout(small, small_model, tmp_path):
    """Names, shapes, dtypes and numbers are those of the file that was loaded, training's own aside."""
    sd.save(small_model, tmp_path / "own.safetensors")
    theirs = {
        name: tensor for name, tensor in load_file(small).items() if re.search(r"^(?!model_ema).*\.", name)
    }
    assert_same(load_file(tmp_path / "own.safetensors"), theirs)
    with safe_open(tmp_path / "own.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "pt", "sd.py": json.dumps(asdict(small_model.config))}


def test_full_size_save_opens_in_diffusers(full, tmp_path):
    model, path = load(full), tmp_path / "own.safetensors"
    assert model.config == sd.Config()
    sd.save(model, path)
    with safe_open(path, "pt") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        layout = {name: (view.get_shape(), view.get_dtype()) for name, view in views.items()}
    assert layout == {
        name: (shape, dtype)
        for name, shape, dtype in make_checkpoint.layout()
        if "." in name and not name.startswith("model_ema.")
    }

    theirs = make_checkpoint.reference_pipeline(path, tmp_path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(49408, (1, 77), generator=generator)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    images = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        context, t = model.text_encoder(ids), torch.tensor([321])
        pairs = [
            (context, theirs.text_encoder(ids)[0]),
            (model.unet(latents, t, context), theirs.unet(latents, t, context).sample),
            (model.vae.decode(latents), theirs.vae.decode(latents).sample),
            (torch.cat(model.vae.encode(images), 1), theirs.vae.encode(images).latent_dist.parameters),
        ]
    for ours, expected in pairs:
        assert measured("diffusers from a full-size file of ours", relative_error(ours, expected)) < 1e-5


def test_every_tensor_of_the_released_checkpoint_is_known(released, tmp_path):
    write_sparse(released, tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors")
    assert model.config == sd.Config()
    training = {name for name in released if "." not in name or name.startswith("model_ema.")}
    inference = sum(tensor.numel() for name, tensor in released.items() if name not in training) - 77
    assert sum(parameter.numel() for parameter in model.parameters()) == inference


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_state_dict_level(nested, legacy, tmp_path, tensors, expected):
    content = {"state_dict": tensors, "global_step": 470000} if nested else tensors
    torch.save(content | METADATA, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not legacy)
    assert_same(load(tmp_path / "model.ckpt").state_dict(), expected)


def test_compressed_zip(tmp_path, tensors, expected):
    """Its numbers cannot be mapped."""
    save_zip(tensors, tmp_path / "model.ckpt")
    packed = zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "model.ckpt") as stored, packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert_same(load(tmp_path / "packed.ckpt").state_dict(), expected)


# ---------------------------------------------------------------------- objects of training frameworks in .ckpt

LIGHTNING = """
import collections, dataclasses, datetime, decimal, enum, functools, pathlib
import numpy as np
import torch

class ModelCheckpoint:
    def hook(self): pass

class AttributeDict(dict): pass
class History(list): pass
class Tags(set): pass

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

class NewWithArguments:
    def __new__(cls, number, *, name): return super().__new__(cls)
    def __getnewargs_ex__(self): return (1,), {"name": "x"}

def function(): pass

callback = ModelCheckpoint()
callback.owner = callback
plain = [
    470000, "1.4.2", None, {"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": [{"lr": 1e-4}]}, {1, 2},
    1j, b"bytes", bytearray(b"bytes"), 2**100, "\\u20ac", collections.Counter("ab"), torch.device("cpu"),
    torch.float16, torch.Size([1, 2]), torch.get_rng_state(), collections.OrderedDict(a=1),
]
foreign = [
    {ModelCheckpoint: {"best_model_score": torch.tensor(0.1), "self": callback}}, callback, callback.hook,
    Tags("ab"), Stage.FIT, Stage, Precision.HALF, Settings(), Frozen(), Point(1, 2), Stateful(), function,
    functools.partial(max, 1), np.int64(470000), np.float32(1), np.bool_(True), np.arange(3), np.dtype("float32"),
    np.random.RandomState(0), frozenset({1}), slice(1), range(3), Ellipsis, datetime.datetime(2022, 8, 22),
    decimal.Decimal("0.1"), pathlib.PurePosixPath("logs"), max, torch.nn.Linear(2, 2),
]
refused = [
    AttributeDict(a=1), History([1, 2, 3]), collections.defaultdict(list, a=[1]), collections.deque([1]),
    NewWithArguments(1, name="x"),
]
"""


@pytest.fixture
def lightning(tmp_path, monkeypatch):
    """Lets a function work with a module, and removes every trace of it before the function returns."""
    folder = tmp_path / "installed" / "pytorch_lightning"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "callbacks.py").write_text(LIGHTNING)

    @contextmanager
    def installed():
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder.parent)
            yield importlib.import_module("pytorch_lightning.callbacks")
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            del sys.modules[name]

    return installed


@pytest.mark.parametrize("legacy", [False, True])
def test_foreign_objects_beside_the_weights(legacy, lightning, tmp_path, tensors, expected):
    """Of a legacy file with any but Python's and PyTorch's plain objects, PyTorch reads nothing."""
    path, options = tmp_path / "sd-v1-4.ckpt", {"_use_new_zipfile_serialization": not legacy}
    with lightning() as module:
        objects = module.plain + ([] if legacy else module.foreign)
        content = {
            "callbacks": objects,
            "state_dict": tensors,
            "loops": {i: x for i, x in enumerate(objects)},
        }
        torch.save(content | METADATA, path, **options)
        one_by_one = [
            tmp_path / f"{i}.ckpt" for i in range(len(module.foreign if legacy else module.refused))
        ]
        for object, bad in zip(module.foreign if legacy else module.refused, one_by_one):
            torch.save({"callbacks": [object], "state_dict": tensors} | METADATA, bad, **options)
    if not legacy:
        with pytest.raises(ImportError):  # an ordinary reader needs the module
            torch.load(path, weights_only=False)
    assert_same(load(path).state_dict(), expected)
    for bad in one_by_one:
        line = refusal(bad)
        assert re.search("safetensors|save|convert", line.removeprefix(str(bad))), line  # what to do
        assert "weights_only" not in line, line  # PyTorch's advice, which would run the file's code
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def write_pickle(path: Path, code: bytes, kind: str = "zip") -> None:
    """A file in one of PyTorch's formats, without storages, whose object is the pickle `code`."""
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", code)
            archive.writestr("archive/version", "3\n")
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + code + pickle.dumps([], 2))


class Call:
    """Pickled as a call, which is made where it is unpickled."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args, state)

    def __reduce__(self):
        return self.call


def attacks(trace: str, tensors: Tensors) -> dict[str, object]:
    """Objects, and pickles in bytes, each of which makes the folder `trace` when Python unpickles it."""
    text = lambda string: b"X" + struct.pack("<I", len(string)) + string.encode()
    call, mkdir = Call(os.mkdir, trace), b"cos\nmkdir\n"
    weights = {"state_dict": tensors}
    return {
        "os.mkdir": weights | {"callbacks": call},
        "os.system": weights | {"callbacks": Call(os.system, f"mkdir {trace}")},
        "subprocess": weights | {"callbacks": Call(subprocess.check_call, ["mkdir", trace])},
        "eval": weights | {"callbacks": Call(eval, f"__import__('os').mkdir({trace!r})")},
        "exec": weights | {"callbacks": Call(exec, f"import os; os.mkdir({trace!r})")},
        "a call's result, called": weights | {"callbacks": Call(partial(os.mkdir, trace))},
        "as a weight": {"state_dict": tensors | {"model.diffusion_model.out.2.bias": call}},
        "as a name": {"state_dict": tensors | {call: 1}},
        "deep in a callback": weights | {"callbacks": [[({"a": call},)]]},
        "argument of a tensor": weights
        | {"a": Call(torch._utils._rebuild_tensor_v2, call, 0, (), (), False, {})},
        "argument of a dict": weights | {"a": Call(dict, call)},
        "a state": weights | {"a": Call(types.SimpleNamespace, state={"a": call})},
        "GLOBAL and REDUCE": mkdir + b"(" + text(trace) + b"tR.",
        "STACK_GLOBAL": b"\x8c\x02os\x8c\x05mkdir\x93(" + text(trace) + b"tR.",
        "STACK_GLOBAL, dotted": b"\x8c\x07pathlib\x8c\x0aPath.mkdir\x93(cpathlib\nPath\n(" + text(trace) + b"tRtR.",
        "INST": b"(" + text(trace) + b"ios\nmkdir\n.",
        "OBJ": b"(" + mkdir + text(trace) + b"o.",
        "BUILD": b"ctypes\nSimpleNamespace\n)R}" + text("__setstate__") + mkdir + b"sb" + text(trace) + b"b.",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR" + text("mkdir") + b"tR("
        + text(trace) + b"tR.",
        "in a storage's name": b"((" + text("storage") + mkdir + b"(" + text(trace) + b"tRtQ.",
        "on import": b"cmodule_that_acts\nanything\n.",
    }  # fmt: skip


@pytest.mark.parametrize("name", attacks("", {}))
def test_pickles_run_nothing(name, tmp_path, monkeypatch, tensors):
    trace, path = tmp_path / "trace", tmp_path / "model.ckpt"
    attack = attacks(str(trace), tensors)[name]
    (tmp_path / "module_that_acts.py").write_text(f"import os; os.mkdir({str(trace)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    for kind in ("zip", "legacy", "plain"):
        if kind == "plain":
            path.write_bytes(attack if isinstance(attack, bytes) else pickle.dumps(attack, 2))
        elif isinstance(attack, bytes):
            write_pickle(path, b"\x80\x02" + attack, kind)
        else:
            torch.save(attack | METADATA, path, _use_new_zipfile_serialization=kind == "zip")
        refusal(path)
        assert not trace.exists() and "module_that_acts" not in sys.modules
    with suppress(Exception):
        pickle.loads(path.read_bytes())
    trace.rmdir()  # it is there: the attack works on those who let it
    sys.modules.pop("module_that_acts", None)


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
    return tensors | averages | {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}


FINE_TUNES = {
    "no position_ids": without("position_ids"),
    "position_ids in floats": lambda tensors: tensors | {
        name: value.float() for name, value in tensors.items() if "position_ids" in name
    },
    "no averages and no schedule": without(r"^model_ema\.|^\w+$"),
    "averages": with_averages,
    "more of the schedule": lambda tensors: tensors | {"logvar": torch.ones(9), "scale": torch.ones(())},
    "what the autoencoder's training takes": lambda tensors: tensors | {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4),
    },
    "what CLIP compares with images": lambda tensors: tensors | {
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
def test_fine_tunes(change, tmp_path, tensors, expected, released):
    """Small ones with their numbers, and full-size ones, which are told from other models, without."""
    changed = change(tensors)
    assert list(changed) != list(tensors) or any(changed[name] is not tensors[name] for name in tensors)
    save_zip(changed, tmp_path / "model.ckpt")
    assert_same(load(tmp_path / "model.ckpt").state_dict(), expected)
    write_sparse(change(released), tmp_path / "full.safetensors")
    assert load(tmp_path / "full.safetensors").config == sd.Config()


def weights_to(dtype: torch.dtype, tensors: Tensors) -> Tensors:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


@pytest.mark.parametrize("kind", SAVE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype, kind, tmp_path, tensors, expected):
    path = tmp_path / "model"
    SAVE[kind](weights_to(dtype, tensors), path)
    rounded = weights_to(dtype, expected)
    assert_same(load(path, dtype=dtype).state_dict(), rounded)
    assert_same(load(path).state_dict(), weights_to(torch.float32, rounded))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_of_eight_bits(dtype, tmp_path, tensors, expected):
    """Some are stored so to save room; the models compute in other dtypes only."""
    save_file(weights_to(dtype, tensors), tmp_path / "model.safetensors", METADATA)
    rounded = weights_to(torch.float16, weights_to(dtype, expected))
    assert_same(load(tmp_path / "model.safetensors", dtype=torch.float16).state_dict(), rounded)


def test_dtypes_side_by_side(tmp_path, tensors, expected):
    """Some merges keep the autoencoder in float32 and the rest in float16."""
    vae = {name: value for name, value in tensors.items() if name.startswith("first_stage_model.")}
    save_file(weights_to(torch.float16, tensors) | vae, tmp_path / "model.safetensors", METADATA)
    rounded = weights_to(torch.float32, weights_to(torch.float16, expected))
    vae = {name: value for name, value in expected.items() if name.startswith("vae.")}
    assert_same(load(tmp_path / "model.safetensors").state_dict(), rounded | vae)


@pytest.mark.parametrize("save", [save_zip, save_legacy], ids=["zip", "legacy"])
def test_views_and_parameters_in_a_pickle(save, tmp_path, tensors, expected):
    """Transposed tensors, tensors that share a storage, expanded ones and parameters are stored as such."""
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


@pytest.mark.parametrize("extra", [1, 4, 0x3C], ids=["by 1", "by 4", "the length begins like a web page"])
def test_header_of_any_length(extra, tmp_path, tensors, expected):
    """The format asks for no alignment."""
    path = tmp_path / "model.safetensors"
    head, _ = header(tensors, METADATA, 0x100, extra)
    path.write_bytes(head + b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
    assert_same(load_file(path), tensors)  # the library agrees that it is a good file
    model = load(path)
    assert_same(model.state_dict(), expected)
    assert all(parameter.data_ptr() % parameter.itemsize == 0 for parameter in model.parameters())


# ------------------------------------------------------------------------------------------ diffusers' folder


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint as diffusers reads it and writes it."""
    path = tmp_path_factory.mktemp("tiny") / "folder"
    make_checkpoint.reference_pipeline(tiny, path, changes=TINY_FOLDER).save_pretrained(path)
    return path


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny diffusers folder, to be changed."""
    return shutil.copytree(tiny_folder, tmp_path / "sd-v1.5", ignore=shutil.ignore_patterns("tokenizer"))


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def change_config(folder: Path, part: str, **changes) -> None:
    [path] = (folder / part).glob("*config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_diffusers_folder(folder, expected):
    """Its Config comes from its config.json files: TINY has no field in common with Stable Diffusion v1."""
    assert [path.parent.name for path in weights_of(folder)] == ["text_encoder", "unet", "vae"]
    model = load(folder)
    assert_same(model.state_dict(), expected)
    assert replace(model.config, image_size=TINY.image_size) == TINY
    assert model.name == "sd-v1.5"


BIN_NAMES = {
    "text_encoder": "pytorch_model.bin", "unet": "diffusion_pytorch_model.bin",
    "vae": "diffusion_pytorch_model.bin",
}  # fmt: skip


def test_diffusers_bin(folder, expected):
    for path in weights_of(folder):
        torch.save(load_file(path), path.with_name(BIN_NAMES[path.parent.name]))
        path.unlink()
    assert_same(load(folder).state_dict(), expected)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_diffusers_fp16_variant(kind, folder, expected):
    exact = weights_of(folder)
    for path in exact:
        name = Path(path.name if kind == "safetensors" else BIN_NAMES[path.parent.name])
        save = save_file if kind == "safetensors" else torch.save
        save(weights_to(torch.float16, load_file(path)), path.with_name(f"{name.stem}.fp16{name.suffix}"))
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


def test_diffusers_folder_without_configs(folder, tmp_path):
    """It is taken for Stable Diffusion v1: a tiny one is refused, and a full-size one loads."""
    for path in folder.rglob("*.json"):
        path.unlink()
    assert "has shape" in refusal(folder)

    configs = make_checkpoint.configs()
    with torch.device("meta"):
        parts = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
        }
    for part, path in zip(("text_encoder", "unet", "vae"), weights_of(folder)):
        write_sparse(parts[part].state_dict(), path)
    model = load(folder)
    assert model.config == sd.Config()
    theirs = sum(parameter.numel() for part in parts.values() for parameter in part.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == theirs


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("unet", "norm_num_groups", 2), ("vae", "norm_num_groups", 8), ("unet", "cross_attention_dim", 64),
        ("text_encoder", "hidden_size", 64),
    ],
)  # fmt: skip
def test_conflicting_configs_are_refused(part, key, value, folder):
    change_config(folder, part, **{key: value})
    assert re.search(
        rf"(unet|vae|text_encoder)'s (hidden_size|{key}) is \d+ and must be \d+", refusal(folder)
    )


def test_configs_may_lack_fields(folder):
    """Stable Diffusion v1's hold then."""
    for part in ("scheduler", "vae"):
        [path] = (folder / part).glob("*config.json")
        config = json.loads(path.read_text())
        for key in ("beta_start", "num_train_timesteps", "scaling_factor"):
            config.pop(key, None)
        path.write_text(json.dumps(config))
    changed = {"beta_start": 0.00085, "timesteps": 1000, "latent_scale": 0.18215}
    assert replace(load(folder).config, image_size=TINY.image_size) == replace(TINY, **changed)


# ------------------------------------------------------------------------------- every tensor is accounted for


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_unused_tensors_are_named(kind, tmp_path, tensors, expected, folder):
    extra = {f"guide{dot}{i}{dot}weight": torch.zeros(2) for i, dot in enumerate("..__.")}
    path = folder if kind == "folder" else tmp_path / "model.safetensors"
    if kind == "folder":
        save_file(load_file(weights_of(path)[1]) | extra, weights_of(path)[1])
    else:
        save_file(tensors | extra, path, METADATA)
    pattern = rf"{re.escape(path.name)}: 5 tensors .*guide.\d.weight, .*, .* and 2 more"
    with pytest.warns(UserWarning, match=pattern) as record:
        model = sd.load(path)
    assert len(record) == 1 and len(set(re.findall(r"guide.\d.weight", str(record[0].message)))) == 3
    assert_same(model.state_dict(), expected)


# ------------------------------------------------------------------------------------------------ safetensors

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def assorted_tensors() -> Tensors:
    """Random bits in each dtype and several shapes, in an order that aligns none of them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for shape in [(), (0,), (3, 0, 2), (1,), (3, 5), (2, 1, 3, 7)]:
        for dtype in DTYPES:
            size = math.prod(shape) * dtype.itemsize
            bits = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
            tensor = bits.bool() if dtype == torch.bool else bits.view(dtype)
            tensors[f'{dtype} {list(shape)} \u00e9 \U0001f34e " \\ \n'] = tensor.view(shape)
    return tensors


LABELS = {"format": "pt", "\u4f5c\u8005": '\U0001f34e " \\ \n', "empty": ""}


def test_safetensors_reads_our_files(tmp_path):
    path, tensors = tmp_path / "ours.safetensors", assorted_tensors()
    tensors["transposed"] = torch.arange(12).view(3, 4).T
    sd.write_safetensors(path, tensors, LABELS)
    assert_same(load_file(path), tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == LABELS


def test_we_read_the_files_of_safetensors(tmp_path):
    path, tensors = tmp_path / "theirs.safetensors", assorted_tensors()
    save_file(tensors, path, LABELS)
    ours, metadata, _ = sd.read_file(path)
    assert_same(ours, tensors)
    assert metadata == LABELS
    save_file({}, path)
    assert sd.read_file(path)[:2] == ({}, {})


# ------------------------------------------------------------------------------------------------------- save


@pytest.mark.parametrize("kind", [*SAVE, "folder"])
def test_load_save_load_is_bit_equal(kind, tmp_path, tensors, expected, tiny, tiny_folder):
    """From each dialect, and to the same file."""
    source = tiny_folder if kind == "folder" else tmp_path / "source"
    if kind != "folder":
        SAVE[kind](tensors, source)
    model, path = load(source), tmp_path / "own" / "model"
    path.parent.mkdir()
    sd.save(model, path)
    assert list(path.parent.iterdir()) == [path]
    again = load(path)
    assert again.config == model.config
    assert_same(again.state_dict(), expected)
    if kind != "folder":
        assert path.read_bytes() == tiny.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_saved_in_the_dtype_of_the_model(dtype, tmp_path, tiny, expected):
    sd.save(load(tiny, dtype=dtype), tmp_path / "half.safetensors")
    assert_same(load_file(tmp_path / "half.safetensors"), weights_to(dtype, load_file(tiny)))
    model = load(tmp_path / "half.safetensors", dtype=dtype)
    assert_same(model.state_dict(), weights_to(dtype, expected))


def test_saved_over_the_file_it_is_mapped_from(tmp_path, tiny, expected):
    path = tmp_path / "model.safetensors"
    shutil.copy(tiny, path)
    for _ in range(2):
        model = load(path)
        sd.save(model, path)
        assert_same(model.state_dict(), expected)
    assert_same(load(path).state_dict(), expected)
    assert list(tmp_path.iterdir()) == [path]


def test_paths_in_the_home_folder(tmp_path, monkeypatch, tiny):
    monkeypatch.setenv("HOME", str(tmp_path))
    sd.save(load(tiny), "~/model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == tiny.read_bytes()
    assert load("~/model.safetensors").config == TINY


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


@pytest.mark.parametrize(
    "trouble, device, error",
    [(full_disk, "cpu", OSError), (no_permission, "cpu", PermissionError), (nullcontext, "meta", Exception)],
    ids=["full disk", "no permission", "an exception midway"],
)
def test_failed_save_leaves_the_old_file(trouble, device, error, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path, model = folder / "model.safetensors", random_model(TINY)
    sd.save(model, path)
    old = path.read_bytes()
    model.unet.to(device)  # of tensors on the meta device there is nothing to write
    with trouble(folder), pytest.raises(error):
        sd.save(model, path)
    assert path.read_bytes() == old
    assert list(folder.iterdir()) == [path]


def test_save_to_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        sd.save(random_model(TINY), tmp_path / "missing" / "model.safetensors")
    assert not any(tmp_path.iterdir())


def test_saved_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, os.replace
    name_of = lambda file: os.readlink(f"/proc/self/fd/{file}")
    monkeypatch.setattr(os, "fsync", lambda file: done.append(name_of(file)) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append(names) or rename(*names))
    path = tmp_path / "ours.safetensors"
    sd.save(random_model(TINY), path)
    [synced, (temporary, name)] = done
    assert synced == str(temporary) != str(name) == str(path) and load(path).config == TINY


# ----------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_weights_stay_in_the_file(kind, tmp_path, tensors):
    """They lie in the file's map, which is private: the file stays as it is."""
    path = tmp_path / "model"
    SAVE[kind](tensors, path)
    content = path.read_bytes()
    model = load(path)
    lines = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))
    ]
    ranges = [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines]
    weights = model.state_dict()
    assert [n for n, w in weights.items() if not any(w.data_ptr() in place for place in ranges)] == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == content


def test_converted_convolutions_are_channels_last(tiny):
    """What stays in the file is as it is there; what a device or a dtype takes along has the fast layout."""
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
        weight = load(tiny, dtype=dtype).unet.conv_in.weight
        assert weight.is_contiguous(memory_format=layout)


MEMORY = """
import sys, time, torch, sd

def gigabytes(kind):
    [line] = [line for line in open("/proc/self/status") if line.startswith(kind)]
    return int(line.split()[1]) / 2**20

private, start = gigabytes("RssAnon"), time.perf_counter()
model = sd.load(sys.argv[1])
print(time.perf_counter() - start, gigabytes("RssAnon") - private)
assert sum(parameter.nbytes for parameter in model.parameters()) > 4e9
peak = gigabytes("VmHWM")
model = sd.load(sys.argv[1], dtype=torch.bfloat16)
print(gigabytes("VmHWM") - peak, sum(parameter.nbytes for parameter in model.parameters()) / 2**30)
"""


def test_memory_of_loading(full):
    """Without a conversion it takes none, and with one the memory of its result, not of what it is made from."""
    command = [sys.executable, "-c", MEMORY, full]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, private, peak, weights = map(float, result.stdout.split())
    measured("seconds to load 4.27 GB", seconds)
    assert measured("gigabytes of private memory for it", private) < 0.5
    assert weights < measured("gigabytes at peak to load 4.27 GB as bf16", peak) < 1.2 * weights


FAULTS = """
import resource, torch, sd

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

plain = faults()
sd.reuse_memory()
print(plain - faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is a matter of Linux")
def test_freed_memory_is_used_again():
    """64 MiB, 20 times: 16,384 pages each time, or once."""
    command = [sys.executable, "-c", FAULTS]
    assert int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout) > 10 * 16384
