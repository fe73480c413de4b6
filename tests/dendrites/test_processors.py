"""Layers with several tensors: hidden states of dendrites stay apart from the neurons', against
step-by-step computations."""

import copy

import pytest
import torch
from torch import nn

from pilimit_lib.dendrites import (
    DendriteConfig,
    GRUProcessor,
    LSTMProcessorLastHidden,
    MultiOutputProcessor,
    dendritic,
    finalize,
)
from tests.dendrites.helpers import grow_all


def recurrent(kind, **kwargs):
    torch.manual_seed(0)
    net = nn.ModuleDict({"cell": kind(3, 4, **kwargs)})
    net = dendritic(net, DendriteConfig(convert=[kind]))
    state = None
    with torch.no_grad():
        net["cell"](torch.zeros(2, 1, 3) if kind in (nn.GRU, nn.LSTM) else torch.zeros(2, 3), state)
    return grow_all(net, times=2)["cell"]


def oracle(layer, xs, unpack, first, pack):
    """Neurons and each dendrite run their own recurrences; outputs are combined step by step."""
    states = [first() for _ in range(3)]
    outputs = []
    for x in xs:
        out, states[0] = unpack(layer.neuron(x, states[0]))
        acts, y = [], out
        for k, d in enumerate(layer.dendrites):
            z, states[k + 1] = unpack(d.body(x, states[k + 1]))
            for j, a in enumerate(acts):
                z = z + d.v[j] * a
            acts.append(torch.sigmoid(z))
            y = y + d.w * acts[-1]
        outputs.append(y)
    return outputs, states[0]


CASES = {
    "GRU": (nn.GRU, {"batch_first": True}, lambda out: out, lambda: torch.zeros(1, 2, 4)),
    "LSTM": (
        nn.LSTM,
        {"batch_first": True},
        lambda out: out,
        lambda: (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)),
    ),
    "LSTMCell": (
        nn.LSTMCell,
        {},
        lambda out: (out[0], out),
        lambda: (torch.zeros(2, 4), torch.zeros(2, 4)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_step_by_step_the_dendrites_keep_states_of_their_own(case):
    kind, kwargs, unpack, first = CASES[case]
    layer = recurrent(kind, **kwargs)
    xs = [torch.randn(2, 1, 3) if kind is not nn.LSTMCell else torch.randn(2, 3) for _ in range(4)]
    expected, final = oracle(layer, xs, unpack, first, None)
    for start in (first(), None):  # twice: the second sequence must not see the first one's states
        layer.clear_processors()
        state, got, neuron_state = start, [], first()
        for x in xs:
            out = layer(x, state)
            got.append(out[0])
            _, neuron_state = unpack(layer.neuron(x, neuron_state))
            # the training loop passes on what it was given; for LSTMCell the combined h, with the
            # neurons' c
            state = neuron_state if kind is nn.LSTMCell else out[1]
        for e, g in zip(expected, got):
            torch.testing.assert_close(g, e, atol=1e-6, rtol=0)
    torch.testing.assert_close(neuron_state, final, atol=1e-6, rtol=0)


def test_a_whole_sequence_in_one_call_equals_step_by_step():
    layer = recurrent(nn.GRU, batch_first=True)
    x = torch.randn(2, 5, 3)
    whole, last = layer(x)
    layer.clear_processors()
    state, steps = torch.zeros(1, 2, 4), []
    for t in range(5):
        out, state = layer(x[:, t : t + 1], state)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-6, rtol=0)


def test_sequences_begin_one_by_one_and_cancelling_states_are_no_beginning():
    processor = GRUProcessor()
    own = torch.full((1, 3, 2), 7.0)
    processor.post_d((torch.zeros(3, 1, 2), own))
    given = torch.tensor([[[0.0, 0.0], [1.0, -1.0], [0.0, 2.0]]])
    (_, mixed), _ = processor.pre_d(torch.zeros(3, 1, 2), given)
    assert mixed.tolist() == [[[0.0, 0.0], [7.0, 7.0], [7.0, 7.0]]]
    lstm = recurrent(nn.LSTM, batch_first=True).dendrites[0].processor
    lstm.post_d((None, (own, own)))
    (_, (h, c)), _ = lstm.pre_d(None, (torch.zeros(1, 3, 2), given))
    # h may be zero while c is not
    assert h.tolist() == [[[0.0, 0.0], [7.0, 7.0], [7.0, 7.0]]] and torch.equal(h, c)


def test_a_detached_state_cuts_the_dendrites_history_too():
    layer = recurrent(nn.GRU, batch_first=True)
    state = None
    # truncated backpropagation: without the cut the second backward would need a freed graph
    for _ in range(3):
        out, state = layer(torch.randn(2, 2, 3), state)
        out.sum().backward()
        state = state.detach()


def test_another_batch_size_starts_anew():
    layer = recurrent(nn.GRU, batch_first=True)
    layer(torch.randn(2, 2, 3), None)
    out, _ = layer(torch.randn(5, 2, 3), torch.randn(1, 5, 4))
    assert out.shape == (5, 2, 4)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 4)

    def forward(self, x, scale=1.0):
        y = self.lin(x) * scale
        return y, y.sum(), "label"


def test_multi_output_processor_hands_the_rest_on():
    net = dendritic(
        nn.ModuleDict({"two": TwoOutputs()}),
        DendriteConfig(
            convert=["TwoOutputs"], processors={"TwoOutputs": MultiOutputProcessor}, dims=[-1, 0]
        ),
    )
    x = torch.randn(2, 3)
    before = net["two"](x, scale=2.0)
    grow_all(net)
    after = net["two"](x, scale=2.0)
    assert (
        after[2] == "label"
        and torch.equal(after[1], before[1])
        and not torch.equal(after[0], before[0])
    )
    d = net["two"].dendrites[0]
    torch.testing.assert_close(after[0], before[0] + d.w * torch.sigmoid(d.body.lin(x) * 2.0))


def test_without_a_processor_the_error_says_which_to_give():
    net = dendritic(nn.ModuleDict({"two": TwoOutputs()}), DendriteConfig(convert=["TwoOutputs"]))
    with pytest.raises(
        TypeError,
        match="layer 'two' \\(TwoOutputs\\) returned a "
        "tuple.*append_module_names_with_processing\\(\\['TwoOutputs'\\]\\)",
    ):
        net["two"](torch.zeros(1, 3))
    single = dendritic(
        nn.Sequential(nn.Linear(2, 2)), DendriteConfig(processors={nn.Linear: MultiOutputProcessor})
    )
    with pytest.raises(TypeError, match="needs no processor"):
        single(torch.zeros(1, 2))


def test_every_dendrite_sees_the_layers_inputs_not_another_dendrites():
    seen = []

    class Spy(GRUProcessor):
        def pre_d(self, *args, **kwargs):
            seen.append(args[0])
            return (args[0] * 2, *args[1:]), kwargs

    net = nn.ModuleDict({"gru": nn.GRU(3, 4)})
    net = dendritic(net, DendriteConfig(convert=[nn.GRU], processors={"GRU": Spy}))
    x = torch.randn(5, 2, 3)
    net["gru"](x)
    grow_all(net, times=3)
    net["gru"](x)
    assert len(seen) == 3 and all(s is x for s in seen)


def test_copies_saves_and_finalize_forget_states():
    layer = recurrent(nn.GRU, batch_first=True)
    layer(torch.randn(2, 3, 3))
    assert layer.dendrites[0].processor.own is not None
    twin = copy.deepcopy(layer)  # a graph tensor among the states would make this fail
    assert twin.dendrites[0].processor.own is None and layer.dendrites[0].processor.own is None
    x = torch.randn(2, 3, 3)
    torch.testing.assert_close(finalize(twin)(x)[0], layer(x)[0])


def test_last_hidden_processor_combines_the_hidden_state():
    net = nn.ModuleDict({"lstm": nn.LSTM(3, 4, batch_first=True)})
    net = dendritic(
        net, DendriteConfig(convert=[nn.LSTM], processors={nn.LSTM: LSTMProcessorLastHidden})
    )
    x = torch.randn(2, 5, 3)
    net["lstm"](x)
    grow_all(net)
    out, (h, c) = net["lstm"](x)
    plain, (h0, c0) = net["lstm"].neuron(x)
    d = net["lstm"].dendrites[0]
    assert torch.equal(out, plain) and torch.equal(c, c0)
    torch.testing.assert_close(h, h0 + d.w * torch.sigmoid(d.body(x)[1][0]))
