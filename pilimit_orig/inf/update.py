"""One SGD step: the first layer and the biases move, the π-layers append rows."""

import torch


def step(
    net,
    grads,
    lr,
    wd,
    momentum,
    dampening,
    bias_lr_mult,
    first_layer_lr_mult,
    last_layer_lr_mult,
    apply_lr_mult_to_wd,
):
    """p ← p − lr·mult·v with v ← momentum·v + (1 − dampening)(grad + wd·p), for dense arrays and,
    in function space, for rows.

    A row's A and B never change: its multiplier Amult carries the decay and, with momentum, a
    velocity, so that a row keeps receiving −lr·mult·momentum^t after the step that made it. The
    first step has no dampening, as in torch.optim.SGD. Unless apply_lr_mult_to_wd, wd is divided by
    the multiplier, so that every parameter decays by lr·wd; one whose multiplier is zero then only
    decays.
    """

    def settings(mult):
        if mult == 0:
            return {"rate": 0.0, "shrink": 1.0 if apply_lr_mult_to_wd else 1 - lr * wd}
        return {
            "rate": lr * mult,
            "wd": wd if apply_lr_mult_to_wd else wd / mult,
            "momentum": momentum,
            "dampening": dampening,
        }

    if grads.first is not None:
        net.As[1] = _dense(net, ("A", 1), net.As[1], grads.first, **settings(first_layer_lr_mult))
    for l, G in grads.bias.items():
        net.biases[l] = _dense(net, ("bias", l), net.biases[l], G, **settings(bias_lr_mult))
    for l in range(2, net.L + 2):
        if grads.A[l]:
            _rows(net, l, *grads.rows(l), **settings(last_layer_lr_mult if l == net.L + 1 else 1.0))


def _velocity(net, key, p, push_of_new, wd, momentum, dampening):
    """Velocity of the parameters p after this step, and the factor that this step's gradients enter
    it with."""
    gain = 1 - dampening if key in net.velocity else 1.0
    old = momentum * net.velocity[key] if key in net.velocity else 0.0
    return old + gain * (push_of_new + wd * p), gain


def _dense(net, key, p, grad, rate, wd=0.0, momentum=0.0, dampening=0.0, shrink=1.0):
    if rate == 0:
        return p * shrink
    if momentum == 0:
        return p - rate * (grad + wd * p)
    net.velocity[key], _ = _velocity(net, key, p, grad, wd, momentum, dampening)
    return p - rate * net.velocity[key]


def _rows(net, l, A, B, rate, wd=0.0, momentum=0.0, dampening=0.0, shrink=1.0):
    old = net.Amult[l]
    if rate == 0:
        net.Amult[l] = old * shrink
        return
    fresh = old.new_ones(A.shape[0])
    if momentum == 0:
        net.Amult[l] = torch.cat([old * (1 - rate * wd), -rate * fresh])
    else:
        v, gain = _velocity(net, ("A", l), old, 0.0, wd, momentum, dampening)
        net.velocity["A", l] = torch.cat([v, gain * fresh])
        net.Amult[l] = torch.cat([old, torch.zeros_like(fresh)]) - rate * net.velocity["A", l]
    net.As[l] = torch.cat([net.As[l], A.to(net.As[l].dtype)])
    net.Bs[l] = torch.cat([net.Bs[l], B.to(net.Bs[l].dtype)])
