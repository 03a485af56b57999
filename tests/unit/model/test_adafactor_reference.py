"""Our Adafactor beside torch's, and beside transformers', whose rate and mean are T5's."""

import pytest
import torch
from transformers.optimization import Adafactor as T5Adafactor

from lag_megatron.model.adafactor import Adafactor

SHAPES = [(8, 6), (5,), (3, 4, 7)]


def trajectory(make, *, steps, scale=1.0):
    """Parameters after steps on gradients that are the same for all, some of them 0."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    parameters[1].data.zero_()  # as a new bias: its scale is the smallest
    optimizer = make(parameters)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * scale
            parameter.grad[0] = 0
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def t5(lr, **options):
    return lambda parameters: T5Adafactor(
        parameters, lr=lr, scale_parameter=True, relative_step=False, warmup_init=False, **options
    )


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_below_the_cap_it_is_torchs(decay):
    ours = trajectory(lambda p: Adafactor(p, lr=0.1, weight_decay=decay), steps=20)
    theirs = trajectory(
        lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=decay, eps=(1e-15, 1e-3)), steps=20
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_above_the_cap_and_for_tiny_gradients_it_is_t5s(scale):
    ours = trajectory(lambda p: Adafactor(p, lr=0.5), steps=20, scale=scale)
    torch.testing.assert_close(ours, trajectory(t5(0.5), steps=20, scale=scale))
    theirs = trajectory(lambda p: torch.optim.Adafactor(p, lr=0.5), steps=20, scale=scale)
    assert (ours - theirs).abs().max() > 0.1


def test_zero_gradients_change_nothing():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = Adafactor([parameter], lr=0.1)
    parameter.grad = torch.zeros(2, 3)
    optimizer.step()
    assert parameter.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_states_are_torchs():
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    pair = [Adafactor(parameters), torch.optim.Adafactor(parameters)]
    for optimizer in pair:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    found, expected = (
        [
            {key: (value.shape, value.dtype) for key, value in optimizer.state[p].items()}
            for p in parameters
        ]
        for optimizer in pair
    )
    assert found == expected
