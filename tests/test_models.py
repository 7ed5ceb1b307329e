"""Sections 3 to 6: the building blocks and the three models, by shapes, formulas and properties, and against
transformers' CLIPTextModel and diffusers' AutoencoderKL and UNet2DConditionModel of the same weights."""

import gc
import math
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
    vocab_size=514, text_dim=24, text_layers=2, text_heads=3, vae_channels=(8, 16, 24, 24), vae_blocks=1,
    unet_channels=(16, 24, 32, 32), unet_blocks=1, unet_heads=4, norm_groups=4,
)  # fmt: skip
TWO_LEVELS = sd.Config(
    vocab_size=600, text_length=20, text_dim=48, text_layers=3, text_heads=4, latent_channels=3,
    vae_channels=(16, 32, 48), vae_blocks=1, unet_channels=(40, 64), unet_attention=(False, True),
    unet_blocks=3, unet_heads=2, norm_groups=8,
)  # fmt: skip
ONE_LEVEL = sd.Config(
    vocab_size=514, text_length=7, text_dim=16, text_layers=1, text_heads=1, latent_channels=5,
    vae_channels=(8,), vae_blocks=3, unet_channels=(12,), unet_attention=(True,), unet_blocks=2, unet_heads=1,
    norm_groups=2,
)  # fmt: skip
CONFIGS = {"four levels": FOUR_LEVELS, "two levels": TWO_LEVELS, "one level": ONE_LEVEL}
TASKS = {"embed": "text_encoder", "encode": "vae", "decode": "vae", "denoise": "unet"}  # and the model
every_task = pytest.mark.parametrize("task", TASKS)
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}  # of the relative error


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@torch.no_grad()
def randomize(module: nn.Module) -> nn.Module:
    """Random weights: no bias is zero, no norm is the identity, and signals keep their size."""
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
    """The inputs of a task, different for each item of the batch."""
    tokens = min(tokens, config.text_length)
    if task == "embed":
        return [torch.randint(config.vocab_size, (batch, tokens))]
    if task == "encode":
        height, width = (side * config.downscale for side in size)
        return [torch.rand(batch, 3, height, width, dtype=dtype) * 2 - 1]
    latents = torch.randn(batch, config.latent_channels, *size, dtype=dtype)
    if task == "decode":
        return [latents]
    t = torch.tensor([981, 1, 500])[:batch]
    return [latents, t, torch.randn(batch, tokens, config.text_dim, dtype=dtype)]


def outputs(models, task: str, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of our models, or of the libraries'."""
    if task == "encode":
        result = models.vae.encode(*inputs)
        return result if isinstance(result, tuple) else (result.latent_dist.mean, result.latent_dist.logvar)
    run = {"embed": models.text_encoder, "decode": models.vae.decode, "denoise": models.unet}[task]
    result = run(*inputs)
    return (result if isinstance(result, Tensor) else result[0],)


# ------------------------------------------------------------------------------------ formulas and properties


def explicit_attention(attention: sd.Attention, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
    """Vaswani et al. 2017, eq. 1 and sec. 3.2.2, one item, head and token at a time."""
    q, k, v = attention.q(x), attention.k(context), attention.v(context)
    output, dim = torch.zeros_like(q), q.shape[-1] // attention.heads
    mask = torch.ones(1, dtype=torch.bool) if mask is None else mask
    mask = mask.expand(len(x), 1, x.shape[1], context.shape[1])
    for item in range(len(x)):
        for head in torch.arange(q.shape[-1]).split(dim):
            for token in range(q.shape[1]):
                visible = mask[item, 0, token]
                weights = torch.exp(k[item, visible][:, head] @ q[item, token, head] / math.sqrt(dim))
                output[item, token, head] = weights / weights.sum() @ v[item, visible][:, head]
    return attention.out(output)


@pytest.mark.parametrize("mask", ["none", "causal", "per item"])
@pytest.mark.parametrize("context_dim", [None, 10])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_attention_matches_its_formula(context_dim, bias, mask):
    attention = randomize(sd.Attention(24, 3, context_dim, bias)).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    context = torch.randn(2, 7, context_dim, dtype=torch.float64) if context_dim else None
    causal = torch.ones(5, 7 if context_dim else 5, dtype=torch.bool).tril()
    per_item = torch.stack([causal[3], causal[2]])[:, None, None]
    mask = {"none": None, "causal": causal, "per item": per_item}[mask]
    expected = explicit_attention(attention, x, x if context is None else context, mask)
    assert relative_error(attention(x, context, mask), expected) < 1e-13


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("queries, keys", [(1, 5), (127, 6), (128, 128), (129, 77), (300, 300)])
def test_attention_in_bfloat16_is_about_as_exact_as_pytorchs(queries, keys, has_amx, monkeypatch):
    """Outputs and gradients. On a CPU, sd.py has its own implementation; with AMX, for gradients only."""
    monkeypatch.setattr(sd, "HAS_AMX", has_amx)
    attention = randomize(sd.Attention(80, 2, 40)).bfloat16()
    x, context = torch.randn(3, queries, 80).bfloat16(), torch.randn(3, keys, 40).bfloat16()
    output_grad = torch.randn(3, queries, 80)

    def pytorchs(x: Tensor, context: Tensor) -> Tensor:
        q, k, v = attention.q(x), attention.k(context), attention.v(context)
        q, k, v = (y.unflatten(-1, (2, 40)).transpose(1, 2) for y in (q, k, v))
        return attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def results(run, dtype: torch.dtype) -> list[Tensor]:
        attention.to(dtype)
        inputs = [y.to(dtype).requires_grad_() for y in (x, context)]
        output = run(*inputs)
        gradients = torch.autograd.grad(output, inputs, output_grad.to(dtype))
        return [y.detach().double() for y in (output, *gradients)]

    exact, fused = results(pytorchs, torch.float64), results(pytorchs, torch.bfloat16)
    for our, their, expected in zip(results(attention, torch.bfloat16), fused, exact, strict=True):
        assert (our - expected).norm() < 2 * (their - expected).norm()
    with torch.no_grad():
        output = attention(x, context).double()
    assert (output - exact[0]).norm() < 2 * (fused[0] - exact[0]).norm()
    assert output.equal(fused[0]) or not has_amx


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_onednn", [False, True])
def test_linear_is_pytorchs_whichever_library_multiplies(use_onednn, dtype, grad, bias, monkeypatch):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(sd, "USE_ONEDNN", use_onednn)
    linear = sd.Linear(20, 12, bias).to(dtype)
    x = torch.randn(3, 20, 7, dtype=dtype).transpose(1, 2)  # not contiguous, like the UNet's
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    with torch.set_grad_enabled(grad), torch.profiler.profile() as profiler:
        output = linear(x)
    by_onednn = any("_linear_pointwise" in event.key for event in profiler.key_averages())
    assert by_onednn == (use_onednn and dtype == torch.float32 and not grad)
    assert relative_error(output.double(), expected) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert output.requires_grad == grad


@pytest.mark.long
@torch.no_grad()
def test_linear_can_be_compiled(monkeypatch):
    monkeypatch.setattr(sd, "USE_ONEDNN", True)
    linear, x = sd.Linear(20, 12), torch.randn(3, 7, 20)
    assert relative_error(torch.compile(linear)(x), linear(x)) < 1e-6


@pytest.mark.parametrize("dim", [320, 20])
def test_timestep_embedding_matches_its_formula(dim):
    t = torch.arange(1000)
    angles = t[:, None] * 10000 ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    embedding = sd.timestep_embedding(t, dim)
    assert embedding.dtype == torch.float32
    bound = t[:, None] * 2.0**-22 + 1e-6  # an angle in float32 is off by its last two bits
    assert ((embedding - torch.cat([angles.cos(), angles.sin()], dim=1)).abs() <= bound).all()


@torch.no_grad()
def test_log_variance_is_clamped_and_mean_is_not():
    vae = random_model(TWO_LEVELS).vae
    [images] = random_inputs("encode", TWO_LEVELS, 1, (5, 4), 0)
    mean, logvar = vae.encode(images)
    vae.quant.bias += 1000
    far_mean, top = vae.encode(images)
    vae.quant.bias -= 2000
    _, bottom = vae.encode(images)
    torch.testing.assert_close(far_mean, mean + 1000)
    assert (top == 20).all() and (bottom == -30).all() and -30 < logvar.min() < logvar.max() < 20


@every_task
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shapes_and_that_every_weight_has_a_gradient(config, task):
    """But for the bias of k, which softmax cancels."""
    model = random_model(config)
    if task == "embed":  # every id, at every position
        rows = math.ceil(config.vocab_size / config.text_length)
        inputs = [torch.arange(rows * config.text_length).view(rows, -1) % config.vocab_size]
    else:
        inputs = random_inputs(task, config, 3, (9, 13), 77)
    latents = (3, config.latent_channels, 9, 13)
    shapes = {"embed": (*inputs[0].shape, config.text_dim), "encode": latents, "denoise": latents}
    shapes["decode"] = (3, 3, 9 * config.downscale, 13 * config.downscale)
    found = outputs(model, task, *inputs)
    assert {output.shape for output in found} == {shapes[task]}
    sum((output * torch.randn_like(output)).sum() for output in found).backward()
    unused = {"encode": ("post_quant.", "decoder."), "decode": ("quant.", "encoder.")}.get(task, ())
    for name, parameter in getattr(model, TASKS[task]).named_parameters():
        if not name.startswith(unused) and not name.endswith("k.bias"):
            rows = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[None]
            assert rows.isfinite().all() and rows.abs().amax(dim=1).min() > 1e-6, name


# ---------------------------------------------------------------------------------- parity with the libraries


def small_pair(folder, small, dtype):
    """A whole checkpoint in CompVis's layout, which diffusers converts for itself."""
    pipeline = make_checkpoint.reference_pipeline(small, folder, small=True, dtype=dtype)
    return sd.load(small, dtype=dtype), pipeline


def other_pair(folder, small, dtype):
    """A folder from the libraries, of other sizes, in which a group of a norm has several channels."""
    config = TWO_LEVELS
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=config.latent_channels, out_channels=config.latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=config.unet_channels, layers_per_block=config.unet_blocks,
        attention_head_dim=config.unet_heads, cross_attention_dim=config.text_dim,
        norm_num_groups=config.norm_groups,
    )  # fmt: skip
    levels = len(config.vae_channels)
    vae = AutoencoderKL(
        latent_channels=config.latent_channels, norm_num_groups=config.norm_groups,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.vae_channels, layers_per_block=config.vae_blocks,
    )  # fmt: skip
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.text_dim, intermediate_size=4 * config.text_dim,
        num_hidden_layers=config.text_layers, num_attention_heads=config.text_heads,
        max_position_embeddings=config.text_length, hidden_act="quick_gelu",
    ))  # fmt: skip
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    for name, part in parts.items():
        randomize(part).save_pretrained(folder / name)
        part.to(dtype)
    model = sd.load(folder, dtype=dtype)
    assert model.config == config
    return model, SimpleNamespace(**parts)


@pytest.fixture(scope="module", params=LIMITS, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=[small_pair, other_pair])
def pair(request, dtype, small, tmp_path_factory):
    """Our models and theirs with the same weights."""
    return request.param(tmp_path_factory.mktemp("pair"), small, dtype)


def assert_parity(about: str, dtype: torch.dtype, ours, theirs) -> None:
    for our, their in zip(ours, theirs, strict=True):
        error = measured(f"{about}: relative error", relative_error(our, their))
        assert error <= LIMITS[dtype]


@pytest.mark.parametrize(  # size is that of the latents
    "batch, size, tokens", [(1, (8, 8), 77), (3, (9, 13), 77), (3, (16, 5), 6), (1, (1, 6), 2)], ids=str
)
@every_task
@torch.no_grad()
def test_models_match_the_libraries(pair, dtype, task, batch, size, tokens):
    model, pipeline = pair
    inputs = random_inputs(task, model.config, batch, size, tokens, dtype)
    ours, theirs = outputs(model, task, *inputs), outputs(pipeline, task, *inputs)
    assert_parity(f"small, {dtype}, {task}", dtype, ours, theirs)


@pytest.fixture(scope="module")
@torch.no_grad()
def full_pair(full, dtype, tmp_path_factory):
    """Our full-size model, and each task's inputs and the libraries' outputs, which are made first: memory
    cannot hold both models."""
    torch.manual_seed(0)
    pipeline = make_checkpoint.reference_pipeline(full, tmp_path_factory.mktemp("full_pair"), dtype=dtype)
    inputs = {task: random_inputs(task, sd.Config(), 2, (5, 7), 77, dtype) for task in TASKS}
    theirs = {task: outputs(pipeline, task, *inputs[task]) for task in TASKS}
    del pipeline
    gc.collect()
    return sd.load(full, dtype=dtype), inputs, theirs


@every_task
@torch.no_grad()
def test_full_size_models_match_the_libraries(full_pair, dtype, task):
    model, inputs, theirs = full_pair
    assert model.config == sd.Config()
    assert_parity(f"full size, {dtype}, {task}", dtype, outputs(model, task, *inputs[task]), theirs[task])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_is_close_to_float32(small, small_model, half):
    model = sd.load(small, dtype=half)
    for task in TASKS:
        inputs = random_inputs(task, small_model.config, 1, (5, 7), 77, torch.float32)
        halves = [value.to(half) if value.is_floating_point() else value for value in inputs]
        pairs = zip(outputs(model, task, *halves), outputs(small_model, task, *inputs), strict=True)
        for low, exact in pairs:
            assert low.dtype == half and low.isfinite().all()
            assert relative_error(low.float(), exact) < 0.05
