"""Section 7: forward process and samplers, against diffusers' schedulers, formulas and known results."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import measured, relative_error, seeded
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers import StableDiffusionImg2ImgPipeline as Img2ImgPipeline
from torch import Tensor

import sd

CONFIG = sd.Config()
SHAPE = (2, 4, 6, 8)
# Largest relative error in float64; diffusers' ddpm ends with noise of variance 1e-20, ours with none.
EXACT = {"ddpm": 1e-9, "ddim": 1e-12, "dpm++": 1e-12}

every_sampler = pytest.mark.parametrize("name", sd.SAMPLERS)
several_steps = pytest.mark.parametrize("steps", [1, 2, 20, 50, 500])


def assert_close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=seeded(seed), dtype=dtype)


def betas(config: sd.Config = CONFIG) -> Tensor:
    """Their square roots are evenly spaced."""
    share = torch.arange(config.timesteps, dtype=torch.float64) / (config.timesteps - 1)
    return ((1 - share) * math.sqrt(config.beta_start) + share * math.sqrt(config.beta_end)) ** 2


class DPMSolver(DPMSolverMultistepScheduler):
    """diffusers' scheduler without the rounding of the sample to float32 in its `step`."""

    def step(self, noise_pred, timestep, sample):
        self.sample = sample
        return super().step(noise_pred, timestep, sample)

    def dpm_solver_first_order_update(self, x0, sample, noise):
        return super().dpm_solver_first_order_update(x0, sample=self.sample)

    def multistep_dpm_solver_second_order_update(self, x0s, sample, noise):
        return super().multistep_dpm_solver_second_order_update(x0s, sample=self.sample)


def reference(name: str, steps: int, exact: bool = True, timesteps: int = 1000):
    """diffusers' scheduler; `exact` gives it the schedule in float64, where its own is in float32."""
    dpm = DPMSolver if exact else DPMSolverMultistepScheduler
    scheduler = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpm++": dpm}[name].from_config({
        "num_train_timesteps": timesteps, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
        "beta_end": 0.012, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
    })  # fmt: skip
    if exact:
        scheduler.alphas_cumprod = sd.noise_schedule(sd.Config(timesteps=timesteps))
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]  # ddim's
    scheduler.set_timesteps(steps)
    if exact and name == "dpm++":
        alphas_cumprod = scheduler.alphas_cumprod[scheduler.timesteps]
        sigmas = torch.cat([((1 - alphas_cumprod) / alphas_cumprod).sqrt(), torch.zeros(1)])
        assert relative_error(sigmas.float(), scheduler.sigmas) < 1e-6
        scheduler.sigmas = sigmas
    return scheduler


def largest_error(ours: sd.DDIM, theirs, timesteps: list[int], dtype: torch.dtype) -> float:
    """Runs both from the same noise, each on its own results; the largest relative error of any step."""

    def predict_noise(latents: Tensor, t: int) -> Tensor:
        """A smooth function of all that the UNet is given, of about unit variance."""
        return 0.5 * latents.roll(1, dims=-1) + torch.sin(3 * latents + t) + 0.2

    assert ours.timesteps == timesteps
    generator = seeded(7)
    options = {"generator": seeded(7)} if isinstance(theirs, DDPMScheduler) else {}
    latents = expected = normal(6, dtype=dtype)
    errors = []
    for i, t in enumerate(timesteps):
        noise = torch.randn(SHAPE, generator=generator, dtype=dtype)
        latents = ours.step(i, latents, predict_noise(latents, t), noise)
        expected = theirs.step(predict_noise(expected, t), t, expected, **options).prev_sample
        errors.append(relative_error(latents, expected))
    return max(errors)


# -------------------------------------------------------------------------------------------- forward process


@pytest.mark.parametrize("config", [CONFIG, sd.Config(timesteps=100, beta_start=0.001, beta_end=0.2)])
def test_schedule_and_add_noise_are_the_chain_of_single_steps(config):
    """q(x_t | x_t-1) = N(sqrt(1 - beta_t) x_t-1, beta_t) (Ho et al. 2020, eq. 2) adds up to eq. 4."""
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    mean, variance = one, zero
    for beta, a_t in zip(betas(config), sd.noise_schedule(config), strict=True):
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
        assert a_t.item() == pytest.approx(mean.item() ** 2, rel=1e-12)
        assert_close(sd.add_noise(one, zero, a_t), mean, 1e-12)
        assert_close(sd.add_noise(zero, one, a_t) ** 2, variance, 1e-12)


# ------------------------------------------------------------------------------------------ against diffusers


@several_steps
@every_sampler
def test_steps_match_diffusers_in_float64(name, steps):
    """Also from an image: timesteps as StableDiffusionImg2ImgPipeline shortens them, but at least one."""
    for strength in [0.01, 0.3, 0.58, 0.999, 1]:
        theirs = reference(name, steps)
        pipeline = SimpleNamespace(scheduler=theirs)
        timesteps, _ = Img2ImgPipeline.get_timesteps(pipeline, steps, max(strength, 1 / steps), "cpu")
        ours = sd.SAMPLERS[name](CONFIG, steps, strength)
        error = largest_error(ours, theirs, timesteps.tolist(), torch.float64)
        assert measured(f"sampler {name}, float64: relative error of a step", error) < EXACT[name]


@several_steps
@every_sampler
def test_steps_match_diffusers_in_float32(name, steps):
    """With diffusers' own schedule."""
    theirs = reference(name, steps, exact=False)
    error = largest_error(sd.SAMPLERS[name](CONFIG, steps), theirs, theirs.timesteps.tolist(), torch.float32)
    assert measured(f"sampler {name}, float32: relative error of a step", error) < 5e-5


@pytest.mark.parametrize("total", [1000, 100, 7, 1])
@every_sampler
def test_timesteps_of_any_number_of_steps(name, total):
    """They fall within the schedule; they are diffusers' where those do; alphas_cumprod matches them."""
    config = sd.Config(timesteps=total)
    schedule, theirs = sd.noise_schedule(config), reference(name, 1, timesteps=total)
    last = schedule[0].item() if name == "ddim" else 1
    first = min(1, total - 1) if name == "dpm++" else 0
    for steps in range(1, total + 1):
        sampler = sd.SAMPLERS[name](config, steps)
        timesteps = sampler.timesteps
        assert timesteps[-1] >= 0 and timesteps[0] < total
        assert all(t > t_prev for t, t_prev in pairwise(timesteps))
        if steps < total:
            theirs.set_timesteps(steps)
            assert timesteps == theirs.timesteps.tolist()
        else:  # diffusers' would leave the schedule; dpm++'s have one twice, and end in NaN
            assert timesteps == list(range(total - 1, first - 1, -1))
        assert sampler.alphas_cumprod == [*schedule[timesteps].tolist(), last]


# ---------------------------------------------------------------------------------------------- known results


def exact_noise(a_t: float, latents: Tensor, x0: Tensor) -> Tensor:
    """The noise in the latents, for a known x0."""
    return (latents - a_t**0.5 * x0) / (1 - a_t) ** 0.5


@pytest.mark.parametrize("strength", [0.3, 1])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 501, 999, 1000])
@every_sampler
def test_exact_predictions_lead_to_x0(name, steps, strength):
    """ddpm and dpm++ end at x0. ddim and dpm++ add no fresh noise, so that on the way the latents are x0 and
    the noise of the start, mixed by alphas_cumprod; so they are at ddim's end."""
    sampler = sd.SAMPLERS[name](CONFIG, steps, strength)
    x0, latents = normal(0), normal(1)
    noise = exact_noise(sampler.alphas_cumprod[0], latents, x0)
    for i in range(len(sampler.timesteps)):
        noise_pred = exact_noise(sampler.alphas_cumprod[i], latents, x0)
        assert_close(sampler.predict_x0(i, latents, noise_pred), x0, 1e-9)
        latents = sampler.step(i, latents, noise_pred, normal(2 + i))
        if name != "ddpm":
            assert_close(latents, sd.add_noise(x0, noise, sampler.alphas_cumprod[i + 1]), 1e-9)
    a_0 = sd.noise_schedule(CONFIG)[0].item()
    assert_close(latents, sd.add_noise(x0, noise, a_0) if name == "ddim" else x0, 1e-9)


def test_ddpm_steps_are_the_posterior():
    """Mean and variance of q(x_t-1 | x_t, x_0), Ho et al. 2020, eq. 7, at every t."""
    sampler, beta = sd.SAMPLERS["ddpm"](CONFIG, 1000), betas()
    x0, latents, noise = normal(0), normal(1), normal(2)
    for i, t in enumerate(sampler.timesteps):
        a_t, a_prev = (1 - beta[: t + 1]).prod(), (1 - beta[:t]).prod()
        mean = (a_prev.sqrt() * beta[t] * x0 + (1 - beta[t]).sqrt() * (1 - a_prev) * latents) / (1 - a_t)
        variance = (1 - a_prev) / (1 - a_t) * beta[t]
        noise_pred = exact_noise(a_t, latents, x0)
        without = sampler.step(i, latents, noise_pred, torch.zeros_like(noise))
        assert_close(without, mean, 1e-9)
        assert_close(sampler.step(i, latents, noise_pred, noise) - without, variance.sqrt() * noise, 1e-9)


@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (-3.0, 0.5), (0.7, 3.0), (2.5, 1.6)])
@every_sampler
def test_marginals_of_normal_data(name, mean, deviation):
    """For x0 from N(mean, deviation^2) the best prediction is known, and with it many steps lead to this
    distribution. Every step is then linear: mean and deviation are read off where a step takes the mean, the
    latents one deviation from it, and the mean with fresh noise of one."""
    sampler = sd.SAMPLERS[name](CONFIG, 1000)
    noise = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)

    def marginal(a_t: float) -> tuple[float, float]:
        return a_t**0.5 * mean, (a_t * deviation**2 + 1 - a_t) ** 0.5

    center, spread = torch.tensor(marginal(sampler.alphas_cumprod[0]), dtype=torch.float64)
    for i, a_t in enumerate(sampler.alphas_cumprod[:-1]):
        latents = torch.stack([center, center + spread, center])
        noise_pred = (1 - a_t) ** 0.5 * (latents - marginal(a_t)[0]) / marginal(a_t)[1] ** 2
        latents = sampler.step(i, latents, noise_pred, noise)
        center, spread = latents[0], (latents[1:] - latents[0]).square().sum().sqrt()
    expected_mean, expected_deviation = marginal(sampler.alphas_cumprod[-1])
    assert center.item() == pytest.approx(expected_mean, abs=1e-9)
    assert spread.item() == pytest.approx(expected_deviation, rel=0.01)
