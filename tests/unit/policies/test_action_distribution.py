from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from verl_vla.core.errors import ConfigError
from verl_vla.policies import action_distribution

EXTREME = st.one_of(
    st.floats(-30, 30, width=32),
    st.sampled_from([-math.inf, -3e38, -1e30, -1e4, 0.0, 1e4, 1e30, 3e38]),
)
"""-inf is how others mask a bin; the difference of +-3e38 overflows float32."""
TEMPERATURE = st.sampled_from([0.1, 1.0, 1.6, 5.0])
NOISE = st.one_of(
    st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53, 5e-324, 0.5])
)


def rows(num_bins: int) -> st.SearchStrategy[list[float]]:
    values = st.lists(EXTREME, min_size=num_bins, max_size=num_bins)
    return values.filter(lambda row: max(row) > -math.inf)


def as_logits(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1)


@given(values=rows(8), noise=NOISE, temperature=TEMPERATURE)
def test_a_sample_is_a_bin_that_has_probability(
    values: list[float], noise: float, temperature: float
) -> None:
    logits = as_logits(values)
    action_tokens = action_distribution.sample(
        logits, torch.tensor([[noise]], dtype=torch.float64), temperature
    )
    assert 0 <= action_tokens.item() < 8
    probability = (logits.double() / temperature).softmax(-1)
    assert probability[0, 0, action_tokens.item()] > 0
    log_probs = action_distribution.log_prob(logits, action_tokens, temperature)
    exact = (logits.double() / temperature).log_softmax(-1)[0, 0, action_tokens.item()]
    assert log_probs.item() == pytest.approx(exact.item(), abs=1e-4, rel=1e-5)


@given(values=rows(8), chosen=st.integers(0, 7), temperature=TEMPERATURE)
def test_values_and_gradients_stay_finite(
    values: list[float], chosen: int, temperature: float
) -> None:
    logits = as_logits(values).requires_grad_()
    log_probs = action_distribution.log_prob(logits, torch.tensor([[chosen]]), temperature)
    entropy = action_distribution.entropy(logits, temperature)
    (log_probs.sum() + entropy.sum()).backward()
    assert torch.isfinite(log_probs).all() and torch.isfinite(entropy).all()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert (log_probs <= 0).all()
    assert -1e-6 <= entropy.item() <= math.log(8) + 1e-5


@given(values=rows(5), temperature=TEMPERATURE)
def test_probabilities_sum_to_one(values: list[float], temperature: float) -> None:
    logits = as_logits(values).expand(1, 5, 5)
    log_probs = action_distribution.log_prob(logits, torch.arange(5).view(1, 5), temperature)
    assert torch.isclose(log_probs.exp().sum(), torch.tensor(1.0), atol=1e-5)


def test_log_prob_is_the_log_of_a_softmax_at_the_temperature() -> None:
    logits = torch.randn(3, 4, 256, generator=torch.Generator().manual_seed(0))
    action_tokens = torch.randint(0, 256, (3, 4), generator=torch.Generator().manual_seed(1))
    exact = (logits.double() / 1.6).softmax(-1)
    log_probs = action_distribution.log_prob(logits, action_tokens, 1.6)
    assert log_probs.dtype == torch.float32
    assert torch.allclose(
        log_probs.double(), exact.gather(-1, action_tokens[..., None])[..., 0].log(), atol=1e-5
    )
    entropy = action_distribution.entropy(logits, 1.6)
    assert torch.allclose(entropy.double(), -(exact * exact.log()).sum(-1), atol=1e-5)


def test_masked_tokens_leave_no_nan_in_the_gradient() -> None:
    """0 x -inf: a bin of logit -inf, its entropy weighed by 0, a token that did not run."""
    logits = torch.tensor([[[-math.inf, 1.0, 2.0], [-math.inf, 0.0, -math.inf]]])
    logits.requires_grad_()
    mask = torch.tensor([[1.0, 0.0]])
    log_probs = action_distribution.log_prob(logits, torch.tensor([[2, 0]]), 1.6)
    entropy = action_distribution.entropy(logits, 1.6)
    ((log_probs + entropy) * mask).sum().backward()
    exact = torch.tensor([1.0, 2.0]).div(1.6).log_softmax(-1)
    assert log_probs[0, 0].item() == pytest.approx(exact[1].item(), abs=1e-6)
    assert entropy[0, 0].item() == pytest.approx(-(exact.exp() * exact).sum().item(), abs=1e-6)
    assert entropy[0, 1].item() == 0
    assert torch.isfinite(log_probs).all()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1].abs().max() == 0


def test_entropy_of_no_knowledge_and_of_certainty() -> None:
    assert action_distribution.entropy(torch.zeros(1, 1, 256), 1.0).item() == pytest.approx(
        math.log(256), abs=1e-5
    )
    certain = torch.tensor([[[1e4, 0.0, 0.0]]])
    assert action_distribution.entropy(certain, 1.0).item() == 0


@settings(max_examples=20)
@given(values=st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6), temperature=TEMPERATURE)
def test_frequencies_are_the_probabilities(values: list[float], temperature: float) -> None:
    logits = as_logits(values)
    num_draws = 20_000
    noise = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    action_tokens = action_distribution.sample(
        logits.expand(num_draws, 1, 6), noise.unsqueeze(-1), temperature
    )
    frequency = torch.bincount(action_tokens.flatten(), minlength=6) / num_draws
    probability = (logits.double() / temperature).softmax(-1).flatten()
    # Evenly spaced noise visits every bin in proportion, up to one draw at either end.
    assert torch.allclose(frequency.double(), probability, atol=2 / num_draws)


def test_a_row_is_sampled_alike_alone_and_in_a_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 56, 256, generator=generator) * 4
    noise = torch.rand(5, 56, dtype=torch.float64, generator=generator)
    together = action_distribution.sample(logits, noise, 1.6)
    alone = [action_distribution.sample(logits[i : i + 1], noise[i : i + 1], 1.6) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(
        action_distribution.log_prob(logits, together, 1.6)[2:3],
        action_distribution.log_prob(logits[2:3], together[2:3], 1.6),
    )


def test_noise_decides_and_moves_upwards_through_the_bins() -> None:
    logits = torch.zeros(1, 4, 4)
    noise = torch.tensor([[0.0, 0.3, 0.6, 0.99]], dtype=torch.float64)
    assert action_distribution.sample(logits, noise, 1.0).tolist() == [[0, 1, 2, 3]]


def test_a_bin_too_unlikely_for_float32_can_still_be_drawn() -> None:
    logits = torch.tensor([[[0.0, math.log(1e-9)]]])
    for noise, expected in ((1 - 2e-9, 0), (1 - 5e-10, 1)):
        drawn = action_distribution.sample(
            logits, torch.tensor([[noise]], dtype=torch.float64), 1.0
        )
        assert drawn.item() == expected


def test_temperature_zero_takes_the_likeliest_and_ignores_noise() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0]]])
    for noise in (0.0, 0.999):
        chosen = action_distribution.sample(
            logits, torch.tensor([[noise]], dtype=torch.float64), 0.0
        )
        assert chosen.item() == 1


def test_sampling_gives_no_gradient() -> None:
    logits = torch.zeros(1, 1, 4, requires_grad=True)
    noise = torch.zeros(1, 1, dtype=torch.float64)
    assert not action_distribution.sample(logits, noise, 1.0).requires_grad


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_probabilities_need_a_temperature(temperature: float) -> None:
    logits, action_tokens = torch.zeros(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="temperature"):
        action_distribution.log_prob(logits, action_tokens, temperature)
    with pytest.raises(ConfigError, match="temperature"):
        action_distribution.entropy(logits, temperature)
