"""State dicts of other sizes and forms: what is too much goes, what is missing is made."""

import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import DendriteConfig, dendritic, dendritic_layers, finalize
from tests.dendrites.helpers import ConvNet, grow_all, mlp


def counts(net):
    return [len(layer.dendrites) for _, layer in dendritic_layers(net)]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("before, after", [(3, 1), (1, 0), (2, 2), (0, 2)])
def test_an_earlier_checkpoint_takes_later_dendrites_away(before, after, strict):
    earlier = grow_all(dendritic(mlp()), times=after)
    later = grow_all(dendritic(mlp(1)), seed=1, times=before)
    x = torch.randn(4, 5)
    result = later.load_state_dict(earlier.state_dict(), strict=strict)
    assert not result.missing_keys and not result.unexpected_keys
    assert counts(later) == [after, after] and torch.equal(later(x), earlier(x))


def test_a_candidate_goes_with_a_checkpoint_that_has_none_and_comes_with_one_that_has():
    config = DendriteConfig(mode="correlation")
    one, other = (dendritic(mlp(seed), config) for seed in (0, 1))
    for net, candidate in ((one, True), (other, False)):
        for _, layer in dendritic_layers(net):
            layer.grow(torch.Generator().manual_seed(0), candidate)
    mature, learning = other.state_dict(), one.state_dict()
    other.load_state_dict(learning)
    one.load_state_dict(mature)
    assert other[0].dendrites[0].candidate and not one[0].dendrites[0].candidate


def test_a_part_of_a_state_leaves_other_layers_alone():
    net = grow_all(dendritic(mlp()), times=2)
    part = {k: v for k, v in dendritic(mlp(1)).state_dict().items() if k.startswith("0.")}
    net.load_state_dict(part, strict=False)
    assert counts(net) == [0, 2]


class Holder(nn.Module):
    """A module whose own child is called as the dendritic layer's."""

    def __init__(self):
        super().__init__()
        self.neuron = nn.Linear(5, 3)

    def forward(self, x):
        return self.neuron(x)


def test_a_pretrained_plain_state_dict_loads_after_the_conversion():
    x = torch.randn(2, 1, 5, 5)
    pretrained = ConvNet().eval()
    net = dendritic(ConvNet(), DendriteConfig(convert=["Sequential", nn.Linear])).eval()
    net(x)
    grow_all(net)
    state = {k: v * 2 if v.is_floating_point() else v for k, v in pretrained.state_dict().items()}
    pretrained.load_state_dict(state)
    net.load_state_dict(state)
    assert counts(net) == [0, 0, 0] and torch.equal(net(x), pretrained(x))
    holder, plain = dendritic(Holder(), DendriteConfig(convert=["Holder"], dims=[-1, 0])), Holder()
    holder.load_state_dict(plain.state_dict())
    assert torch.equal(holder(x[0, 0]), plain(x[0, 0]))
    again = dendritic(Holder(), DendriteConfig(convert=["Holder"], dims=[-1, 0]))
    again.load_state_dict(holder.state_dict())
    assert torch.equal(again(x[0, 0]), plain(x[0, 0]))
    with pytest.raises(RuntimeError, match="fc.neuron.weight"):
        del state["fc.weight"]
        net.load_state_dict(state)


@pytest.mark.parametrize("times", [0, 1, 3])
def test_an_exported_network_loads_into_a_converted_one(times):
    x = torch.randn(2, 1, 5, 5)
    net = grow_all(dendritic(ConvNet()), times=times).eval()
    expected = net(x)
    fresh = dendritic(ConvNet())
    fresh.load_state_dict(finalize(net).state_dict())
    assert counts(fresh) == [times] * 3
    torch.testing.assert_close(fresh.eval()(x), expected, atol=0, rtol=0)
