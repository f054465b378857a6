"""Float32 weights under arithmetic in fewer bits, and the scale of a loss in float16."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ztsnr.training.precision import LossScale, MixedPrecision


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.trained, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.register_buffer("table", torch.ones(8))
        self.register_buffer("numbers", torch.arange(8))
        self.again = False

    def forward(self, x):
        def inside(x):
            return self.norm(self.trained(self.frozen(x))) * self.table

        return checkpoint(inside, x, use_reentrant=False) if self.again else inside(x)


TRAINED = ["trained.weight", "trained.bias", "norm.weight", "norm.bias"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_those_of_the_cast_network(net, x, dtype, again):
    """Of a plain copy in the dtype, brought to float32; also where parts are computed again."""
    plain = Net().to(dtype)
    plain.load_state_dict(net.state_dict())
    net.again = again
    precise = MixedPrecision(net, dtype, TRAINED)
    output, expected = precise(x.to(dtype)), plain(x.to(dtype))
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for name, master in precise.masters.items():
        assert master.dtype == master.grad.dtype == torch.float32
        assert torch.equal(master.grad, plain.get_parameter(name).grad.float())
    assert net.frozen.weight.dtype == net.table.dtype == dtype
    assert net.numbers.dtype == torch.int64


def test_small_updates_add_up(net, x):
    """Of 2^-12 each, which bfloat16 weights of about 1 would lose."""
    precise = MixedPrecision(net, torch.bfloat16, TRAINED)
    weight = precise.masters["norm.weight"]
    with torch.no_grad():
        for _ in range(64):
            weight.add_(2.0**-12)
        assert (weight == 1 + 2.0**-6).all()
    precise(x.bfloat16())
    assert (net.norm.weight == 1.015625).all()


def test_float32_is_the_network_itself(net, x):
    expected = net(x)
    precise = MixedPrecision(net, torch.float32, TRAINED)
    assert torch.equal(precise(x), expected)
    assert net.trained.weight is precise.masters["trained.weight"]


def test_cast_follows_the_weights(net):
    precise = MixedPrecision(net, torch.bfloat16, TRAINED)
    with torch.no_grad():
        precise.masters["trained.bias"].fill_(3)
        precise.cast()
    assert (net.trained.bias == 3).all()
    assert not net.trained.bias.requires_grad


def test_no_such_parameter(net):
    with pytest.raises(ValueError, match=r"no parameter trained\.scale"):
        MixedPrecision(net, torch.bfloat16, [*TRAINED, "trained.scale"])


def test_loss_scale_is_that_of_torch():
    """The same scale after any steps, good and bad, as torch's GradScaler has."""
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    ours = LossScale(torch.device("cpu"), interval=3)
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for good in [True, True, True, False, True, True, False, True, True, True, True, True, True, False, False]:
        theirs.scale(weight.sum()).backward()
        if not good:
            weight.grad[2] = torch.inf
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(0.0 if good else 1.0))
        assert ours.scale == theirs.get_scale()


def test_scaled_gradients_come_back():
    scale = LossScale(torch.device("cpu"))
    weight, other = nn.Parameter(torch.tensor([0.5, 3.0])), nn.Parameter(torch.ones(2))
    (weight.square().sum() * scale.scale).backward()
    assert weight.grad[0] == 2**16
    scale.unscale([weight, other])
    assert weight.grad.tolist() == [1.0, 6.0]
