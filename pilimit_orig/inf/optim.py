"""InfSGD: one object that clips and steps a network, and the schedules of the paper's commands as
plain factors."""

import math


class InfSGD:
    """SGD for InfPiMLP and FinPiMLP with the paper's multipliers; `lr` and `gclip` may be changed
    between steps."""

    def __init__(
        self,
        net,
        lr,
        wd=0.0,
        momentum=0.0,
        bias_lr_mult=1.0,
        first_layer_lr_mult=1.0,
        last_layer_lr_mult=1.0,
        apply_lr_mult_to_wd=True,
        gclip=0.0,
        gclip_per_param=False,
        project=False,
    ):
        self.net, self.lr, self.gclip, self.gclip_per_param, self.project = (
            net,
            lr,
            gclip,
            gclip_per_param,
            project,
        )
        self.rules = {
            "wd": wd,
            "momentum": momentum,
            "bias_lr_mult": bias_lr_mult,
            "first_layer_lr_mult": first_layer_lr_mult,
            "last_layer_lr_mult": last_layer_lr_mult,
            "apply_lr_mult_to_wd": apply_lr_mult_to_wd,
        }

    def zero_grad(self):
        self.net.zero_grad()

    def step(self):
        """Projects (a finite network's gradients, if asked to), clips, steps."""
        if self.project:
            self.net.project()
        if self.gclip > 0:
            self.net.gclip(self.gclip, per_param=self.gclip_per_param)
        self.net.step(self.lr, **self.rules)


def cosine(done, total, low=0.0):
    """From 1 to `low` over `total` steps."""
    return low + (1 - low) * (1 + math.cos(math.pi * min(done, total) / total)) / 2


def linear(done, total):
    """From 1 to 0 over `total` steps."""
    return max(0.0, 1 - done / total)


def multistep(epoch, milestones, ratio):
    """ratio to the power of the milestones reached."""
    return ratio ** sum(epoch >= milestone for milestone in milestones)
