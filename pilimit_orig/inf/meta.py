"""MAML for the readout: inner steps that append rows to it, and the hand-written backward through
them.

Inner step t on the support set (i = 1..N):  rows  A = a·δ_t(i)·σ_i,  B = ĝ_i,  Amult = −η,  bias −=
η_b·β·a·Σ_i δ_t(i) with δ_t = ∂loss/∂out, σ = |g| (1 under layer norm), a = last_layer_alpha, β the
readout's bias multiplier. Both A and B of
these rows depend on the layers below, and A on the rows of earlier steps through δ_t: nothing else
is of second order. Neither weight decay nor momentum acts in the inner loop. Where the published
code differs, the README says how.
"""

from dataclasses import dataclass

from pilimit_orig.inf import passes, relu, update
from pilimit_orig.losses import LOSSES


@dataclass(frozen=True)
class InnerStep:
    """What one inner step saw: its tape, outputs and their derivative, and the readout's number of
    rows before it."""

    tape: dict
    out: object
    delta: object
    rows: int


@dataclass(frozen=True)
class Adaptation:
    """An inner loop that was run: `net` holds the adapted readout until net.restore()."""

    steps: list
    labels: object
    loss: str
    rate: float
    bias_rate: float


def adapt_readout(
    net, X, labels, lr, steps=1, loss="xent", last_layer_lr_mult=1.0, bias_lr_mult=1.0
):
    """Marks the net (net.checkpoint()) and takes inner steps with its readout on a support set;
    undo them with net.restore()."""
    net.checkpoint()
    last, done = net.L + 1, []
    for _ in range(steps):
        out, tape = passes.forward(net, X.reshape(X.shape[0], -1))
        delta = LOSSES[loss][0](out, labels)[1]
        done.append(InnerStep(tape, out, delta, net.Amult[last].shape[0]))
        grads = net.newgradbuffer()
        passes.readout_rows(net, tape, delta, grads)
        update.step(net, grads, lr, 0.0, 0.0, 0.0, bias_lr_mult, 1.0, last_layer_lr_mult, True)
    return Adaptation(done, labels, loss, lr * last_layer_lr_mult, lr * bias_lr_mult)


def meta_backward(
    net, adaptation, X, labels, buffer, second_order=True, readout_fixed=False, weight=1.0
):
    """Adds to buffer the gradient of the query loss by the state before adaptation; returns the
    query loss and outputs.

    first order: the appended rows are taken as constants. readout_fixed: the initial readout is not
    learned, its gradient is left out. weight multiplies the gradient, 1/tasks for the mean over a
    meta-batch. Call net.restore() afterwards, and net.step(lr, buffer=buffer) once per meta-batch.
    """
    last, a = net.L + 1, 1.0 if net.last_layer_grad_no_alpha else net.last_layer_alpha
    value_of, curvature = LOSSES[adaptation.loss]
    out, tape = passes.forward(net, X.reshape(X.shape[0], -1))
    value, delta = value_of(out, labels)
    delta = weight * delta
    if not readout_fixed:
        passes.readout_rows(net, tape, delta, buffer)
    G = net.last_layer_alpha * delta
    A_bar, B_bar, s_bar, ghat_bar = _readout_adjoint(net, tape, G, net.Amult[last].shape[0])
    passes.body_backward(net, tape, _to_preactivation(net, tape, s_bar, ghat_bar), buffer)
    if not second_order:
        return value, out
    beta = net.alpha_of_bias(last) if last in net.biases else 0.0
    bias_bar = beta * G.sum(0)
    s_sum, ghat_sum = 0.0, 0.0
    for step in reversed(adaptation.steps):
        new = slice(step.rows, step.rows + step.out.shape[0] if adaptation.rate else step.rows)
        sigma, ghat = passes.scale(net, step.tape["s"][last]), step.tape["ghat"][last]
        delta_bar = -(adaptation.bias_rate * beta * a) * bias_bar.expand_as(step.delta)
        if adaptation.rate:
            s_sum = s_sum + (a * step.delta * A_bar[new]).sum(1, keepdim=True)
            ghat_sum = ghat_sum + B_bar[new]
            delta_bar = delta_bar + a * sigma * A_bar[new]
        out_bar = curvature(step.out, adaptation.labels, delta_bar)
        if not readout_fixed:
            buffer.add_rows(last, a * out_bar * sigma, ghat)
            if beta:
                buffer.add_bias(last, beta * a * out_bar.sum(0))
        G = net.last_layer_alpha * out_bar
        A_step, B_step, s_step, ghat_step = _readout_adjoint(net, step.tape, G, step.rows)
        A_bar, B_bar = A_bar[: step.rows] + A_step, B_bar[: step.rows] + B_step
        s_sum, ghat_sum, bias_bar = s_sum + s_step, ghat_sum + ghat_step, bias_bar + beta * G.sum(0)
    support = adaptation.steps[0].tape
    passes.body_backward(net, support, _to_preactivation(net, support, s_sum, ghat_sum), buffer)
    return value, out


def _readout_adjoint(net, tape, G, rows):
    """Adjoints of the readout's first `rows` rows (A [m o], B [m r]) and of its argument (length [b
    1], direction [b r])."""
    last = net.L + 1
    A, B = net.As[last][:rows].to(net.dtype), net.Bs[last][:rows].to(net.dtype)
    Amult = net.Amult[last][:rows].to(net.dtype)
    ghat, sigma = tape["ghat"][last], passes.scale(net, tape["s"][last])
    q = ghat @ B.T
    weights_bar = (tape["s"][last] > 0) * (G @ A.T) * Amult  # [b m]
    q_bar = sigma * weights_bar * relu.dk(q)
    A_bar = Amult[:, None] * ((sigma * relu.k(q)).T @ G)
    return A_bar, q_bar.T @ ghat, (relu.k(q) * weights_bar).sum(1, keepdim=True), q_bar @ B


def _to_preactivation(net, tape, s_bar, ghat_bar):
    """∂loss/∂g [b r] from the adjoints of its length and direction."""
    last = net.L + 1
    ghat, s = tape["ghat"][last], tape["s"][last]
    tangent = (ghat_bar - (ghat_bar * ghat).sum(1, keepdim=True) * ghat) / s.masked_fill(
        s == 0, float("inf")
    )
    return tangent if net.layernorm else tangent + s_bar * ghat
