"""Section 7: forward process and samplers, against diffusers' schedulers, formulas and known ends."""

import math
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import measured, relative_error
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers import StableDiffusionImg2ImgPipeline as ImageToImagePipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sd

CONFIG = sd.Config()
SHAPE = (2, 4, 6, 8)
STEPS = [1, 2, 20, 50, 500]
STRENGTHS = [0.01, 0.02, 0.3, 0.5, 0.58, 0.75, 0.999, 1]
# Largest relative error in float64; diffusers' ddpm ends with noise of variance 1e-20, ours with none.
EXACT = {"ddpm": 1e-9, "ddim": 1e-12, "dpm++": 1e-12}
SCHEDULER_CONFIG = {  # Stable Diffusion v1's
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def assert_close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class DPMSolver(DPMSolverMultistepScheduler):
    """diffusers', whose `step` rounds the sample to float32, kept from doing so."""

    def step(self, noise_pred, timestep, sample):
        self.sample = sample
        return super().step(noise_pred, timestep, sample)

    def dpm_solver_first_order_update(self, clean, sample, noise):
        return super().dpm_solver_first_order_update(clean, sample=self.sample)

    def multistep_dpm_solver_second_order_update(self, cleans, sample, noise):
        return super().multistep_dpm_solver_second_order_update(cleans, sample=self.sample)


def reference(sampler: str, steps: int, exact: bool = True):
    """diffusers' scheduler; `exact` gives it the schedule in float64, where its own is in float32."""
    dpm = DPMSolver if exact else DPMSolverMultistepScheduler
    scheduler_class = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm++": dpm}[sampler]
    scheduler = scheduler_class.from_config(SCHEDULER_CONFIG)
    if exact:
        scheduler.alphas_cumprod = sd.noise_schedule(CONFIG)
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]  # ddim's
    scheduler.set_timesteps(steps)
    if exact and sampler == "dpm++":
        levels = scheduler.alphas_cumprod[scheduler.timesteps]
        sigmas = torch.cat([((1 - levels) / levels).sqrt(), torch.zeros(1)])
        assert relative_error(sigmas.float(), scheduler.sigmas) < 1e-6
        scheduler.sigmas = sigmas
    return scheduler


def denoiser(latent: Tensor, t: int) -> Tensor:
    """Stands for the UNet: a smooth function of all that it is given, of about unit variance."""
    return 0.5 * latent.roll(1, dims=-1) + torch.sin(3 * latent + t) + 0.2


def compare(ours: sd.Sampler, theirs, timesteps: list[int], dtype: torch.dtype) -> float:
    """Runs both from the same noise, each on its own results; the largest relative error of any step."""
    assert ours.timesteps == timesteps
    generator, their_generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    noise = {"generator": their_generator} if isinstance(theirs, DDPMScheduler) else {}

    def draw():
        return torch.randn(SHAPE, generator=generator, dtype=dtype)

    latent = expected = normal(6, dtype=dtype)
    errors = []
    for i, t in enumerate(timesteps):
        latent = ours.step(i, latent, denoiser(latent, t), draw)
        expected = theirs.step(denoiser(expected, t), t, expected, **noise).prev_sample
        errors.append(relative_error(latent, expected))
    return max(errors)


# -------------------------------------------------------------------------------------------- forward process


def test_noise_schedule_is_diffusers():
    schedule = sd.noise_schedule(CONFIG)
    assert schedule.dtype == torch.float64 and schedule.shape == (1000,)
    assert relative_error(schedule.float(), DDPMScheduler.from_config(SCHEDULER_CONFIG).alphas_cumprod) < 1e-6


@pytest.mark.parametrize("timesteps, beta_start, beta_end", [(1000, 0.00085, 0.012), (100, 0.001, 0.2)])
def test_noise_schedule_formula(timesteps, beta_start, beta_end):
    schedule = sd.noise_schedule(sd.Config(timesteps=timesteps, beta_start=beta_start, beta_end=beta_end))
    alphas_cumprod = 1.0
    for t, level in enumerate(schedule.tolist()):
        share = t / (timesteps - 1)
        alphas_cumprod *= 1 - ((1 - share) * math.sqrt(beta_start) + share * math.sqrt(beta_end)) ** 2
        assert level == pytest.approx(alphas_cumprod, rel=1e-12)


def test_forward_process_is_the_chain_of_single_steps():
    """q(x_t | x_t-1) = N(sqrt(1 - beta_t) x_t-1, beta_t) (Ho et al. 2020, eq. 2) adds up to eq. 4."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    mean, variance = torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    for beta, level in zip(roots**2, sd.noise_schedule(CONFIG)):
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
        assert_close(sd.add_noise(one, zero, level), mean, 1e-12)
        assert_close(sd.add_noise(zero, one, level) ** 2, variance, 1e-12)


@pytest.mark.parametrize("t", [0, 1, 250, 500, 999])
def test_forward_process_statistics(t):
    """Mean and variance over a million samples, within five standard errors of the stated ones."""
    number, clean, level = 10**6, 1.7, sd.noise_schedule(CONFIG)[t]
    samples = sd.add_noise(
        torch.full((number,), clean), normal(t, number, dtype=torch.float32), level
    ).double()
    mean, variance = level.sqrt() * clean, 1 - level
    assert abs(samples.mean() - mean) < 5 * (variance / number).sqrt()
    assert abs(samples.var() - variance) < 5 * variance * math.sqrt(2 / number)


def test_forward_process_is_diffusers():
    """A level for each latent of a batch, and one for all."""
    clean, noise, timesteps = normal(0, 3, 4, 5, 7), normal(1, 3, 4, 5, 7), torch.tensor([0, 421, 999])
    levels = sd.noise_schedule(CONFIG)[timesteps]
    expected = reference("ddpm", 1).add_noise(clean, noise, timesteps)
    assert_close(sd.add_noise(clean, noise, levels.view(-1, 1, 1, 1)), expected, 1e-14)
    for i, level in enumerate(levels):
        assert_close(sd.add_noise(clean[i], noise[i], level), expected[i], 1e-14)


# ------------------------------------------------------------------------------------------ against diffusers


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sampler", sd.SAMPLERS)
def test_sampler_is_diffusers(sampler, steps):
    """Each step's result, in float64."""
    theirs = reference(sampler, steps)
    error = compare(sd.SAMPLERS[sampler](CONFIG, steps), theirs, theirs.timesteps.tolist(), torch.float64)
    assert measured(f"sampler {sampler}, float64: relative error of a step", error) < EXACT[sampler]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sampler", sd.SAMPLERS)
def test_sampler_is_diffusers_in_float32(sampler, steps):
    """The same with diffusers' own schedule, untouched."""
    theirs = reference(sampler, steps, exact=False)
    error = compare(sd.SAMPLERS[sampler](CONFIG, steps), theirs, theirs.timesteps.tolist(), torch.float32)
    assert measured(f"sampler {sampler}, float32: relative error of a step", error) < 5e-5


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("sampler", sd.SAMPLERS)
def test_image_to_image_is_diffusers(sampler, strength, steps):
    """Timesteps as StableDiffusionImg2ImgPipeline shortens them, but one is run where it would run none."""
    theirs = reference(sampler, steps)
    strength_there = max(strength, 1 / steps)
    pipeline = SimpleNamespace(scheduler=theirs)
    timesteps, _ = ImageToImagePipeline.get_timesteps(pipeline, steps, strength_there, "cpu")
    error = compare(sd.SAMPLERS[sampler](CONFIG, steps, strength), theirs, timesteps.tolist(), torch.float64)
    assert error < EXACT[sampler]


@pytest.mark.parametrize("sampler", sd.SAMPLERS)
def test_timesteps(sampler):
    """From 1 to 1000 steps: within the schedule, falling, diffusers' own where those are; levels to match."""
    schedule, scheduler = sd.noise_schedule(CONFIG), reference(sampler, 1)
    for steps in range(1, 1001):
        process = sd.SAMPLERS[sampler](CONFIG, steps)
        timesteps = process.timesteps
        assert 0 <= timesteps[-1] and timesteps[0] <= 999
        assert all(now > after for now, after in pairwise(timesteps))
        scheduler.set_timesteps(steps)
        if steps < 1000:
            assert timesteps == scheduler.timesteps.tolist()
        assert process.levels[:-1] == schedule[timesteps].tolist()
        assert process.levels[-1] == (schedule[0] if sampler == "ddim" else 1)


@pytest.mark.parametrize(
    "sampler, steps, timesteps",
    [
        ("ddpm", 50, list(range(981, 0, -20))),
        ("ddim", 4, [751, 501, 251, 1]),
        ("dpm++", 4, [999, 749, 500, 250]),
        ("ddpm", 1, [1]),
        ("dpm++", 1, [999]),
        ("ddpm", 1000, list(range(999, -1, -1))),  # diffusers' start at 1000, outside the schedule
        ("ddim", 1000, list(range(999, -1, -1))),
        ("dpm++", 1000, list(range(999, 0, -1))),  # diffusers' have one twice, and end in NaN
    ],
)
def test_known_timesteps(sampler, steps, timesteps):
    assert sd.SAMPLERS[sampler](CONFIG, steps).timesteps == timesteps


# ------------------------------------------------------------------------------------------------- known ends


def oracle(process: sd.Sampler, i: int, latent: Tensor, clean: Tensor) -> Tensor:
    """What a denoiser predicts that knows the clean latent."""
    level = process.levels[i]
    return (latent - level**0.5 * clean) / (1 - level) ** 0.5


@pytest.mark.parametrize("strength", [0.02, 0.6, 1])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 500, 501, 750, 999, 1000])
@pytest.mark.parametrize("sampler", sd.SAMPLERS)
def test_oracle_leads_to_the_clean_latent(sampler, steps, strength):
    """ddpm and dpm++ return it. Without fresh noise, as in ddim and dpm++, each latent on the way is the
    clean one and the noise at the start, mixed at that step's level; ddim ends so too, at the lowest."""
    process = sd.SAMPLERS[sampler](CONFIG, steps, strength)
    clean, latent = normal(0), normal(1)
    noise = oracle(process, 0, latent, clean)
    fresh_noise = map(normal, count(2))
    for i in range(len(process.timesteps)):
        latent = process.step(i, latent, oracle(process, i, latent, clean), lambda: next(fresh_noise))
        if sampler != "ddpm":
            assert_close(latent, sd.add_noise(clean, noise, process.levels[i + 1]), 1e-9)
    lowest = sd.noise_schedule(CONFIG)[0]
    expected = lowest.sqrt() * clean + (1 - lowest).sqrt() * noise if sampler == "ddim" else clean
    assert_close(latent, expected, 1e-9)


def test_ddpm_posterior():
    """Mean and variance of q(x_t-1 | x_t, x_0), Ho et al. 2020, eq. 7, at every t."""
    process = sd.SAMPLERS["ddpm"](CONFIG, 1000)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    clean, latent, noise = normal(0), normal(1), normal(2)
    for i, t in enumerate(process.timesteps):
        level, after = (1 - betas[: t + 1]).prod(), (1 - betas[:t]).prod()
        mean = (after.sqrt() * betas[t] * clean + (1 - betas[t]).sqrt() * (1 - after) * latent) / (1 - level)
        variance = (1 - after) / (1 - level) * betas[t]
        noise_pred = oracle(process, i, latent, clean)
        without = process.step(i, latent, noise_pred, lambda: torch.zeros(SHAPE, dtype=torch.float64))
        assert_close(without, mean, 1e-9)
        drawn = process.step(i, latent, noise_pred, lambda: noise) - without
        assert_close(drawn, variance.sqrt() * noise, 1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_no_fresh_noise(sampler):
    def draw():
        raise AssertionError("drew noise")

    process = sd.SAMPLERS[sampler](CONFIG, 10)
    for i in range(10):
        process.step(i, normal(0), normal(1), draw)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(mean=st.floats(-3, 3), deviation=st.floats(0.5, 3))
@pytest.mark.parametrize("sampler", sd.SAMPLERS)
def test_marginals(sampler, mean, deviation):
    """Clean latents from N(mean, deviation^2) have a known best denoiser; with it many steps lead to these.

    Every step is then linear, so that mean and deviation need no samples: they can be read off where a step
    takes the mean, a latent one deviation from it, and the mean with fresh noise of one.
    """
    process = sd.SAMPLERS[sampler](CONFIG, 1000)
    fresh_noise = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)

    def marginal(level: float) -> tuple[float, float]:
        return level**0.5 * mean, (level * deviation**2 + 1 - level) ** 0.5

    now, spread = torch.tensor(marginal(process.levels[0]), dtype=torch.float64)
    for i, level in enumerate(process.levels[:-1]):
        latent = torch.stack([now, now + spread, now])
        noise_pred = (1 - level) ** 0.5 * (latent - marginal(level)[0]) / marginal(level)[1] ** 2
        latent = process.step(i, latent, noise_pred, lambda: fresh_noise)
        now, spread = latent[0], (latent[1:] - latent[0]).square().sum().sqrt()
    expected_mean, expected_spread = marginal(process.levels[-1])
    assert now.item() == pytest.approx(expected_mean, abs=1e-9)
    assert spread.item() == pytest.approx(expected_spread, rel=0.01)
