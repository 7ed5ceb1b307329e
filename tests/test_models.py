"""Sections 3 to 6: the building blocks and the three models, by shapes, formulas and properties, and against
transformers' CLIPTextModel and diffusers' AutoencoderKL and UNet2DConditionModel of the same weights."""

import gc
import json
import math
from functools import partial
from types import SimpleNamespace

import make_checkpoint
import pytest
import torch
import torch.nn.functional as F
from conftest import measured, relative_error
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import sd

FOUR_LEVELS = sd.Config(
    vocab_size=514, text_width=24, text_layers=2, text_heads=3, vae_widths=(8, 16, 24, 24), vae_blocks=1,
    unet_widths=(16, 24, 32, 32), unet_blocks=1, unet_heads=4, norm_groups=4,
)  # fmt: skip
SHRINKS_4_TIMES = sd.Config(
    vocab_size=600, text_length=20, text_width=48, text_layers=3, text_heads=4, latent_channels=3,
    vae_widths=(16, 32, 48), vae_blocks=1, unet_widths=(32, 64), unet_attends=(False, True), unet_blocks=3,
    unet_heads=2, norm_groups=8,
)  # fmt: skip
ONE_LEVEL = sd.Config(
    vocab_size=514, text_length=7, text_width=16, text_layers=1, text_heads=1, latent_channels=5,
    vae_widths=(8,), vae_blocks=3, unet_widths=(12,), unet_attends=(True,), unet_blocks=2, unet_heads=1,
    norm_groups=2,
)  # fmt: skip
CONFIGS = {"four levels": FOUR_LEVELS, "shrinks 4 times": SHRINKS_4_TIMES, "one level": ONE_LEVEL}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

TASKS = {"embed": "text_encoder", "encode": "vae", "decode": "vae", "denoise": "unet"}  # and who does it
every_task = pytest.mark.parametrize("task", TASKS)

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the relative error
every_batch = pytest.mark.parametrize(  # size is the latent's
    "batch, size, tokens", [(1, (8, 8), 77), (3, (9, 13), 77), (3, (16, 5), 6), (1, (1, 6), 2)], ids=str
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@torch.no_grad()
def randomize(module: nn.Module) -> nn.Module:
    """Weights that exercise everything: no bias at zero, no norm at identity; signals keep their size."""
    for name, parameter in module.named_parameters():
        parameter.normal_()
        if parameter.dim() == 1:
            parameter.mul_(0.1).add_(name.endswith("weight"))
        elif "embedding" not in name:
            parameter.div_(math.sqrt(parameter[0].numel()))
    return module.eval()


def random_model(config: sd.Config) -> sd.StableDiffusion:
    return randomize(sd.StableDiffusion(config)).double()


def random_inputs(
    task: str, config: sd.Config, batch: int, size: tuple, tokens: int, dtype=torch.float64
) -> list[Tensor]:
    """What `ours` and `theirs` take for a task; each item of the batch has its own of everything."""
    tokens = min(tokens, config.text_length)
    if task == "embed":
        return [torch.randint(config.vocab_size, (batch, tokens))]
    if task == "encode":
        height, width = (side * config.downscale for side in size)
        return [torch.rand(batch, 3, height, width, dtype=dtype) * 2 - 1]
    latent = torch.randn(batch, config.latent_channels, *size, dtype=dtype)
    if task == "decode":
        return [latent]
    t = torch.tensor([981, 1, 500])[:batch]
    return [latent, t, torch.randn(batch, tokens, config.text_width, dtype=dtype)]


def ours(model, task: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    match task:
        case "embed":
            return (model.text_encoder(*inputs),)
        case "encode":
            return model.vae.encode(*inputs)
        case "decode":
            return (model.vae.decode(*inputs),)
        case "denoise":
            return (model.unet(*inputs),)


def theirs(pipeline, task: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    match task:
        case "embed":
            return (pipeline.text_encoder(*inputs).last_hidden_state,)
        case "encode":
            distribution = pipeline.vae.encode(*inputs).latent_dist
            return distribution.mean, distribution.logvar
        case "decode":
            return (pipeline.vae.decode(*inputs).sample,)
        case "denoise":
            return (pipeline.unet(*inputs).sample,)


# ----------------------------------------------------------------------------------------------------- shapes

BLOCKS = {  # how it is made, the shapes of its inputs, the shape of its output
    "Attention, self": (lambda: sd.Attention(24, 3), [(2, 5, 24)], (2, 5, 24)),
    "Attention, causal": (lambda: partial(sd.Attention(24, 3), causal=True), [(2, 5, 24)], (2, 5, 24)),
    "Attention, seen": (
        lambda: partial(sd.Attention(24, 3), seen=torch.ones(2, 1, 1, 5).bool()), [(2, 5, 24)], (2, 5, 24)
    ),
    "Attention, cross": (lambda: sd.Attention(24, 3, 10, bias=False), [(2, 5, 24), (2, 7, 10)], (2, 5, 24)),
    "ResidualBlock": (lambda: sd.ResidualBlock(8, 8, 4, 1e-6), [(2, 8, 9, 13)], (2, 8, 9, 13)),
    "ResidualBlock, wider": (lambda: sd.ResidualBlock(8, 12, 4, 1e-6), [(2, 8, 9, 13)], (2, 12, 9, 13)),
    "ResidualBlock, t": (lambda: sd.ResidualBlock(8, 8, 4, 1e-5, 20), [(2, 8, 3, 5), (2, 20)], (2, 8, 3, 5)),
    "Upsample": (lambda: sd.Upsample(6), [(2, 6, 5, 7)], (2, 6, 10, 14)),
    "Upsample, odd": (lambda: partial(sd.Upsample(6), size=(9, 13)), [(2, 6, 5, 7)], (2, 6, 9, 13)),
    "TextBlock": (lambda: sd.TextBlock(24, 3), [(2, 5, 24)], (2, 5, 24)),
    "ImageAttention": (lambda: sd.ImageAttention(8, 4), [(2, 8, 3, 5)], (2, 8, 3, 5)),
    "SpatialTransformer": (
        lambda: sd.SpatialTransformer(8, FOUR_LEVELS), [(2, 8, 3, 5), (2, 7, 24)], (2, 8, 3, 5)
    ),
    "UNetBlock, attends": (
        lambda: sd.UNetBlock(8, 12, True, FOUR_LEVELS), [(2, 8, 3, 5), (2, 64), (2, 7, 24)], (2, 12, 3, 5)
    ),
    "UNetBlock": (
        lambda: sd.UNetBlock(8, 12, False, FOUR_LEVELS), [(2, 8, 3, 5), (2, 64), (2, 7, 24)], (2, 12, 3, 5)
    ),
    "timestep_embedding": (lambda: partial(sd.timestep_embedding, width=20), [(3,)], (3, 20)),
}  # fmt: skip


@pytest.mark.parametrize("make, inputs, output", BLOCKS.values(), ids=BLOCKS)
def test_shapes_of_a_block(make, inputs, output):
    assert make()(*(torch.randn(shape) for shape in inputs)).shape == output


@every_batch
@every_config
def test_shapes_of_the_models(config, batch, size, tokens):
    model = sd.StableDiffusion(config)
    ids, image, latent = (
        random_inputs(task, config, batch, size, tokens, torch.float32)
        for task in ("embed", "encode", "decode")
    )
    channels, (height, width) = config.latent_channels, size
    assert model.vae.encoder(*image).shape == (batch, 2 * channels, height, width)
    assert [moment.shape for moment in model.vae.encode(*image)] == 2 * [(batch, channels, height, width)]
    pixels = (batch, 3, height * config.downscale, width * config.downscale)
    assert model.vae.decoder(*latent).shape == model.vae.decode(*latent).shape == pixels
    context = model.text_encoder(*ids)
    assert context.shape == (*ids[0].shape, config.text_width)
    assert model.unet(*latent, torch.arange(batch), context).shape == (batch, channels, height, width)


@pytest.mark.parametrize("part, compvis", [
    ("text_encoder", "cond_stage_model."), ("vae", "first_stage_model."), ("unet", "model.diffusion_model."),
])  # fmt: skip
def test_default_config_has_as_many_parameters_as_stable_diffusion_v1(part, compvis):
    layout = json.loads((make_checkpoint.HERE / "sd15_keys.json").read_text())
    needed = {name: shape for name, (shape, _) in layout.items() if name.startswith(compvis)}
    expected = sum(math.prod(shape) for name, shape in needed.items() if not name.endswith("position_ids"))
    with torch.device("meta"):
        model = getattr(sd.StableDiffusion(sd.Config()), part)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert not list(model.buffers())


# ------------------------------------------------------------------------------------ formulas and properties


def explicit_attention(attention: sd.Attention, x: Tensor, context: Tensor | None, causal: bool) -> Tensor:
    """Vaswani et al. 2017, eq. 1 and sec. 3.2.2, one item, head and token at a time."""
    if context is None:
        q, k, v = attention.qkv(x).chunk(3, dim=-1)
    else:
        q, (k, v) = attention.q(x), attention.kv(context).chunk(2, dim=-1)
    gathered, size = torch.zeros_like(q), q.shape[-1] // attention.heads
    for item in range(len(x)):
        for head in torch.arange(q.shape[-1]).split(size):
            for token in range(q.shape[1]):
                seen = slice(token + 1) if causal else slice(None)
                weights = torch.exp(k[item, seen][:, head] @ q[item, token, head] / math.sqrt(size))
                gathered[item, token, head] = weights / weights.sum() @ v[item, seen][:, head]
    return attention.out(gathered)


@torch.no_grad()
@pytest.mark.parametrize("context_width, causal, bias", [
    (None, False, False), (None, False, True), (None, True, True), (10, False, False), (10, False, True),
])  # fmt: skip
def test_attention_is_the_papers(context_width, causal, bias):
    attention = randomize(sd.Attention(24, 3, context_width, bias)).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    context = context_width and torch.randn(2, 7, context_width, dtype=torch.float64)
    expected = explicit_attention(attention, x, context, causal)
    assert relative_error(attention(x, context, causal), expected) < 1e-13


@pytest.mark.parametrize("queries, keys", [(1, 1), (127, 5), (128, 128), (129, 77), (300, 300)])
def test_attention_in_pieces_is_attention(queries, keys):
    """Forwards and backwards, of views as `Attention` has them."""
    x = torch.randn(2, 3, 300, 3, 10, dtype=torch.float64, requires_grad=True)
    q, k, v = x[:, :, :queries, 0], *(x[:, :, :keys, i] for i in (1, 2))
    ours, expected = sd.attend_in_pieces(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert relative_error(ours.detach(), expected.detach()) < 1e-14
    gradients = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (ours, expected)]
    assert relative_error(*gradients) < 1e-13


@torch.no_grad()
@pytest.mark.parametrize("context_width", [None, 10])
def test_attention_in_bfloat16_is_about_as_exact_as_the_librarys(context_width, monkeypatch):
    attention = randomize(sd.Attention(80, 2, context_width))
    x, context = torch.randn(2, 300, 80), context_width and torch.randn(2, 77, context_width)
    exact = attention(x, context)
    low = [y if y is None else y.bfloat16() for y in (x, context)]
    error = relative_error(attention.bfloat16()(*low).float(), exact)
    monkeypatch.setattr(sd, "attend_in_pieces", F.scaled_dot_product_attention)
    assert error < 2 * relative_error(attention(*low).float(), exact)


@torch.no_grad()
def test_a_token_sees_only_itself_and_those_before():
    encoder = random_model(FOUR_LEVELS).text_encoder
    ids = torch.randint(FOUR_LEVELS.vocab_size, (1, 77))
    before = encoder(ids)
    for place in (1, 40, 76):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 1) % FOUR_LEVELS.vocab_size
        difference = (encoder(changed) - before).abs().amax(dim=(0, 2))  # of each token
        assert difference[:place].max() < 1e-12 and difference[place:].min() > 1e-6
    torch.testing.assert_close(encoder(ids[:, :40]), before[:, :40])


@pytest.mark.parametrize("width", [320, 20])
def test_timestep_embedding_is_the_papers(width):
    t = torch.arange(1000)
    place = torch.arange(width // 2, dtype=torch.float64)
    angles = t[:, None] * 10000 ** (-2 * place / width)  # Vaswani et al. 2017, sec. 3.5
    embedding = sd.timestep_embedding(t, width)
    assert embedding.dtype == torch.float32
    bound = t[:, None] * 2.0**-22 + 1e-6  # an angle in float32 is off by its last two bits
    assert ((embedding - torch.cat([angles.cos(), angles.sin()], dim=1)).abs() <= bound).all()


@torch.no_grad()
@pytest.mark.parametrize("size", [None, (10, 14), (9, 14), (9, 13)])
def test_upsample_repeats_each_pixel_and_smooths(size):
    upsample = randomize(sd.Upsample(6)).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    height, width = size or (10, 14)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, :height, :width]
    torch.testing.assert_close(upsample(x, size), upsample.conv(repeated))


@torch.no_grad()
def test_log_variance_is_clamped_and_the_mean_is_not():
    vae = random_model(SHRINKS_4_TIMES).vae
    [image] = random_inputs("encode", SHRINKS_4_TIMES, 1, (5, 4), 0)
    mean, logvar = vae.encode(image)
    vae.quant.bias += 1000
    far_mean, top = vae.encode(image)
    vae.quant.bias -= 2000
    _, bottom = vae.encode(image)
    torch.testing.assert_close(far_mean, mean + 1000)
    assert (top == 20).all() and (bottom == -30).all() and -30 < logvar.min() < logvar.max() < 20


@every_task
@every_config
@torch.no_grad()
def test_an_item_is_the_same_alone_and_in_a_batch(config, task):
    model = random_model(config)
    inputs = random_inputs(task, config, 3, (9, 13), 77)
    together = ours(model, task, *inputs)
    for i in range(3):
        alone = ours(model, task, *(value[i : i + 1] for value in inputs))
        for one, many in zip(alone, together, strict=True):
            assert relative_error(one, many[i : i + 1]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("changed", ["latent", "timestep", "context"])
def test_the_denoiser_uses_each_input_of_each_item(changed):
    unet = random_model(SHRINKS_4_TIMES).unet
    inputs = random_inputs("denoise", SHRINKS_4_TIMES, 3, (9, 13), 20)
    before = unet(*inputs)
    inputs[["latent", "timestep", "context"].index(changed)][1] += 7
    difference = (unet(*inputs) - before).abs().amax(dim=(1, 2, 3))  # of each item
    assert difference[1] > 1e-3 and max(difference[0], difference[2]) < 1e-12


@every_task
@every_config
def test_every_weight_has_a_gradient(config, task):
    model = random_model(config)
    if task == "embed":  # every id, at every position
        rows = math.ceil(config.vocab_size / config.text_length)
        inputs = [torch.arange(rows * config.text_length).view(rows, -1) % config.vocab_size]
    else:
        inputs = random_inputs(task, config, 3, (9, 13), 77)
    sum((output * torch.randn_like(output)).sum() for output in ours(model, task, *inputs)).backward()
    unused = {"encode": ("post_quant.", "decoder."), "decode": ("quant.", "encoder.")}.get(task, ())
    for name, parameter in getattr(model, TASKS[task]).named_parameters():
        if not name.startswith(unused):
            rows = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[None]
            assert rows.isfinite().all() and rows.abs().amax(dim=1).min() > 1e-6, name


# ---------------------------------------------------------------------------------- parity with the libraries


def small_pair(folder, small, dtype):
    """A whole checkpoint in CompVis's layout, which diffusers converts for itself."""
    pipeline = make_checkpoint.reference_pipeline(small, folder, small=True, dtype=dtype)
    return sd.StableDiffusion.load(small, dtype=dtype), pipeline


def other_pair(folder, small, dtype):
    """A folder from the libraries, of other sizes, in which a norm's group is more than one channel wide."""
    config = SHRINKS_4_TIMES
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=config.latent_channels, out_channels=config.latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=config.unet_widths, layers_per_block=config.unet_blocks,
        attention_head_dim=config.unet_heads, cross_attention_dim=config.text_width,
        norm_num_groups=config.norm_groups,
    )  # fmt: skip
    levels = len(config.vae_widths)
    vae = AutoencoderKL(
        latent_channels=config.latent_channels, norm_num_groups=config.norm_groups,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.vae_widths, layers_per_block=config.vae_blocks,
    )  # fmt: skip
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.text_width, intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers, num_attention_heads=config.text_heads,
        max_position_embeddings=config.text_length, hidden_act="quick_gelu",
    ))  # fmt: skip
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    for name, part in parts.items():
        randomize(part).save_pretrained(folder / name)
        part.to(dtype)
    model = sd.StableDiffusion.load(folder, dtype=dtype)
    assert model.config == config
    return model, SimpleNamespace(**parts)


@pytest.fixture(scope="module", params=LIMITS, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=[small_pair, other_pair])
def pair(request, dtype, small, tmp_path_factory):
    """Our models and theirs with the same weights."""
    return request.param(tmp_path_factory.mktemp("pair"), small, dtype)


@every_batch
@every_task
@torch.no_grad()
def test_parity(pair, dtype, task, batch, size, tokens):
    model, pipeline = pair
    inputs = random_inputs(task, model.config, batch, size, tokens, dtype)
    for our, their in zip(ours(model, task, *inputs), theirs(pipeline, task, *inputs), strict=True):
        assert (
            measured(f"small, {dtype}, {task}: relative error", relative_error(our, their)) <= LIMITS[dtype]
        )


@pytest.fixture(scope="module")
@torch.no_grad()
def full_pair(full, dtype, tmp_path_factory):
    """Our full-size model, and each task's inputs and their outputs; memory cannot hold both models."""
    torch.manual_seed(0)
    pipeline = make_checkpoint.reference_pipeline(full, tmp_path_factory.mktemp("full_pair"), dtype=dtype)
    inputs = {task: random_inputs(task, sd.Config(), 3, (9, 13), 77, dtype) for task in TASKS}
    outputs = {task: theirs(pipeline, task, *inputs[task]) for task in TASKS}
    del pipeline
    gc.collect()
    return sd.StableDiffusion.load(full, dtype=dtype), inputs, outputs


@every_task
@torch.no_grad()
def test_parity_at_full_size(full_pair, dtype, task):
    model, inputs, outputs = full_pair
    assert model.config == sd.Config()
    for our, their in zip(ours(model, task, *inputs[task]), outputs[task], strict=True):
        assert (
            measured(f"full size, {dtype}, {task}: relative error", relative_error(our, their))
            <= LIMITS[dtype]
        )


@every_task
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_is_near_float32(small, small_model, half, task):
    model = sd.StableDiffusion.load(small, dtype=half)
    inputs = random_inputs(task, model.config, 1, (9, 13), 77, torch.float32)
    halves = [value.to(half) if value.is_floating_point() else value for value in inputs]
    for low, exact in zip(ours(model, task, *halves), ours(small_model, task, *inputs), strict=True):
        assert low.dtype == half and low.isfinite().all()
        assert relative_error(low.float(), exact) < 0.05
