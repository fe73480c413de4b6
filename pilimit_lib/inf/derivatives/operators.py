"""What the operators of torch.compile and torch.export have in common.

Each pair computes a map of two tensors (an input and V) and its gradients. An operator must return
tensors, so a gradient that is not needed is an empty one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """`gradient`, laid out as an operator must return it; an empty tensor where there is none."""
    return like.new_empty(0) if gradient is None else gradient


def differentiable(forward: Any, backward: Any) -> None:
    """Register the operator `backward` (tensors, ∂out, numbers, which gradients are needed) as the
    derivative of `forward` (two tensors, numbers)."""
    forward.register_autograd(_hand_back(backward), setup_context=_keep)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.numbers = inputs[2:]


def _hand_back(backward):
    def hand_back(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        need = ctx.needs_input_grad[:2]
        found = backward(*ctx.saved_tensors, grad, *ctx.numbers, *need)
        return *(tensor if wanted else None for tensor, wanted in zip(found, need)), *(
            None for _ in ctx.numbers
        )

    return hand_back
