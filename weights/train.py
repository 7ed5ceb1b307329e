"""Trains or fine-tunes one part of a model: the autoencoder on images, or the UNet on images with captions.

    python weights/train.py DATA --out my-model.safetensors --init v1-5-pruned-emaonly.safetensors

Everything random follows from the seed and the step, so that a resumed run equals an uninterrupted one. Of
several processes, started by torchrun, each draws the whole batch and takes its share.
"""

import argparse
import atexit
import copy
import glob
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__" and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as in sd.py

import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

if sys.platform != "win32":
    import fcntl

sys.path.append(str(Path(__file__).resolve().parents[1]))

import sd
from weights.objectives import NoisePrediction, Reconstruction, find_images, read_captions, read_text, sheet

# ruff: noqa: RUF009

OBJECTIVES = {"vae": (find_images, Reconstruction), "unet": (read_captions, NoisePrediction)}

# ------------------------------------------------------------------------------------------------- 1 settings


def option(default: Any, help: str) -> Any:
    """A field of Settings with its help on the command line."""
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """How to train. Raises ValueError for values out of range."""

    data: Path  # a folder of images, with captions for a UNet
    out: Path  # the model, a .safetensors; its losses and the training state are written beside it
    part: str = option("unet", "to train: vae or unet (unet)")
    init: Path | None = option(None, "checkpoint to start from (random weights)")
    config: str | None = option(None, "without --init: fields of Config in JSON, or a .json file (SD v1)")
    validate: Path | None = option(None, "held-out data, for the validation loss at each save")
    steps: int = option(10000, "of the optimizer (10000)")
    batch_size: int = option(16, "images at once, per process (16)")
    accumulate: int = option(1, "batches per step (1)")
    resolution: int | None = option(None, "pixels, a multiple of 8 (the model's)")
    flip: bool = option(False, "also use mirrored images")
    lr: float = option(1e-4, "highest learning rate (1e-4)")
    warmup: int = option(100, "steps up to it; then down, a cosine (100)")
    weight_decay: float = option(0.01, "of the matrices of layers (0.01)")
    clip: float = option(1.0, "largest norm of the gradient (1.0)")
    ema: float = option(0.999, "decay of the averaged weights; 0: none (0.999)")
    drop_text: float = option(0.1, "share of empty captions, for guidance (0.1)")
    min_snr: float = option(math.inf, "gamma of min-SNR loss weights (none)")
    text_encoder: str = option("clip", "or bert (clip)")
    bert: Path | None = option(None, "its folder (weights/bert-base-uncased)")
    train_text_encoder: bool = option(False, "train it with the UNet")
    checkpointing: bool = option(False, "recompute activations: less memory, slower steps")
    save_every: int = option(1000, "steps (1000)")
    sample_every: int = option(0, "steps between sheets of samples (0: none)")
    prompts: Path | None = option(None, "for the sheets, one prompt per line (captions)")
    seed: int = option(0, "of everything random (0)")
    device: str | None = option(None, "cpu, cuda, ... (the fastest there is)")
    dtype: str = option("fp32", "to compute in: fp32 or bf16 (fp32)")
    compile: bool = option(False, "slow start, faster steps")
    resume: bool = option(False, "continue where the same command stopped")

    def __post_init__(self) -> None:
        for each in fields(self):
            if type_of(each) is Path and (path := getattr(self, each.name)) is not None:
                setattr(self, each.name, Path(os.path.expanduser(path)))
        rules = {
            "over 0": (lambda x: x > 0, "clip min_snr"),
            "from 1 to 2**53": (lambda x: 0 < x <= 2**53, "steps batch_size accumulate save_every"),
            "from 1 to 2**14": (lambda x: 0 < x <= 2**14, "resolution"),
            "over 0 and finite": (lambda x: 0 < x < math.inf, "lr"),
            "0 or more and finite": (lambda x: 0 <= x < math.inf, "weight_decay"),
            "from 0 to below 1": (lambda x: 0 <= x < 1, "ema drop_text"),
            "from 0 to 2**31 - 1": (lambda x: 0 <= x < 2**31, "seed sample_every warmup"),
            "vae or unet": (lambda x: x in OBJECTIVES, "part"),
            "clip or bert": (lambda x: x in ("clip", "bert"), "text_encoder"),
            "fp32 or bf16": (lambda x: x in ("fp32", "bf16"), "dtype"),
        }
        for wanted, (holds, names) in rules.items():
            for name in names.split():
                value = getattr(self, name)
                sd.check(name.replace("_", "-"), value, value is None or holds(value), wanted)
        writable = self.out.suffix == ".safetensors" and os.access(f"{self.out.parent}/.", os.W_OK)
        sd.check("out", self.out, writable, "a .safetensors in a folder that can be written to")
        for taken in [] if self.resume else written_files(self.out):
            raise ValueError(f"out: {taken} exists; use another name or, to continue, add --resume")
        sd.check("bert", "set", self.text_encoder == "bert" or not self.bert, "used with --text-encoder bert")
        sd.check("config", "given", not (self.init and self.config), "left out: --init has its own")


def written_files(out: Path, prefix: str = "", suffix: str = "") -> list[Path]:
    """What training to `out` has written or, between a prefix and a suffix, its temporary files."""
    kinds, stem = (".safetensors", ".state", ".loss.csv", ".[0-9]*.png"), prefix + glob.escape(out.stem)
    return [file for kind in kinds for file in out.parent.glob(stem + kind + suffix)]


def type_of(option: Any) -> type:
    """The type of a field of Settings, None aside."""
    return (*get_args(option.type), option.type)[0]


def parse(arguments: list[str]) -> Settings:
    """The settings of a command line. Raises ValueError."""
    usage = "python weights/train.py DATA --out FILE [options]"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("data", metavar="DATA", nargs="?", help="folder of images, with captions for a UNet")
    parser.add_argument("--out", metavar="PATH", help="the model to write, a .safetensors")
    for each in fields(Settings)[2:]:
        flag, help, kind = "--" + each.name.replace("_", "-"), each.metadata["help"], type_of(each)
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
        else:
            metavar = kind.__name__.upper()
            parser.add_argument(flag, metavar=metavar, type=kind, default=each.default, help=help)
    args, unknown = parser.parse_known_args(arguments)
    sd.check("the option or word", " ".join(unknown[:1]), not unknown, "one that --help shows")
    sd.check("DATA", "missing", args.data, "given: a folder of images")
    sd.check("--out", "missing", args.out, "given: the model to write, a .safetensors")
    return Settings(**vars(args))


# ---------------------------------------------------------------------------------------------------- 2 model


def new_model(config: sd.Config, seed: int) -> sd.StableDiffusion:
    """A model with random weights; the UNet's residual branches and its output are zero."""
    torch.manual_seed(seed)
    model = sd.StableDiffusion(config)
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            nn.init.normal_(parameter)
        if name.startswith("unet.") and name.split(".")[-2] in ("conv2", "proj_out", "conv_out"):
            nn.init.zeros_(parameter)
    return model


def first_model(settings: Settings) -> sd.StableDiffusion:
    """The model to start from: with --resume the saved one, else that of --init or a new one of --config."""
    if source := settings.out if settings.resume and settings.out.exists() else settings.init:
        model = copy.deepcopy(sd.load(source))  # in memory, so that the file may be replaced
    else:
        text = "{}" if settings.config is None else settings.config
        text = read_text(Path(os.path.expanduser(text))) if text.endswith(".json") else text
        about = f"config {settings.config}"[:99]
        with sd.reading(about, "give fields of sd.Config in JSON, or a .json file"):
            config = sd.Config(**json.loads(text))
        model = new_model(config, settings.seed)
        size, least = config.vocab_size, len(model.tokenizer.ids)
        sd.check("vocab_size", size, size >= least, f"{least} or more")
    if settings.text_encoder == "clip" or model.config.vocabulary:
        return model
    from weights import bert

    fields, text_encoder = bert.read_bert(settings.bert or sd.HERE / "weights/bert-base-uncased")
    new = new_model(replace(model.config, **fields), settings.seed)
    new.text_encoder, new.vae = text_encoder, model.vae
    if new.config.text_dim == model.config.text_dim:
        new.unet = model.unet
    elif settings.init:
        dims = f"{model.config.text_dim} and BERT's {new.config.text_dim}"
        warnings.warn(f"the UNet starts from random weights, as its text_dim is {dims}", stacklevel=2)
    return new


def checkpoint_blocks(model: sd.StableDiffusion) -> None:
    """Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): blocks keep only their inputs, and run
    again for the gradient."""
    for part, kind in ((model.unet, sd.UNetBlock), (model.vae, sd.ResidualBlock)):
        for block in part.modules():
            if isinstance(block, kind):
                forward = partial(checkpoint, block.forward, use_reentrant=False)
                block.forward = forward  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------------------- 3 training


class Trainer:
    """The training state: weights, their average, the optimizer, and the losses so far."""

    def __init__(self, objective: Any, settings: Settings, held_out: Any = None):
        self.objective, self.settings, self.held_out = objective, settings, held_out
        self.rank, self.processes, self.parallel = 0, 1, objective
        if distributed.is_initialized():
            self.rank, self.processes = distributed.get_rank(), distributed.get_world_size()
            self.parallel = nn.parallel.DistributedDataParallel(objective)
        self.losses: list[float] = []
        self.validation: dict[int, float] = {}
        self.state_file = settings.out.with_suffix(".state")
        named = [(name, weight) for name, weight in objective.named_parameters() if weight.requires_grad]
        self.weights = [weight for _, weight in named]
        self.average = [weight.detach() for weight in self.weights]
        if settings.ema:
            self.average = [average.clone() for average in self.average]
        matrices = [weight for name, weight in named if weight.ndim > 1 and "embedding" not in name]
        others = [weight for name, weight in named if weight.ndim == 1 or "embedding" in name]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)

    def rate(self, step: int) -> float:
        """The learning rate: linear warm-up, then a cosine down to 0."""
        steps, warmup = self.settings.steps, self.settings.warmup
        if step < warmup:
            return self.settings.lr * (step + 1) / warmup
        return self.settings.lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    def summed(self, value: float) -> float:
        """The sum of `value` over all processes."""
        total = torch.tensor(float(value), device=self.objective.model.device)
        if self.processes > 1:
            distributed.all_reduce(total)
        return total.item()

    def backward(self, step: int) -> float:
        """Computes the gradients of a step; returns its loss, the mean over batches and processes."""
        settings, device = self.settings, self.objective.model.device
        generator, loss = torch.Generator().manual_seed(settings.seed * 2**32 + step), 0.0
        for i in range(settings.accumulate):
            shape = (settings.batch_size * self.processes,)
            indices = torch.randint(len(self.objective.examples), shape, generator=generator)
            batch = self.objective.draw(indices, generator)
            batch = [tensor[self.rank :: self.processes].to(device) for tensor in batch]
            is_last = i == settings.accumulate - 1  # gradients are exchanged once a step
            exchange = nullcontext() if self.processes == 1 or is_last else self.parallel.no_sync()
            with exchange, torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
                part = self.parallel(*batch) / settings.accumulate
            part.backward()
            loss += part.item()
        return self.summed(loss) / self.processes

    def update(self, loss: float) -> None:
        """One step of the optimizer and of the average; skipped where the loss or a gradient is not finite.
        Raises ValueError when that happens ten times in a row."""
        step = len(self.losses)
        norm = nn.utils.clip_grad_norm_(self.weights, self.settings.clip)
        self.losses.append(loss if norm.isfinite() else math.nan)
        if math.isfinite(self.losses[-1]):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.optimizer.step()
            decay = min(self.settings.ema, (1 + step) / (10 + step))  # at first there is little to average
            for average, weight in zip(self.average, self.weights):
                average.lerp_(weight.detach(), 1 - decay)
        elif step < 9 or any(map(math.isfinite, self.losses[-10:])):
            warnings.warn(f"step {step + 1} skipped: its loss or gradient is not finite", stacklevel=2)
        else:
            raise ValueError("10 steps in a row are not finite; lower --lr, or use --dtype fp32")
        self.optimizer.zero_grad()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        own = [weight.data for weight in self.weights]
        for weight, average in zip(self.weights, self.average):
            weight.data = average
        yield
        for weight, data in zip(self.weights, own):
            weight.data = data

    @torch.no_grad()
    def validate(self) -> float:
        """The loss on the held-out data, with the same noise and timesteps at every call."""
        generator, total, count = torch.Generator().manual_seed(0), 0.0, len(self.held_out.examples)
        for indices in torch.arange(count).split(self.settings.batch_size):
            drawn = [self.held_out.draw(index[None], generator) for index in indices]  # whatever the batches
            batch = [torch.cat(tensors).to(self.held_out.model.device) for tensors in zip(*drawn)]
            total += self.held_out(*batch).item() * len(indices)
        return total / count

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Turns an error into an OSError that says what to do."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeErrors, which do not say why
            reason = f"{self.settings.out}: no space left, or a failing disk"
            reason, _, _ = (str(error) if isinstance(error, OSError) else reason).partition("; ")
            again = "add --resume" if self.state_file.exists() else "start again"
            raise OSError(f"{reason}; make room there, and {again}") from error

    def save(self, validate: bool = False) -> None:
        """Writes the training state first, so that a kill in between loses nothing; then the model with the
        averaged weights, and the losses. Raises OSError."""
        out, table = self.settings.out, "step,loss,validation\n"
        with self.averaged():
            self.objective.finish()
            if validate and self.held_out:
                self.validation[len(self.losses)] = self.validate()
        for step, loss in enumerate(self.losses, 1):
            table += f"{step},{loss},{self.validation.get(step, '')}\n"
        state = {"weights": self.weights, "average": self.average, "optimizer": self.optimizer.state_dict()}
        state |= {"losses": self.losses, "validation": self.validation}
        with self.saving():
            with sd.atomic_write(self.state_file) as file:
                torch.save(state, file)
            with self.averaged():
                sd.save(self.objective.model, out)
            with sd.atomic_write(out.with_suffix(".loss.csv")) as file:
                file.write(table.encode())

    def save_samples(self) -> None:
        """Writes a sheet of samples, made with the averaged weights. Raises OSError."""
        with self.averaged():
            image = sheet(self.objective.samples())
        path = self.settings.out.with_suffix(f".{len(self.losses)}.png")
        with self.saving(), sd.atomic_write(path) as file:
            image.save(file, "png")

    def resume(self) -> None:
        """Continues from the last `save`. Raises ValueError for a state that does not fit."""
        try:
            state = torch.load(self.state_file, "cpu", mmap=True, weights_only=True)
            saved = state["weights"] + state["average"]
            for weight, value in zip(self.weights + self.average, saved, strict=True):
                weight.data.copy_(value)
            self.optimizer.load_state_dict(state["optimizer"])
            for weight, moments in self.optimizer.state.items():
                for name, value in moments.items():  # out of the file, and in the layout of the weight
                    like = weight if value.shape == weight.shape else value
                    moments[name] = torch.empty_like(like).copy_(value)
            self.losses, self.validation = state["losses"], state["validation"]
        except Exception as error:  # damaged files fail in many ways
            reason = f"{self.state_file}: cannot be resumed from: {sd.one_line(error)}"
            raise ValueError(f"{reason}; give the same options as before, or another --out") from error


def prepare(settings: Settings) -> Trainer:
    """A Trainer with its data and model, resumed if wanted. Raises OSError or ValueError."""
    device, state = sd.pick_device(settings.device), settings.out.with_suffix(".state")
    sd.check("resume", "given", state.is_file() or not settings.resume, f"left out, as there is no {state}")
    read, objective_class = OBJECTIVES[settings.part]
    data, held_out = read(settings.data), settings.validate and read(settings.validate)
    model = first_model(settings).to(device)
    # Each layout rounds sums in its own way: one for all, whatever file the weights come from.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model.to(memory_format=layout)  # type: ignore[call-overload]
    objective = objective_class(model, settings, data)
    if held_out and os.environ.get("RANK", "0") == "0":
        held_out = objective_class(model, replace(settings, flip=False, drop_text=0.0), held_out)
    trainer = Trainer(objective, settings, held_out)
    if settings.resume:
        trainer.resume()
    if settings.checkpointing:
        checkpoint_blocks(model)
    if settings.compile:
        objective.compile()
    return trainer


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that they end training after a step."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, _: caught.append(number)) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Refuses to train what another process trains, and removes what a killed one left half written."""
    if sys.platform == "win32":  # there, files that are open cannot be replaced or removed
        yield
        return
    path = out.with_name(f".{out.name}.lock")
    with open(path, "ab") as file:  # which changes nothing, should it be a link to another file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{out}: another process is training it; use another --out") from error
        try:
            for part in written_files(out, ".", ".*.part"):
                part.unlink()
            yield
        finally:
            path.unlink()


def train(settings: Settings) -> int:
    """Trains; returns the exit status, 128 and more after a signal. Raises OSError or ValueError."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun started several processes
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group()
        atexit.register(distributed.destroy_process_group)
    with locked(settings.out) if os.environ.get("RANK", "0") == "0" else nullcontext():
        return run(prepare(settings))


def run(trainer: Trainer) -> int:
    """Runs the steps that are left; returns the exit status."""
    settings = trainer.settings
    steps, done, first = settings.steps, len(trainer.losses), trainer.rank == 0
    per_step = settings.batch_size * settings.accumulate * trainer.processes
    hidden = None if first else True  # None shows it on a terminal only
    bar = tqdm(total=steps * per_step, initial=done * per_step, unit=" images", disable=hidden)
    if first and done >= steps:  # it may have been killed between the state and the model
        trainer.save()
    began = time.monotonic()
    with caught_signals() as signals:
        for step in range(done + 1, steps + 1):
            loss = trainer.backward(step)
            stopped = trainer.summed(len(signals)) > 0
            trainer.update(loss)
            lr = trainer.rate(step - 1)
            bar.update(per_step)
            bar.set_postfix(loss=loss, lr=lr, refresh=False)
            if first and settings.sample_every and step % settings.sample_every == 0:
                trainer.save_samples()
            due = step == steps or step % settings.save_every == 0
            if first and (due or stopped):
                trainer.save(validate=due)
                note = f"step {step} of {steps}: loss {loss:.4g}, lr {lr:.3g}"
                note += f", validation {trainer.validation[step]:.4g}" if step in trainer.validation else ""
                speed = (step - done) * per_step / (time.monotonic() - began)
                tqdm.write(f"train.py: {note}, {speed:.3g} images/s", sys.stderr)
            if first and stopped:
                tqdm.write(f"train.py: stopped after step {step}; to continue, add --resume", sys.stderr)
            if stopped:
                return 128 + max(signals, default=signal.SIGTERM)
    bar.close()
    return 0


if __name__ == "__main__":
    advice = "--batch-size, --ema 0, --checkpointing"
    sys.exit(sd.main(lambda arguments: train(parse(arguments)), "train.py", advice))
