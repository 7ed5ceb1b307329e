"""Section 9: every kind of checkpoint gives the same weights, and `save` writes what other programs open."""

import io
import json
import math
import mmap
import os
import pickle
import pickletools
import re
import resource
import shutil
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import make_checkpoint
import pytest
import torch
from conftest import ROOT, limit, measured
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sd

TINY = sd.Config(  # no field is Stable Diffusion v1's
    image_size=64, vocab_size=600, text_length=16, text_dim=32, text_layers=1, text_heads=2,
    latent_channels=6, latent_scale=0.5, vae_channels=(8, 16), vae_blocks=1,
    unet_channels=(8, 16, 24), unet_attention=(True, False, True), unet_blocks=1, unet_heads=2,
    norm_groups=4, timesteps=100, beta_start=0.001, beta_end=0.02,
)  # fmt: skip
KINDS = ["CrossAttn", "", "CrossAttn"]
TINY_FOLDER = {  # the same in diffusers' words
    "text_encoder": {
        "vocab_size": 600, "max_position_embeddings": 16, "hidden_size": 32, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 599, "pad_token_id": 599,
    },
    "vae": {
        "latent_channels": 6, "scaling_factor": 0.5, "block_out_channels": [8, 16], "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 2, "sample_size": 64,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "unet": {
        "in_channels": 6, "out_channels": 6, "block_out_channels": [8, 16, 24], "layers_per_block": 1,
        "attention_head_dim": 2, "cross_attention_dim": 32, "norm_num_groups": 4, "sample_size": 32,
        "down_block_types": [kind + "DownBlock2D" for kind in KINDS],
        "up_block_types": [kind + "UpBlock2D" for kind in KINDS],
    },
    "scheduler": {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.02},
}  # fmt: skip
METADATA = {"sd.py": json.dumps(asdict(TINY))}
Tensors = dict[str, torch.Tensor]


def save_zip(tensors: Tensors, path: Path, beside: object = None, **options) -> None:
    torch.save({"callbacks": beside, "state_dict": tensors, "epoch": 1} | METADATA, path, **options)


def save_compressed(tensors: Tensors, path: Path) -> None:
    """A zip that PyTorch cannot map."""
    save_zip(tensors, path.with_suffix(".zip"))
    packed = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path.with_suffix(".zip")) as stored, packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))


LEGACY = {"_use_new_zipfile_serialization": False}
SAVE = {"safetensors": partial(save_file, metadata=METADATA), "zip": save_zip}
SAVE["legacy"] = partial(save_zip, **LEGACY)
SAVE_BARE = {"safetensors": save_file, "zip": torch.save, "legacy": partial(torch.save, **LEGACY)}
PICKLES = pytest.mark.parametrize("kind", ["zip", "legacy"])


def random_model(config: sd.Config) -> sd.StableDiffusion:
    torch.manual_seed(0)
    model = sd.StableDiffusion(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def load(path: str | Path, **options) -> sd.StableDiffusion:
    """Loads without any warning, so that no tensor is left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sd.load(path, **options)


def refusal(path: Path) -> str | None:
    """The one line that says why a checkpoint is refused, without its path; None if it loads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sd.load(path)
    except (ValueError, OSError) as error:
        [line] = str(error).splitlines()
        assert line.startswith(str(path)) and len(line) < len(str(path)) + 600, line
        return line.removeprefix(str(path))


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    """Bit-equal, NaN included."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        pair = ours[name], theirs[name]
        assert len({(tensor.dtype, tensor.shape) for tensor in pair}) == 1, name
        assert torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in pair)), name


def weights_to(dtype: torch.dtype, tensors: Tensors) -> Tensors:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


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
    """The tiny checkpoint as the safetensors library reads it, with a schedule as in the released file."""
    schedule = {name: torch.zeros(shape) for name, shape, _ in make_checkpoint.layout() if "." not in name}
    return load_file(tiny) | schedule


@pytest.fixture(scope="module")
def released() -> Tensors:
    """All tensors of v1-5-pruned-emaonly, without their numbers."""
    layout, dtypes = make_checkpoint.layout(), make_checkpoint.SAVED_DTYPES
    return {name: torch.empty(shape, dtype=dtypes[dtype], device="meta") for name, shape, dtype in layout}


def save_sparse(tensors: Tensors, path: Path) -> None:
    """A .safetensors file of zeros, however large, that takes no room on the disk."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        dtype = f"{'F' if tensor.is_floating_point() else 'I'}{8 * tensor.itemsize}"
        entries[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    os.truncate(path, 8 + len(head) + end)


# -------------------------------------------------------------------------------------- CompVis's single file


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("save", [*SAVE.values(), save_compressed], ids=[*SAVE, "compressed zip"])
def test_content_decides_and_not_the_suffix(save, suffix, tmp_path, tensors, expected):
    save(tensors, tmp_path / f"sd-v1.5{suffix}")
    model = load(tmp_path / f"sd-v1.5{suffix}")
    assert_same(model.state_dict(), expected)
    assert model.config == TINY and model.name == "sd-v1.5"


@pytest.mark.parametrize("extra", [1, 4, 0x3C], ids=["by 1", "by 4", "that starts like a web page"])
def test_header_of_any_length(extra, tmp_path, tiny, expected):
    """The format asks for no alignment."""
    path, content = tmp_path / "model", tiny.read_bytes()
    [length] = struct.unpack("<Q", content[:8])
    spaces = -length % 0x100 + extra
    head = struct.pack("<Q", length + spaces) + content[8 : 8 + length] + b" " * spaces
    path.write_bytes(head + content[8 + length :])
    assert_same(load_file(path), load_file(tiny))  # the library agrees that it is a good file
    model = load(path)
    assert_same(model.state_dict(), expected)
    assert all(parameter.data_ptr() % parameter.itemsize == 0 for parameter in model.parameters())


FLOATS = [(kind, dtype) for kind in SAVE for dtype in (torch.float16, torch.bfloat16, torch.float64)]
FLOATS += [("safetensors", dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]


@pytest.mark.parametrize("kind, dtype", FLOATS, ids=str)
def test_other_dtypes(kind, dtype, tmp_path, tensors, expected):
    """What is converted has the layout that is faster for convolutions."""
    SAVE[kind](weights_to(dtype, tensors), tmp_path / "model")
    rounded = weights_to(dtype, expected)
    for wanted in (dtype, torch.float32, torch.float16):
        model = load(tmp_path / "model", dtype=wanted)
        assert_same(model.state_dict(), weights_to(wanted, rounded))
        weight = model.unet.conv_in.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (wanted != dtype)


@PICKLES
def test_views_and_parameters_in_a_pickle(kind, tmp_path, tensors, expected):
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
    bias = "model.diffusion_model.out.2.bias"
    SAVE[kind](views | {bias: torch.zeros(1).expand_as(tensors[bias])}, tmp_path / "model.ckpt")
    zeros = {"unet.conv_out.bias": torch.zeros_like(expected["unet.conv_out.bias"])}
    assert_same(load(tmp_path / "model.ckpt").state_dict(), expected | zeros)


def without(tensors: Tensors, pattern: str) -> Tensors:
    return {name: value for name, value in tensors.items() if not re.search(pattern, name)}


UNNEEDED = r"^model_ema\.|^\w+$"  # averages and the schedule
FINE_TUNES = {
    "the released file": dict,
    "no position_ids": lambda t: without(t, "position_ids"),
    "position_ids in floats": lambda t: t | {n: v.float() for n, v in t.items() if "position_ids" in n},
    "no averages and no schedule": lambda t: without(t, UNNEEDED),
    "averages, without dots in their names": lambda t: t | {
        "model_ema." + re.sub(r"^model\.|\.", "", n): 2 * t[n] for n in t if n.startswith("model.")
    },
    "more of the schedule": lambda t: t | {"logvar": torch.ones(9), "scale": torch.ones(())},
    "what the autoencoder's training takes": lambda t: t | {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4),
    },
    "what CLIP compares with images": lambda t: t | {
        "cond_stage_model.transformer.text_projection.weight": torch.zeros(64, 64),
        "cond_stage_model.transformer.text_model.text_projection": torch.zeros(64, 64),
        "cond_stage_model.logit_scale": torch.zeros(()),
    },
    "two dtypes": lambda t: t | {n: v.double() for n, v in t.items() if "quant_conv" in n},
    "no text_model": lambda t: {n.replace("transformer.text_model.", "transformer."): t[n] for n in t},
    "another order": lambda t: dict(sorted(t.items(), reverse=True)),
    "1x1 convolutions as matrices": lambda t: {
        n: v.flatten(1) if v.shape[2:] == (1, 1) else v for n, v in t.items()
    },
    "matrices as 1x1 convolutions": lambda t: t | {
        n: t[n][:, :, None, None] for n in t if re.search(r"(attn\d\.to_\w|net\.2|embed\.\d)\.weight", n)
    },
}  # fmt: skip


@pytest.mark.parametrize("change", FINE_TUNES.values(), ids=FINE_TUNES)
def test_fine_tunes(change, tmp_path, tensors, expected, released):
    """Tiny ones with their numbers, and full-size ones, which are told from other models, without."""
    for save, weights, config in ((save_zip, tensors, TINY), (save_sparse, released, sd.Config())):
        save(change(weights), tmp_path / "model")
        model = load(tmp_path / "model")
        assert model.config == config
        if config == TINY:
            assert_same(model.state_dict(), expected)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_unused_tensors_are_named(kind, tmp_path, tensors, expected, folder):
    extra = {f"guide{dot}{i}{dot}weight": torch.zeros(2) for i, dot in enumerate("..__.")}
    SAVE["safetensors"](tensors | extra, tmp_path / "file")
    save_file(load_file(folder / UNET) | extra, folder / UNET)
    path = folder if kind == "folder" else tmp_path / "file"
    with pytest.warns(UserWarning, match="not used") as record:
        assert_same(sd.load(path).state_dict(), expected)
    [note] = [str(warning.message) for warning in record]
    assert re.match(rf"{path}: 5 tensors .*guide.\d.weight, .*guide.*, .*guide.*", note)


# ------------------------------------------------------------------------ pickles: foreign objects, attacks

LIGHTNING = """
import collections, dataclasses, datetime, decimal, enum, functools, pathlib, numpy as np, torch
class ModelCheckpoint:
    def hook(self): pass
class AttributeDict(dict): pass
class History(list): pass
class Tags(set): pass
@dataclasses.dataclass
class Settings:
    rate: float = 1e-4
@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    rate: float = 1e-4
class Stateful:
    def __getstate__(self): return [1, 2, 3]
    def __setstate__(self, state): raise RuntimeError("this must not run")
class NewWithArguments:
    def __new__(cls, number, *, name): return super().__new__(cls)
    def __getnewargs_ex__(self): return (1,), {"name": "x"}
Stage, Precision = enum.Enum("Stage", "FIT"), enum.IntFlag("Precision", "HALF FULL")
Point = collections.namedtuple("Point", "x y")
callback = ModelCheckpoint()
callback.owner = callback
plain = [
    470000, "1.4.2", None, {"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": [{"lr": 1e-4}]},
    {1, 2}, 1j, b"bytes", 2**100, "\\u20ac", collections.Counter("ab"),
    collections.OrderedDict(a=1), torch.device("cpu"), torch.float16, torch.Size([1]), torch.get_rng_state(),
]
foreign = [
    {ModelCheckpoint: {"best_model_score": torch.tensor(0.1), "self": callback}}, callback, callback.hook,
    ModelCheckpoint.hook, Tags("ab"), Stage.FIT, Stage, Precision.HALF, Settings(), Frozen(), Point(1, 2),
    Stateful(), functools.partial(max, 1), np.int64(470000), np.float32(1), np.bool_(True), np.arange(3),
    np.dtype("float32"), np.random.RandomState(0), frozenset({1}), slice(1), range(3), Ellipsis, max,
    datetime.datetime(2022, 8, 22), decimal.Decimal("0.1"), pathlib.PurePath("logs"), torch.nn.Linear(2, 2),
]
refused = [
    AttributeDict(a=1), History([1, 2, 3]), collections.defaultdict(list, a=[1]), collections.deque([1]),
    NewWithArguments(1, name="x"),
]
"""


@PICKLES
def test_foreign_objects_beside_the_weights(kind, tmp_path, monkeypatch, tensors, expected):
    """PyTorch refuses instances of foreign dicts and lists and, in legacy files, of all foreign classes."""
    module = types.ModuleType("pytorch_lightning.callbacks")
    with monkeypatch.context() as installed:
        installed.setitem(sys.modules, "pytorch_lightning", module)
        installed.setitem(sys.modules, "pytorch_lightning.callbacks", module)
        exec(LIGHTNING, module.__dict__)
        good, bad = (module.plain, module.foreign) if kind == "legacy" else (module.foreign, module.refused)
        SAVE[kind](tensors, tmp_path / "good.ckpt", [module.plain, good])
        for i, item in enumerate(bad):
            SAVE[kind](tensors, tmp_path / f"{i}.ckpt", [item])
    assert_same(load(tmp_path / "good.ckpt").state_dict(), expected)
    for i in range(len(bad)):
        line = refusal(tmp_path / f"{i}.ckpt")
        assert re.search("; (use|save|convert) ", line), line  # what to do
        assert "`weights_only`" not in line, line  # PyTorch's advice, which would run the file's code
    assert "pytorch_lightning" not in sys.modules


def write_pickle(path: Path, code: bytes, kind: str) -> None:
    """A file of the pickle `code`, in one of PyTorch's formats, without storages, or bare."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    before, after = b"".join(pickle.dumps(part, 2) for part in head), pickle.dumps([], 2)
    path.write_bytes(before + code + after if kind == "legacy" else code)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", code)
            archive.writestr("archive/version", "3\n")


def pickle_ends(content: bytes) -> list[int]:
    """Where each of the five pickles ends that a legacy file begins with; the fourth has the tensors."""
    file, ends = io.BytesIO(content), []
    for _ in range(5):
        list(pickletools.genops(file))
        ends.append(file.tell())
    return ends


class Call:
    """Pickled as a call, which is made where it is unpickled."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args, state)

    def __reduce__(self):
        return self.call


def attacks(trace: str) -> dict[str, object]:
    """Objects, and pickles in bytes, each of which makes the folder `trace` when Python unpickles it."""

    def text(string: str) -> bytes:
        return b"X" + struct.pack("<I", len(string)) + string.encode()

    call, mkdir, end = Call(os.mkdir, trace), b"cos\nmkdir\n", text(trace) + b"tR."
    return {
        "os.mkdir": call,
        "os.system": Call(os.system, f"mkdir {trace}"),
        "subprocess": Call(subprocess.check_call, ["mkdir", trace]),
        "eval": Call(eval, f"__import__('os').mkdir({trace!r})"),
        "exec": Call(exec, f"import os; os.mkdir({trace!r})"),
        "a call's result, called": Call(partial(os.mkdir, trace)),
        "as a name": {call: 1},
        "deep in a callback": [[({"a": call},)]],
        "argument of a tensor": Call(torch._utils._rebuild_tensor_v2, call, 0, (), (), False, {}),
        "argument of a dict": Call(dict, call),
        "a state": Call(types.SimpleNamespace, state={"a": call}),
        "GLOBAL and REDUCE": mkdir + b"(" + end,
        "STACK_GLOBAL": b"\x8c\x02os\x8c\x05mkdir\x93(" + end,
        "a dotted name": b"\x8c\x07pathlib\x8c\x0aPath.mkdir\x93(cpathlib\nPath\n(" + end[:-1] + b"tR.",
        "INST": b"(" + text(trace) + b"ios\nmkdir\n.",
        "OBJ": b"(" + mkdir + text(trace) + b"o.",
        "BUILD": b"ctypes\nSimpleNamespace\n)R}" + text("__setstate__") + mkdir + b"sb" + text(trace) + b"b.",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(\x8c\x02ostR\x8c\x05mkdirtR(" + end,
        "in a storage's name": b"((" + text("storage") + mkdir + b"(" + text(trace) + b"tRtQ.",
        "on import": b"cmodule_that_acts\nanything\n.",
    }  # fmt: skip


@pytest.mark.parametrize("name", attacks(""))
def test_pickles_run_nothing(name, tmp_path, monkeypatch, tensors):
    """Beside good weights, in place of one, or as a whole file."""
    trace, path = tmp_path / "trace", tmp_path / "model.ckpt"
    attack = attacks(str(trace))[name]
    code = b"\x80\x04" + attack if isinstance(attack, bytes) else pickle.dumps(attack, 2)
    (tmp_path / "module_that_acts.py").write_text(f"import os; os.mkdir({str(trace)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    writers = [partial(write_pickle, path, code, kind) for kind in ("zip", "legacy", "bare")]
    if not isinstance(attack, bytes):
        for save in (save_zip, SAVE["legacy"]):
            writers.append(partial(save, tensors, path, attack))
            writers.append(partial(save, tensors | {"model.diffusion_model.out.2.bias": attack}, path))
    for write in writers:
        write()
        refusal(path)
        assert not trace.exists() and "module_that_acts" not in sys.modules
    with suppress(Exception):
        pickle.loads(code)
    trace.rmdir()  # it is there: the attack works on those who let it
    sys.modules.pop("module_that_acts", None)


# ------------------------------------------------------------------------------------------ diffusers' folder

TEXT = "text_encoder/model.safetensors"
VAE, UNET = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", "unet"))


@pytest.fixture(scope="module")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint as diffusers reads and writes it, without its tokenizer."""
    path = tmp_path_factory.mktemp("tiny") / "folder"
    make_checkpoint.reference_pipeline(tiny, path, changes=TINY_FOLDER).save_pretrained(path)
    shutil.rmtree(path / "tokenizer")
    return path


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny folder, to be changed."""
    return shutil.copytree(tiny_folder, tmp_path / "sd-v1.5")


@pytest.mark.parametrize("kind", SAVE)
def test_diffusers_file_names(kind, folder, expected):
    """Of two files of a part, the exact one is read."""
    for name in (TEXT, VAE, UNET):
        tensors, exact = load_file(folder / name), folder / name
        exact.unlink()
        if kind != "safetensors":
            exact = folder / name.replace("/model", "/pytorch_model").replace("safetensors", "bin")
        SAVE_BARE[kind](tensors, exact)
        SAVE_BARE[kind](weights_to(torch.float16, tensors), exact.with_suffix(f".fp16{exact.suffix}"))
    assert_same(load(folder).state_dict(), expected)
    for path in folder.glob("*/*model" + exact.suffix):
        path.unlink()
    assert_same(load(folder, dtype=torch.float16).state_dict(), weights_to(torch.float16, expected))


def with_old_attention(t: Tensors) -> Tensors:
    for name, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        t = {n.replace(f".{name}.", f".{old}."): v for n, v in t.items()}
    assert any("proj_attn" in n for n in t)
    return t


SPELLINGS = {
    "no text_model": (TEXT, lambda t: {n.removeprefix("text_model."): t[n] for n in t}),
    "text_model": (TEXT, lambda t: {f"text_model.{n.removeprefix('text_model.')}": t[n] for n in t}),
    "old attention": (VAE, with_old_attention),
    "old attention, of 1x1 convolutions": (VAE, lambda t: {
        n: v[:, :, None, None] if "attentions" in n and v.ndim == 2 else v
        for n, v in with_old_attention(t).items()
    }),
}  # fmt: skip


@pytest.mark.parametrize("name, change", SPELLINGS.values(), ids=SPELLINGS)
def test_diffusers_spellings(name, change, folder, expected):
    save_file(change(load_file(folder / name)), folder / name)
    model = load(folder)
    assert_same(model.state_dict(), expected)
    assert model.name == "sd-v1.5"


def test_folder_without_a_config_or_a_field_of_one_is_taken_for_sd_v1(folder):
    """The released config of the VAE lacks its scale."""
    config = (folder / "vae/config.json").read_text()
    (folder / "vae/config.json").write_text(config.replace("scaling_factor", "x"))
    assert load(folder).config.latent_scale == 0.18215
    for path in folder.rglob("*.json"):
        path.unlink()
    assert "has shape" in refusal(folder)
    for part, model in make_checkpoint.empty_models().items():
        save_sparse(model.state_dict(), folder / {"text_encoder": TEXT, "vae": VAE, "unet": UNET}[part])
    assert load(folder).config == sd.Config()


def edit(folder: Path, part: str, **changes) -> None:
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFLICT = r"/(unet|vae)/config.json: \w+ is \d+ and must be \d+, as"


@pytest.mark.parametrize("part, key, value, message", [
    ("scheduler", "prediction_type", "sample", "prediction is sample and must be epsilon or v_prediction"),
    ("scheduler", "rescale_betas_zero_snr", True, "rescale_betas_zero_snr is True and must be False"),
    ("scheduler", "beta_schedule", "linear", "beta_schedule is linear and must be scaled_linear"),
    ("unet", "norm_num_groups", 2, CONFLICT), ("vae", "norm_num_groups", 8, CONFLICT),
    ("unet", "cross_attention_dim", 64, CONFLICT), ("text_encoder", "hidden_size", 64, CONFLICT),
])  # fmt: skip
def test_configs_that_are_refused(part, key, value, message, folder):
    edit(folder, part, **{key: value})
    assert re.search(message, refusal(folder))


def test_v_prediction_is_recognized(tiny, folder, tmp_path):
    """By a folder's scheduler, or by the key that other tools use; and it is saved for both."""
    assert load(folder).config.prediction == load(tiny).config.prediction == "epsilon"
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": None, "beta_schedule": None}
    edit(folder, "scheduler", **changes)
    keyed, saved = tmp_path / "keyed.safetensors", tmp_path / "saved.safetensors"
    save_file(load_file(tiny) | {"v_pred": torch.empty(0)}, keyed, METADATA)
    for path in (folder, keyed):
        model = load(path)
        assert model.config.prediction == "v_prediction"
        sd.save(model, saved)
        assert "v_pred" in load_file(saved)
        again = load(saved)
        assert again.config == model.config
        assert_same(again.state_dict(), model.state_dict())
    sd.save(load(tiny), saved)
    assert "v_pred" not in load_file(saved)


# ------------------------------------------------------------------------------------------------------- save


def test_full_size_save_has_the_released_layout(full, tmp_path):
    model, path = load(full), tmp_path / "own.safetensors"
    assert model.config == sd.Config()
    sd.save(model, path)
    with safe_open(path, "pt") as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        layout = {name: [view.get_shape(), view.get_dtype()] for name, view in views.items()}
    keys = json.loads((make_checkpoint.HERE / "sd15_keys.json").read_text())
    assert layout == without(keys, UNNEEDED)


@pytest.mark.parametrize("source", ["tiny", "tiny_folder"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_load_save_load_is_bit_equal(source, dtype, request, tmp_path, expected, tiny):
    """From both dialects to the same file. A folder's Config is in its config.json files."""
    model, path = load(request.getfixturevalue(source), dtype=dtype), tmp_path / "model"
    assert replace(model.config, image_size=TINY.image_size) == TINY
    sd.save(model, path)
    assert list(tmp_path.iterdir()) == [path]
    assert_same(load_file(path), weights_to(dtype, load_file(tiny)))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "sd.py": json.dumps(asdict(model.config))}
    again = load(path, dtype=dtype)
    assert again.config == model.config
    assert_same(again.state_dict(), weights_to(dtype, expected))


def test_saved_over_the_file_it_is_mapped_from(tmp_path, monkeypatch, tiny, expected):
    """Which is in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    path = shutil.copy(tiny, tmp_path / "model.safetensors")
    for _ in range(2):
        model = load("~/model.safetensors")
        sd.save(model, "~/model.safetensors")
        assert_same(model.state_dict(), expected)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == tiny.read_bytes()


@pytest.mark.parametrize("trouble", ["full disk", "no numbers"])
def test_failed_save_leaves_the_old_file(trouble, tmp_path):
    path, model = tmp_path / "model.safetensors", random_model(TINY)
    sd.save(model, path)
    old, full = path.read_bytes(), trouble == "full disk"
    model.unet.to("cpu" if full else "meta")
    room = limit(resource.RLIMIT_FSIZE, 100_000 if full else 10**9)  # no file can grow over it
    with room, pytest.raises(OSError if full else NotImplementedError):
        sd.save(model, path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        sd.save(model, tmp_path / "missing" / "model.safetensors")


def test_saved_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, os.replace
    name_of = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(name_of(file))) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append(names) or rename(*names))
    path = tmp_path / "ours.safetensors"
    sd.save(random_model(TINY), path)
    [synced, (temporary, name)] = done
    assert synced == str(temporary) != str(name) == str(path) and load(path).config == TINY


def test_safetensors_of_the_library(tmp_path):
    """Random bits in each dtype and several shapes, in an order that aligns none of them."""
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    generator, tensors = torch.Generator().manual_seed(0), {}
    for shape in [(), (0,), (3, 0, 2), (1,), (3, 5), (2, 1, 3, 7)]:
        for dtype in dtypes:
            size = math.prod(shape) * dtype.itemsize
            bits = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
            tensor = bits.bool() if dtype == torch.bool else bits.view(dtype)
            tensors[f'{dtype} {shape} \u00e9 \U0001f34e " \\ \n'] = tensor.view(shape)
    path, labels = tmp_path / "model", {"\u4f5c": '\U0001f34e " \\ \n', "": ""}
    for expected in (tensors, {}):
        save_file(expected, path, labels)
        with open(path, "rb") as file:
            read, metadata = sd.read_safetensors(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        assert_same(read, expected)
        assert metadata == labels


# ----------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_weights_stay_in_the_file(kind, tmp_path, tensors):
    """They lie in the file's map, which is private: the file stays as it is."""
    path = tmp_path / "model"
    SAVE[kind](tensors, path)
    content, model = path.read_bytes(), load(path)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [range(*(int(address, 16) for address in line.split()[0].split("-"))) for line in maps]
    for name, weight in model.state_dict().items():
        assert any(weight.data_ptr() in place for place in ranges), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == content


MEMORY = """
import resource, sys, torch, sd

def gigabytes(kind):
    [line] = [line for line in open("/proc/self/status") if line.startswith(kind)]
    return int(line.split()[1]) / 2**20

def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**24)  # 64 MiB, which are 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

private = gigabytes("RssAnon")
model = sd.load(sys.argv[1])
print(gigabytes("RssAnon") - private)
assert sum(parameter.nbytes for parameter in model.parameters()) > 4e9
peak = gigabytes("VmHWM")
model = sd.load(sys.argv[1], dtype=torch.bfloat16)
print(gigabytes("VmHWM") - peak, sum(parameter.nbytes for parameter in model.parameters()) / 2**30)
plain = faults()
sd.reuse_memory()
print(plain - faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's /proc")
def test_memory(full):
    """Loading takes none without a conversion and, with one, that of its result; freed memory is reused."""
    command = [sys.executable, "-c", MEMORY, full]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    private, peak, weights, pages = map(float, result.stdout.split())
    assert measured("gigabytes of private memory to load 4.27 GB", private) < 0.5
    assert weights < measured("gigabytes at peak to load 4.27 GB as bf16", peak) < 1.2 * weights
    assert pages > 5 * 16384
