"""Forward and backward of the infinite network, written out: no tape but the one kept here.

Layers are counted as in the paper's code: 1 is the input layer, 2..L hidden, L+1 the readout.
Letters: b batch, d data, r rank, o outputs of a layer, m rows.
"""

from pilimit_orig.inf import relu


def forward(net, X, record=True):
    """Outputs [b dout] for inputs X [b d], and what `backward` needs to go back (None without
    record)."""
    if X.dim() != 2 or X.shape[1] != net.d:
        raise ValueError(
            f"input of shape {tuple(X.shape)}: this network takes [batch, {net.d}]; flatten images "
            "first"
        )
    X = X.to(net.dtype)
    g = X @ net.As[1].to(net.dtype)
    if net.biases.get(1) is not None:
        g = g + net.alpha_of_bias(1) * net.biases[1]
    g = net.first_layer_alpha * g
    tape = {"X": X, "ghat": {}, "s": {}, "q": {}}
    for l in range(2, net.L + 2):
        ghat, s = relu.unit(g)
        q = ghat @ net.Bs[l].to(net.dtype).T  # [b m]
        weights = net.Amult[l].to(net.dtype)[:, None] * net.As[l].to(net.dtype)  # [m o]
        g = scale(net, s) * (relu.k(q) @ weights)
        if net.biases.get(l) is not None:
            g = g + net.alpha_of_bias(l) * net.biases[l]
        if record:
            tape["ghat"][l], tape["s"][l], tape["q"][l] = ghat, s, q
    tape["embedding"] = ghat
    return net.last_layer_alpha * g, (tape if record else None)


def scale(net, s):
    """The factor that k is multiplied by: the length of the argument, or 1 under layer norm; 0
    where the argument is zero."""
    return (s > 0).to(s.dtype) if net.layernorm else s


def layer_backward(net, tape, l, G):
    """∂loss/∂(input of layer l) [b r] from G = ∂loss/∂(output of layer l) [b o]."""
    ghat, s, q = tape["ghat"][l], tape["s"][l], tape["q"][l]
    # The network is φ(0) = 0 where its argument is zero, and passes no gradient there.
    dgamma = (s > 0) * (G @ net.As[l].to(net.dtype).T) * net.Amult[l].to(net.dtype)
    along_rows = (dgamma * relu.dk(q)) @ net.Bs[l].to(net.dtype)
    if not net.layernorm:
        return along_rows + (dgamma * relu.radial(q)).sum(1, keepdim=True) * ghat
    tangent = along_rows - (along_rows * ghat).sum(1, keepdim=True) * ghat
    return tangent / s.masked_fill(s == 0, float("inf"))


def body_backward(net, tape, G, grads):
    """Everything below the readout: adds to grads the gradients that follow from G = ∂loss/∂g_L [b
    r]."""
    for l in range(net.L, 1, -1):
        grads.add_rows(l, G * scale(net, tape["s"][l]), tape["ghat"][l])
        if net.biases.get(l) is not None:
            grads.add_bias(l, net.alpha_of_bias(l) * G.sum(0))
        G = layer_backward(net, tape, l, G)
    grads.add_first(net.first_layer_alpha * (tape["X"].T @ G))
    if net.biases.get(1) is not None:
        grads.add_bias(1, net.first_layer_alpha * net.alpha_of_bias(1) * G.sum(0))


def readout_rows(net, tape, delta, grads):
    """The readout's own gradient: rows (delta·α·s, ĝ) and the bias."""
    last = net.L + 1
    own = delta if net.last_layer_grad_no_alpha else net.last_layer_alpha * delta
    grads.add_rows(last, own * scale(net, tape["s"][last]), tape["ghat"][last])
    if net.biases.get(last) is not None:
        grads.add_bias(last, net.alpha_of_bias(last) * own.sum(0))


def backward(net, tape, delta, grads):
    """Adds to grads all gradients of a loss whose derivative by the outputs is delta [b dout]."""
    readout_rows(net, tape, delta, grads)
    body_backward(
        net, tape, layer_backward(net, tape, net.L + 1, net.last_layer_alpha * delta), grads
    )
