"""Objectives against definitions written out in float64, closed forms, and diffusers."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from mhla_gen.config import ObjectiveConfig, TrainConfig, load_config
from mhla_gen.config.load import ConfigError
from mhla_gen.training.ddpm import DDPM, discretised_log_likelihood, gaussian_divergence, schedule
from mhla_gen.training.dit import build_objective
from mhla_gen.training.objectives import FlowMatching

SHAPES = [(3, 4, 5), (2, 3, 4, 5)]
PREDICTIONS = ["epsilon", "v_prediction"]


def betas():
    return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


def posterior(t, sample, noisy):
    """Mean and variance of q(x_{t-1} | x_t, x_0), as the product of two Gaussians in x_{t-1}."""
    beta = float(betas()[t])
    product = float(torch.prod(1 - betas()[:t]))
    precision = (1 - beta) / beta + 1 / (1 - product)
    mean = (math.sqrt(1 - beta) * noisy / beta + math.sqrt(product) * sample / (1 - product)) / (
        precision
    )
    return mean, 1 / precision


def one_loss(prediction, variance, sample, noise, t, predicts):
    """The hybrid loss of one sample, from its definition."""
    product = float(torch.prod(1 - betas()[: t + 1]))
    alpha, sigma = math.sqrt(product), math.sqrt(1 - product)
    noisy = alpha * sample + sigma * noise
    if predicts == "epsilon":
        target, found = noise, (noisy - sigma * prediction) / alpha
    else:
        target, found = alpha * noise - sigma * sample, alpha * noisy - sigma * prediction
    simple = (prediction - target).square().mean()
    low = math.log(posterior(max(t, 1), sample, noisy)[1])
    high = math.log(float(betas()[t]))
    spread = (0.5 * (low + (variance + 1) / 2 * (high - low))).exp()
    if t > 0:
        true_mean, true_variance = posterior(t, sample, noisy)
        mean = posterior(t, found, noisy)[0]
        true = Normal(true_mean, torch.full_like(mean, true_variance).sqrt())
        term = kl_divergence(true, Normal(mean, spread))
    else:
        # At t = 0 the posterior is the sample itself.
        model = Normal(found, spread)
        upper = torch.where(sample > 0.999, 1.0, model.cdf(sample + 1 / 255))
        lower = torch.where(sample < -0.999, 0.0, model.cdf(sample - 1 / 255))
        term = -(upper - lower).log()
    return simple + term.mean() / math.log(2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_the_hybrid_loss_is_its_definition(shape, predicts):
    times = torch.tensor([0, 0, 1, 500, 999])
    samples = (torch.rand(5, *shape) * 2 - 1).clamp(-0.9, 0.9)
    samples[0].view(-1)[:2] = torch.tensor([-1.0, 1.0])
    noise = torch.randn(5, *shape)
    objective = DDPM(predicts)
    prediction = objective.target(samples, noise, times) + 0.1 * torch.randn(5, *shape)
    variance = torch.rand(5, *shape) * 2 - 1
    losses = objective.losses(torch.cat([prediction, variance], 1), samples, noise, times)
    expected = [
        float(
            one_loss(*(x[i].double() for x in (prediction, variance, samples, noise)), t, predicts)
        )
        for i, t in enumerate(times.tolist())
    ]
    assert losses.tolist() == pytest.approx(expected, rel=2e-3)


def test_a_perfect_prediction_with_the_least_variance_has_no_loss():
    times = torch.tensor([1, 20, 999])
    samples, noise = torch.randn(2, 3, 2, 4, 4)
    for predicts in PREDICTIONS:
        objective = DDPM(predicts)
        target = objective.target(samples, noise, times)
        prediction = torch.cat([target, -torch.ones_like(target)], 1)
        assert objective.losses(prediction, samples, noise, times).abs().max() < 1e-5
        # The other bound of the variance, in closed form: only the variances differ.
        tables = schedule(times.device)
        ratio = (tables.log_posterior_variances - tables.log_betas)[times].double()
        closed = 0.5 * (ratio.exp() - 1 - ratio) / math.log(2)
        prediction = torch.cat([target, torch.ones_like(target)], 1)
        losses = objective.losses(prediction, samples, noise, times)
        torch.testing.assert_close(losses.double(), closed, rtol=1e-3, atol=1e-6)


def test_the_bound_trains_the_variance_only():
    times, samples = torch.tensor([0, 3, 700]), torch.randn(3, 2, 4, 4).clamp(-1, 1)
    noise, target = torch.randn_like(samples), torch.randn_like(samples)
    prediction = torch.cat([target, torch.zeros_like(target)], 1).requires_grad_()
    DDPM().losses(prediction, samples, noise, times).sum().backward()
    of_mean, of_variance = prediction.grad.chunk(2, dim=1)
    torch.testing.assert_close(of_mean, 2 * (target - noise) / noise[0].numel())
    assert of_variance.isfinite().all() and of_variance.flatten(1).abs().sum(1).min() > 0


def test_the_bins_of_a_pixel_have_all_the_probability():
    pixels = torch.linspace(-1, 1, 256)
    for mean, log_variance in ((0.1, -8.0), (-0.99, -2.0), (0.0, 3.0)):
        logs = discretised_log_likelihood(pixels, torch.tensor(mean), torch.tensor(log_variance))
        assert float(logs.double().exp().sum()) == pytest.approx(1, abs=1e-4)


def test_the_divergence_is_that_of_torch():
    mean, log_variance, other, other_log = torch.randn(4, 50)
    expected = kl_divergence(
        Normal(mean, (log_variance / 2).exp()), Normal(other, (other_log / 2).exp())
    )
    found = gaussian_divergence(mean, log_variance, other, other_log)
    # Terms up to 26 that cancel, each of a float32 exponential or two.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
    assert not gaussian_divergence(mean, log_variance, mean, log_variance).any()


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_the_schedule_is_the_one_of_diffusers(predicts):
    scheduler = DDPMScheduler(
        beta_schedule="linear", prediction_type=predicts, variance_type="learned_range"
    )
    times = torch.tensor([0, 1, 400, 999])
    samples, noise = torch.randn(2, 4, 3, 4, 4)
    objective = DDPM(predicts)
    noisy = objective.noisy(samples, noise, times)
    # Theirs multiplies up to 1000 numbers in float32, so that it is off by up to 1000 * 6e-8.
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    close(noisy, scheduler.add_noise(samples, noise, times))
    velocity = scheduler.get_velocity(samples, noise, times)
    target = noise if predicts == "epsilon" else velocity
    close(objective.target(samples, noise, times), target)
    # A perfect prediction is taken back to the sample.
    last = objective.scheduler()
    last.set_timesteps(1000)
    first = objective.target(samples, noise, torch.full((4,), 500))
    start = objective.noisy(samples, noise, torch.full((4,), 500))
    step = last.step(first, torch.tensor(500), start)
    close(step.pred_original_sample, samples)


@pytest.mark.parametrize("objective", [DDPM, FlowMatching], ids=["ddpm", "flow"])
def test_min_snr_weighs_the_error_of_the_sample(objective):
    samples, noise = torch.randn(2, 6, 2, 3, 3).double()
    for predicts in PREDICTIONS if objective is DDPM else [None]:
        options = {"prediction": predicts, "learned_variance": False} if predicts else {}
        plain, weighed = objective(**options), objective(**options, min_snr_gamma=5.0)
        if predicts:
            times = torch.tensor([0, 5, 100, 300, 700, 999])
            alphas, sigmas = (
                t[times].double()
                for t in (schedule(times.device).alphas, schedule(times.device).sigmas)
            )
        else:
            times = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
            alphas, sigmas = (1 - times).double(), times.double()
        error = 0.1 * torch.ones_like(samples)
        if predicts == "epsilon":
            target, of_sample = noise, (sigmas / alphas)
        elif predicts == "v_prediction":
            target, of_sample = plain.target(samples, noise, times), sigmas
        else:
            target, of_sample = noise - samples, sigmas
        snr = (alphas / sigmas).square()
        expected = snr.clamp(max=5) * (0.1 * of_sample).square()
        losses = weighed.losses(target + error, samples, noise, times)
        torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-9)
        unweighed = plain.losses(target + error, samples, noise, times)
        torch.testing.assert_close(
            unweighed.double(), torch.full((6,), 0.01).double(), rtol=1e-4, atol=0
        )


def test_timesteps_are_uniform_and_channels_double_for_a_variance():
    times = DDPM().draw_times(20_000, torch.Generator().manual_seed(0))
    assert times.min() == 0 and times.max() == 999 and times.dtype == torch.int64
    assert abs(times.double().mean() - 499.5) < 6
    assert DDPM().out_channels(4) == 8 and DDPM(learned_variance=False).out_channels(4) == 4


def test_settings_choose_the_objective_and_are_checked():
    config = ObjectiveConfig(name="ddpm", prediction="v_prediction", min_snr_gamma=5)
    assert build_objective(config) == DDPM("v_prediction", True, 5)
    assert build_objective(ObjectiveConfig(shift=3)) == FlowMatching(shift=3)
    for wrong in ("objective.name=edm", "objective.min_snr_gamma=0", "objective.shift=-1"):
        with pytest.raises(ConfigError, match="objective"):
            load_config(None, [wrong], TrainConfig)
