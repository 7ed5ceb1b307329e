"""Damages files and command lines at random: `python tests/fuzz.py [--count N] [--seed N] [--kind NAME]`.

Each case runs in a process of its own, with five seconds of time, a training with thirty. It ends well if
sd.py takes what it is given, or says in one line of at most 500 characters what is wrong; a .safetensors must
be refused where the library of that name refuses it and have the same tensors where it does not. What a case
does besides (processes, sockets, files, signals, memory over twice the file and 200 MB) is a failure, printed
with the numbers that repeat it: `--kind NAME --seed N --count 1`. Trainings and drawings that are killed, or
whose disk is full, must lose nothing, and go on to the bytes of an undisturbed run.
"""

import argparse
import io
import json
import logging
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import threading
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import make_checkpoint
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from test_checkpoints import (
    SAVE,
    TINY,
    TINY_FOLDER,
    assert_same,
    attacks,
    pickle_ends,
    random_model,
    write_pickle,
)
from tqdm.auto import tqdm

import sd
from weights import train

FORBIDDEN = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|fork|mkdir|remove|rename|rmdir|link|symlink|chmod|putenv)|exec|compile"
    r"|subprocess|socket|shutil|ctypes\.dlopen|webbrowser|ftplib|smtplib"
)
JUNK = [
    None, True, -1, 0, 1, 2, 3, 64, 64.0, 2**31, 2**63, -(2**63), 10**30, 1e400, float("nan"), "", "100",
    "x" * 999, [], {}, [None], [[]], [8] * 9, ["a"], {"a": 1},
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- damages


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bits flipped, bytes overwritten, removed, doubled, moved, cut off or appended."""
    for _ in range(rng.choice([1, 1, 1, 3, 10])):
        # Where the structure is, at the beginning or the end, two times of three.
        length, near = max(1, len(content)), rng.randrange(300)
        place = rng.choice([near, length - 1 - near, rng.randrange(length)]) % length
        size = rng.choice([1, 1, 2, 8, 64, 1000])
        part = content[place : place + size] or b"\0"
        part = rng.choice([
            bytes([part[0] ^ 1 << rng.randrange(8)]) + part[1:], rng.randbytes(len(part)), b"", 2 * part,
            b"\0" * len(part), b"\xff" * len(part), content[: len(part)],
        ])  # fmt: skip
        content = content[:place] + part + content[place + size :]
    ends = [content] * 8 + [content[: rng.randrange(len(content) + 1)], content + rng.randbytes(100)]
    return rng.choice(ends)


def damage_json(value: object, rng: random.Random) -> object:
    """One of the values in it replaced, left out or doubled under another name."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: other for name, other in value.items() if name != key}
        if rng.random() < 0.1:
            return value | {rng.choice([key + "x", "", "__metadata__", "a" * 600]): value[key]}
        return value | {key: damage_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], damage_json(value[i], rng), *value[i + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-8, -1, 1, 2, 8, 0.5, value, 2**32])
    return rng.choice(JUNK)


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """A .safetensors with another header, of the same values or others in another spelling."""
    [length] = struct.unpack("<Q", content[:8])
    header, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    text = json.dumps(damage_json(header, rng))
    name, entry = rng.choice([item for item in header.items() if item[0] != "__metadata__"])
    entry = json.dumps(entry)
    spelled = {
        r"(\d+)\]": r"\1.0]", r"\[0": "[-0", r"(\d+)\]\}": r"0\1]}", r"\[0,": "[false,", r"\[0, ": "[0e0, ",
        r'"F32"': '"F_32"', r'"shape"': '"shape": [1], "shape"', r"\}": ', "more": 1}', r"\[": "[[",
        r"\{": '{"dtype": "F32", ', r"(\d+)": "9" * 4000,
    }  # fmt: skip
    old = rng.choice(list(spelled))
    other = text.replace(entry, re.sub(old, spelled[old], entry, count=1))
    double = text[:-1] + f', "{name}": {entry}}}'
    text = rng.choice([text, text, other, other, double, text.replace(":", ":" + "[" * 5000, 1)])
    head = text.encode(rng.choice(["utf-8"] * 9 + ["utf-16", "utf-8-sig"]))
    head = head.replace(b"a", b"\xff", 1) if rng.random() < 0.05 else head
    return struct.pack("<Q", len(head) + rng.choice([0] * 9 + [1, -1, 8, 2**62])) + head + tensors


def damage_pickle(code: bytes, rng: random.Random) -> bytes:
    """Opcodes removed, doubled, replaced, moved, or with other arguments."""
    places = [place for _, _, place in pickletools.genops(code)]
    parts = [code[begin:end] for begin, end in zip(places, [*places[1:], len(code)])]
    tensor = next((i for i, part in enumerate(parts) if part == b"Q"), 0)  # a storage
    for _ in range(rng.choice([1, 1, 2, 5])):
        i = rng.choice([rng.randrange(len(parts)), min(len(parts) - 1, tensor + rng.randrange(20))])
        j = rng.randrange(len(parts))
        junk = rng.choice([
            b"", parts[i] * 2, parts[j], rng.randbytes(1), b"J\xff\xff\xff\xff", b"G" + rng.randbytes(8),
            b"\x8a\x08" + rng.randbytes(8), b"K\0", b"h\0", b"q\0", b"}b", b"b", b"R", b"\x81", b"t", b"\x85",
            b"\x86", b"N", b")", b"]", b"}", b"2", b"0", b"ctorch\nTensor\nK\x08K\x08\x86R",
            b"ctorch\nFloatStorage\nM\0\x10\x85R", b"cbuiltins\nbytearray\nJ\0\0\0\x40\x85R",
        ])  # fmt: skip
        parts[i] = junk
    return b"".join(parts)


def damage_zip(path: Path, rng: random.Random) -> None:
    """Records swapped, left out, renamed, doubled, compressed or damaged; most often the pickle."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    pickles = [i for i, (name, _) in enumerate(records) if name.endswith("data.pkl")]
    i = rng.choice([rng.randrange(len(records)), *pickles])
    j, (name, content) = rng.randrange(len(records)), records[i]
    other = damage_bytes(content or b"0", rng)
    if name.endswith("data.pkl"):
        other = rng.choice([other, damage_pickle(content, rng), damage_pickle(content, rng)])
    choice = rng.randrange(6)
    if choice == 0:
        records[i], records[j] = (name, records[j][1]), (records[j][0], content)
    elif choice == 1:
        records.pop(i)
    elif choice == 2:
        records[i] = (rng.choice([name + "x", records[j][0], "../" + name, "/"]), content)
    else:
        records[i] = (name, other)
    methods = [zipfile.ZIP_STORED] * 6 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", rng.choice(methods)) as archive:
        warnings.simplefilter("ignore")  # of two records with one name
        for name, content in records:
            archive.writestr(name, content)


def damage(path: Path, rng: random.Random) -> None:
    """Damages a file by its kind, or any byte of it."""
    content = path.read_bytes()
    if path.suffix == ".json":
        content = json.dumps(damage_json(json.loads(content), rng)).encode()
    elif rng.random() < 0.4:
        content = damage_bytes(content, rng)
    elif content[8:9] == b"{":
        content = damage_header(content, rng)
    elif content[:2] == b"PK":
        damage_zip(path, rng)
        content = path.read_bytes()
    else:  # a legacy file
        ends = [0, *pickle_ends(content)]
        i = rng.choice([0, 1, 2, 3, 3, 3, 3, 4])
        code = damage_pickle(content[ends[i] : ends[i + 1]], rng)
        content = content[: ends[i]] + code + content[ends[i + 1] :]
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------------ cases


@cache
def bases() -> Path:
    """A folder with whole files of every kind, made once."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    own = folder / "own.safetensors"
    sd.save(random_model(TINY), own)
    tensors = load_file(own)
    for kind in ("safetensors", "zip", "legacy"):
        SAVE[kind](tensors, folder / f"{kind}.ckpt")
    pipeline = make_checkpoint.reference_pipeline(own, folder / "folder", changes=TINY_FOLDER)
    pipeline.save_pretrained(folder / "folder")
    shutil.rmtree(folder / "folder/tokenizer")
    vae = {name.removeprefix("first_stage_model."): tensors[name] for name in tensors if "first" in name}
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{layer}.lora_down.weight": torch.randn(2, 8), f"{layer}.lora_up.weight": torch.randn(8, 2)}
    for kind, save in SAVE.items():
        save({f"{layer}.alpha": torch.tensor(2.0)} | lora, folder / f"lora-{kind}")
        save(vae, folder / f"vae-{kind}")
    pixels = np.frombuffer(random.Random(0).randbytes(40 * 30 * 4), dtype=np.uint8).reshape(30, 40, 4)
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tif", "ppm", "eps"):
        image = Image.fromarray(pixels).convert("RGBA" if suffix in ("png", "webp") else "RGB")
        image.save(folder / f"image.{suffix}")
    Image.fromarray(pixels.view(np.uint16)[..., 0]).save(folder / "gray16.png")
    for name in ("cases", "data", "trained", "drawn"):
        (folder / name).mkdir()
    shutil.copy(folder / "image.png", folder / "data/a.png")
    (folder / "data/a.txt").write_text("a cat")
    return folder


@contextmanager
def watched():
    """Raises AssertionError for what no file may do."""
    seen, inside = [], True

    def watch(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
        imports = event == "import" and not re.match(r"(torch|encodings)\b", arguments[0])
        if inside and (FORBIDDEN.match(event) or writes or imports):
            files = {frame.f_code.co_filename for frame, _ in traceback.walk_stack(None)}
            if not any("importlib" in file for file in files):  # what an allowed import does is allowed
                seen.append(f"{event} {arguments}"[:200])

    sys.addaudithook(watch)
    try:
        yield
    finally:
        inside = False
        assert not seen, seen


def load_all(path: Path, **options) -> None:
    """Loads a checkpoint, and does nothing besides; PyTorch checks the shapes."""
    with watched():
        sd.load(path, **options)


def assert_numbers_are_in_the_file(path: Path) -> None:
    """What backs a file's tensors, byte for byte."""
    content = path.read_bytes()
    if content[:2] == b"PK":
        with zipfile.ZipFile(path) as archive:
            content += b"".join(archive.read(record) for record in archive.infolist() if record.compress_type)
    found, *_ = sd.read_file(path, "a checkpoint, a LoRA or a VAE")
    for tensor in found.values():
        if isinstance(tensor, torch.Tensor):
            numbers = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
            assert tensor.device.type == "cpu" and numbers.numpy().tobytes() in content


def checkpoint(rng: random.Random, folder: Path) -> None:
    """Damages a checkpoint, a VAE or a LoRA, and loads it."""
    patterns = ("own.*", "*.ckpt", "folder", "lora-*", "vae-*")
    base = rng.choice(sorted(file for pattern in patterns for file in bases().glob(pattern)))
    path = folder / rng.choice(["model.ckpt", "model.safetensors", "model"])
    if base.is_dir():
        shutil.copytree(base, path)
        damage(rng.choice([file for file in sorted(path.rglob("*.*")) if file.is_file()]), rng)
    else:
        shutil.copy(base, path)
        damage(path, rng)
    if base.name.startswith("vae-"):
        load_all(bases() / "own.safetensors", vae=path)
    elif base.name.startswith("lora-"):
        load_all(bases() / "own.safetensors", loras={path: 0.5})
    else:
        load_all(path)
    if path.is_file():
        assert_numbers_are_in_the_file(path)


def safetensors(rng: random.Random, folder: Path) -> None:
    """Damages a .safetensors, and reads it beside the safetensors library."""
    path = folder / "model.safetensors"
    shutil.copy(rng.choice([bases() / "own.safetensors", bases() / "lora-safetensors"]), path)
    damage(path, rng)
    try:
        expected = load_safetensors(path.read_bytes())
    except (SafetensorError, KeyError, AttributeError):  # the latter for dtypes that only it knows
        expected = None
    with watched():
        found, *_ = sd.read_file(path, "a checkpoint or a LoRA")
    assert expected is not None, "safetensors refuses it"
    assert_same(found, expected)


def attack(rng: random.Random, folder: Path) -> None:
    """A pickle that would act, whole or damaged, in each form."""
    path, trace = folder / "model.ckpt", str(folder / "trace")
    name, code = rng.choice(list(attacks(trace).items()))
    code = b"\x80\x02" + code if isinstance(code, bytes) else pickle.dumps({"state_dict": {name: code}}, 2)
    code = rng.choice([code, damage_pickle(code, rng)])
    write_pickle(path, code, rng.choice(["zip", "legacy", "bare"]))
    load_all(path)


def image(rng: random.Random, folder: Path) -> None:
    """Damages an image, perhaps under the name of another format, and opens it."""
    base = rng.choice(sorted([*bases().glob("image.*"), *bases().glob("gray16.png")]))
    path = folder / rng.choice(["image.png", base.name])
    path.write_bytes(damage_bytes(base.read_bytes(), rng))
    assert sd.open_image(path).mode == "RGB"


WORDS = [
    "", "0", "1", "2", "-1", "1.5", "nan", "inf", "1e400", str(2**63), "64", "72", "1e30", "x", "cpu",
    "mkldnn", "ddim", "out.png", "a/out.png", "/", "\udcff", "x" * 300, "image.png", "@image.png",
    "lora-zip:0.5", "vae-zip", "bf16", "fp16",
]  # fmt: skip
OPTIONS = [
    "--prompt", "--negative", "--vae", "--lora", "--out", "--steps", "--guidance", "--sampler", "--seed",
    "--n", "--width", "--height", "--image", "--strength", "--mask", "--upscale", "--settings", "--device",
    "--dtype", "--offload", "--weights", "--unknown", "word",
]  # fmt: skip


def draw_arguments(*more: str) -> list[str]:
    return ["--prompt", "a cat", "--weights", str(bases() / "own.safetensors"), "--steps", "1", *more]


def command_line(rng: random.Random, folder: Path) -> None:
    """Runs sd.py with options at random."""
    arguments = draw_arguments()
    for option in rng.sample(OPTIONS, rng.choice([1, 1, 2, 4])):
        word = rng.choice(WORDS)
        word = str(bases() / word) if (bases() / word).is_file() and word else word
        arguments += [option] if rng.random() < 0.1 else [option, word]
    finish(sd.main, arguments, folder)


def finish(main, arguments: list[str], folder: Path) -> None:
    """Runs a command in the folder; raises its error, which must have left nothing behind."""
    os.chdir(folder)
    before, sys.argv, sys.stderr = set(folder.rglob("*")), ["x", *arguments], io.StringIO()
    sys.stdout = io.StringIO()
    status, output = main(), sys.stderr.getvalue()
    lines = [line for line in output.splitlines() if not re.match(r"(sd|train)\.py: note: ", line)]
    if status:
        assert status == 2 and set(folder.rglob("*")) == before, (status, arguments)
        [line] = lines
        raise ValueError(line)
    assert set(folder.rglob("*")) != before


def train_arguments() -> list[str]:
    """A training of four steps that saves at each."""
    init = ["--init", str(bases() / "own.safetensors"), "--out", "m.safetensors", "--device", "cpu"]
    sizes = ["--steps", "4", "--save-every", "1", "--batch-size", "1", "--resolution", "16"]
    return [str(bases() / "data"), *init, *sizes]


def run_training() -> int:
    """Runs the command line of train.py in sys.argv."""
    return sd.main(lambda arguments: train.train(train.parse(arguments)), "train.py", "--batch-size")


def training(rng: random.Random, folder: Path) -> None:
    """Runs train.py with options at random."""
    arguments = train_arguments()
    options = [f"--{field.name.replace('_', '-')}" for field in train.fields(train.Settings)[2:]]
    options.remove("--compile")
    for option in rng.sample(options, rng.choice([1, 1, 2])):
        arguments += [option] if rng.random() < 0.2 else [option, rng.choice(WORDS)]
    finish(run_training, arguments, folder)


# ----------------------------------------------------------------------------------------------------- faults


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without temporary ones of a process that was killed."""
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.suffix not in (".part", ".lock")}


def run_child(program: Callable, arguments: list[str], folder: Path, disturb: Callable = int) -> int:
    """The status of a command that a process of its own runs in the folder after a call of `disturb`."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    try:
        os.chdir(folder)
        sys.argv, sys.stdout, sys.stderr = ["x", *arguments], io.StringIO(), io.StringIO()
        disturb()
        os._exit(program())
    finally:  # an error ends this process, too
        os._exit(1)


def disturbance(rng: random.Random) -> Callable:
    """What fills the disk of the process that calls it, or kills it at a random moment."""
    size, seconds = rng.randrange(1, 2_000_000), rng.uniform(0.001, 1.5)
    if rng.random() < 0.5:
        return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    return partial(signal.setitimer, signal.ITIMER_REAL, seconds)  # its signal kills


def killed_training(rng: random.Random, folder: Path) -> None:
    """Disturbs a training three times; the last run ends it, with the files of an undisturbed one."""
    for disturb in [disturbance(rng), disturbance(rng), disturbance(rng), int]:
        resume = ["--resume"] * (folder / "m.state").exists()
        status = run_child(run_training, [*train_arguments(), *resume], folder, disturb)
        assert status in (0, 2 << 8, signal.SIGALRM), status
    assert status == 0 and contents(folder) == contents(bases() / "trained")
    assert contents(folder).keys() == {file.name for file in folder.iterdir()}, "temporary files"


def killed_drawing(rng: random.Random, folder: Path) -> None:
    """Disturbs a run that draws four images three times; each file is whole, and the last run draws all."""
    whole = set(contents(bases() / "drawn").values())
    for disturb in [disturbance(rng), disturbance(rng), disturbance(rng), int]:
        before = contents(folder)
        status = run_child(sd.main, draw_arguments("--n", "4", "--seed", "0"), folder, disturb)
        after = contents(folder)
        assert status in (0, 2 << 8, signal.SIGALRM) and before.items() <= after.items(), status
        assert set(after.values()) <= whole
    assert status == 0 and len(after) == len(before) + 4 and set(after.values()) == whole


KINDS = {
    "checkpoint": (checkpoint, 0.5), "safetensors": (safetensors, 0.2), "attack": (attack, 0.1),
    "image": (image, 0.1), "command line": (command_line, 0.06), "training": (training, 0.03),
    "killed training": (killed_training, 0.005), "killed drawing": (killed_drawing, 0.005),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- running


def most_memory() -> int:
    """The peak of this process's memory, in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def run(kind: str, seed: int, folder: Path) -> str:
    """Runs a case in this process; returns how it ended."""
    case, _ = KINDS[kind]
    warnings.simplefilter("ignore")
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # as sd.main does
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, limit = most_memory(), 2e8
    try:
        case(random.Random(seed), folder)
        text = ""
    except (ValueError, OSError) as error:
        text = str(error)
    names_the_file = kind in ("checkpoint", "safetensors", "attack", "image")
    assert not text or str(folder) in text or not names_the_file, text
    assert "\n" not in text and len(text.replace(str(folder), "")) <= 500, text
    limit += 2 * sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert "training" in kind or most_memory() - before < limit, f"{most_memory() - before} bytes of memory"
    return "refused" if text else "taken"


def run_apart(case: tuple[str, int]) -> tuple[str, int, str]:
    """Runs a case in a process of its own; returns how it ended, or what failed or was printed."""
    kind, seed = case
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=bases() / "cases"))
    report = folder.with_suffix(".report")
    child = os.fork()
    if not child:
        seconds = 30 if "training" in kind else 5
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        signal.alarm(60)  # for one that waits
        descriptor = os.open(report, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        try:
            end = run(kind, seed, folder)
        except BaseException as error:
            end = f"{type(error).__name__}: {error}"
        os.write(descriptor, end.encode(errors="replace"))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    end = report.read_text(errors="replace") if status == 0 else f"signal {status & 127}"
    shutil.rmtree(folder)
    report.unlink()
    return kind, seed, end


def main() -> int:
    """Prints how many cases of each kind ended how; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=20000, help="cases in all (20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind (0)")
    parser.add_argument("--kind", choices=KINDS, help="only these (all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared by forked processes, and kept by one that is killed
    counts = {kind: round(args.count * share) for kind, (_, share) in KINDS.items()}
    counts = {args.kind: args.count} if args.kind else counts
    cases = [(kind, args.seed + i) for kind, count in counts.items() for i in range(count)]
    for path in [*bases().glob("*.ckpt"), bases() / "folder"]:  # imports what is imported late
        load_all(path)
    for kind in SAVE:
        load_all(path, vae=bases() / f"vae-{kind}", loras={bases() / f"lora-{kind}": 1.0})
    assert run_child(run_training, train_arguments(), bases() / "trained") == 0
    assert run_child(sd.main, draw_arguments("--n", "4", "--seed", "0"), bases() / "drawn") == 0
    ends: Counter = Counter()
    with get_context("fork").Pool() as pool:
        for kind, number, end in pool.imap_unordered(run_apart, cases):
            ends[kind, end if end in ("taken", "refused") else "failed"] += 1
            if end not in ("taken", "refused"):
                print(f"--kind '{kind}' --seed {number} --count 1: {end[-500:]}", flush=True)
    shutil.rmtree(bases())
    for kind in counts:
        print(f"{kind:<16}", *(f"{ends[kind, end]:6} {end}" for end in ("taken", "refused", "failed")))
    return int(any(ends[kind, "failed"] for kind in counts))


if __name__ == "__main__":
    sys.exit(main())
