"""The chain of blocks that a network consists of: given as a list, held by a module, or read from
its forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn


def blocks_of(network: nn.Module | Sequence[nn.Module], name: str | None = None) -> list[nn.Module]:
    """Blocks whose chain is `network`: its own entries, those of the list that it holds, or, where
    it holds several or parameters beside them, what its forward does one after the other."""
    if isinstance(network, nn.Sequential | nn.ModuleList | list | tuple):
        found = list(network)
    elif isinstance(network, nn.Module):
        found = _held(network, name)
    else:
        raise TypeError(
            "network must be an nn.Sequential, a list of blocks or a module, got "
            f"{type(network).__name__}"
        )
    if not found:
        raise ValueError("the network has no blocks")
    if not all(isinstance(block, nn.Module) for block in found):
        raise ValueError("every block must be an nn.Module")
    return found


def _held(network: nn.Module, name: str | None) -> list[nn.Module]:
    kind = type(network).__name__
    lists = {
        key: child
        for key, child in network.named_children()
        if isinstance(child, nn.Sequential | nn.ModuleList)
    }
    if name is not None and name not in lists:
        raise ValueError(f"{kind} has no list of blocks called {name!r}; it has {sorted(lists)}")
    if name is None and len(lists) != 1:
        problem = f"{kind} holds {len(lists)} lists of blocks, {sorted(lists)}"
        return _followed(network, problem, "say which: blocks='...'")
    key = name or next(iter(lists))
    found = list(lists[key])
    inside = {id(p) for block in found for p in block.parameters()}
    outside = [path for path, p in network.named_parameters() if id(p) not in inside]
    if not outside:
        return found
    problem = f"parameters {outside} of {kind} lie outside of the blocks '{key}'"
    remedy = (
        f"only the chain '{key}' can be wrapped; give what comes before to the signal "
        "(module_input) and what comes after as a last block"
    )
    if name is not None:
        raise ValueError(f"{problem}; {remedy}")
    return _followed(network, problem, remedy)


def _followed(network: nn.Module, problem: str, remedy: str) -> list[nn.Module]:
    try:
        found = follow_forward(network)
    except Exception as error:  # whatever a forward does under tracing
        raise ValueError(
            f"{problem}, and its forward cannot be followed ({error}); {remedy}"
        ) from error
    if len(found) < 2:
        raise ValueError(f"{problem}, and its forward is a single block; {remedy}")
    return found


def follow_forward(network: nn.Module) -> list[nn.Module]:
    """The blocks that the forward of `network` runs one after the other, sharing its parameters.

    Forward is traced down to modules other than nn.Sequential. Where a single tensor is all that
    later operations need, the chain can be cut; so a residual connection stays inside of its block.
    A new block begins at each piece with a weight of two dimensions or more; norms, activations,
    pooling and reshaping belong to the piece before.
    """
    root, graph = _traced(network)
    blocks: list[list[nn.Module]] = []
    weighted = True  # whether the last block has its weight: the next one begins a new block
    for piece in _pieces(root, graph):
        begins = any(p.ndim >= 2 for p in piece.parameters())
        if not blocks or (begins and weighted):
            blocks.append([])
            weighted = False
        blocks[-1].append(piece)
        weighted = weighted or begins
    return [block[0] if len(block) == 1 else nn.Sequential(*block) for block in blocks]


class _Called(nn.Module):
    """The network called with one argument, so that the others take their defaults."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


class _Tracer(fx.Tracer):
    """Goes into the network itself and into plain nn.Sequential, and into nothing else."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self._network = network

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is not self._network and type(m).forward is not nn.Sequential.forward


def _traced(network: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """A module with `network` inside, and the graph of its forward."""
    called, training = _Called(network), network.training
    graphs = []
    try:
        for mode in (True, False):
            # of the network itself alone: its modules ask for their own mode when they run
            network.training = mode
            graphs.append(_Tracer(network).trace(called))
    finally:
        network.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError("outside of its modules it differs between training and evaluation")
    return called, graphs[0]


def _pieces(root: nn.Module, graph: fx.Graph) -> list[nn.Module]:
    nodes = [node for node in graph.nodes if node.op != "output"]
    order = {node: i for i, node in enumerate(graph.nodes)}
    until = {node: max((order[user] for user in node.users), default=-1) for node in nodes}
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    if not isinstance(result, fx.Node):
        raise ValueError(f"it returns a {type(result).__name__}, where a chain returns a tensor")
    pieces, piece = [], []
    entered = nodes[0]  # the input
    for i, node in enumerate(nodes):
        if node.op == "placeholder" or until[node] < 0:
            continue
        piece.append(node)
        needed_later = [before for before in nodes[: i + 1] if until[before] > order[node]]
        if needed_later == [node] and node.op != "get_attr":
            pieces.append(_piece(root, piece, entered))
            piece, entered = [], node
    return pieces


def _piece(root: nn.Module, nodes: list[fx.Node], entered: fx.Node) -> nn.Module:
    """A module that does what `nodes` do with the value of `entered`."""
    node = nodes[-1]
    if len(nodes) == 1 and not node.kwargs:
        if node.op == "call_module" and node.args == (entered,):
            return root.get_submodule(node.target)
        if node.target in (torch.flatten, "flatten") and node.args == (entered, 1):
            return nn.Flatten()
    graph = fx.Graph()
    copies = {entered: graph.placeholder("x")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[nodes[-1]])
    return fx.GraphModule(root, graph, class_name="Piece")
