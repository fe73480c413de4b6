"""Generators: from the context to a target stream of the shape of the input stream."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional.contrast import labels_of
from .base import Generator


class ProjectionContext(Generator):
    """Learns (or, if `fixed`, keeps) a projection of the context into the shape of the input; the
    input passes as it is.

    `module` takes flat context rows [b, prod(input_shape)] and gives [b, prod(output_shape)].
    """

    context_optional = True

    def __init__(
        self,
        module: nn.Module,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        fixed: bool = False,
    ):
        super().__init__()
        _keep(self, input_shape, output_shape, fixed, module=module)

    def forward(self, input):
        h0, t0 = input
        return h0, project(self.module, t0, self.input_shape, self.output_shape), h0, t0


class ProjectionContextInput(Generator):
    """Projects the context and the input, each by its own module, to one shape, where they can be
    compared.

    `module_context` as in ProjectionContext; `module_input` makes rows of `output_shape` from the
    input.
    """

    context_optional = True

    def __init__(
        self,
        module_context: nn.Module,
        module_input: nn.Module,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        fixed: bool = False,
    ):
        super().__init__()
        modules = {"module_context": module_context, "module_input": module_input}
        _keep(self, input_shape, output_shape, fixed, **modules)

    def forward(self, input):
        h0, t0 = input
        t1 = project(self.module_context, t0, self.input_shape, self.output_shape)
        return self.module_input(h0), t1, h0, t0


def _keep(
    generator: Generator,
    input_shape: Sequence[int],
    output_shape: Sequence[int],
    fixed: bool,
    **modules: nn.Module,
) -> None:
    """What both projections hold: their modules under these names, the shapes, and `fixed`."""
    for name, module in modules.items():
        setattr(generator, name, module)
    generator.input_shape, generator.output_shape = tuple(input_shape), tuple(output_shape)
    generator.fixed = fixed
    if fixed:
        generator.requires_grad_(False)


def project(
    module: nn.Module, t: Tensor | None, input_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> Tensor | None:
    """Context rows of `input_shape`, flattened, through `module`, as rows of `output_shape`."""
    if t is None:
        return None
    flat = t.reshape(len(t), -1)
    if flat.shape[1] != math.prod(input_shape):
        raise ValueError(
            f"a context row has {flat.shape[1]} numbers (shape {list(t.shape[1:])}), but "
            "input_shape "
            f"{list(input_shape)} wants {math.prod(input_shape)}; labels become vectors by "
            "LabelNumberToOnehot(num_classes) before"
        )
    dtypes = [p.dtype for p in module.parameters() if p.is_floating_point()]
    out = module(flat.to(dtypes[0]) if dtypes else flat)
    if out.numel() != len(t) * math.prod(output_shape):
        raise ValueError(
            f"the context module made rows of shape {list(out.shape[1:])}, "
            f"which do not fit output_shape {list(output_shape)}"
        )
    return out.view(len(t), *output_shape)


# Digits on a 7 x 7 cell, a margin of one on the right and below, so that neighbours stay apart.
_GLYPHS = (
    (".####.", "#....#", "#....#", "#....#", "#....#", ".####."),
    ("..##..", ".###..", "..##..", "..##..", "..##..", "######"),
    (".####.", "#....#", "....#.", "..##..", ".#....", "######"),
    ("#####.", ".....#", "..###.", ".....#", ".....#", "#####."),
    ("#...#.", "#...#.", "#...#.", "######", "....#.", "....#."),
    ("######", "#.....", "#####.", ".....#", ".....#", "#####."),
    (".####.", "#.....", "#####.", "#....#", "#....#", ".####."),
    ("######", "....#.", "...#..", "..#...", ".#....", ".#...."),
    (".####.", "#....#", ".####.", "#....#", "#....#", ".####."),
    (".####.", "#....#", ".#####", ".....#", ".....#", ".####."),
)
CELL = 7


class FixedDrawContext(Generator):
    """Draws the label as a decimal number into an image like the input: ink +1, paper of a digit
    -1, zero elsewhere.

    Context: class numbers [b] or [b 1] (of any numeric type), drawn with `places` digits, leading
    zeros included, in cells of 7 x 7 from the top left, in every channel; a digit that does not fit
    into the line begins the next one.
    """

    context_optional = True

    def __init__(self, places: int = 1):
        super().__init__()
        if places < 1:
            raise ValueError(f"a number needs at least one digit, got places={places}")
        self.places = places
        ink = torch.tensor([[[x == "#" for x in line] for line in glyph] for glyph in _GLYPHS])
        glyphs = -torch.ones(10, CELL, CELL)
        glyphs[:, : CELL - 1, : CELL - 1][ink] = 1.0
        self.register_buffer("glyphs", glyphs, persistent=False)

    def forward(self, input):
        h0, t0 = input
        return h0, None if t0 is None else self.draw(h0, t0), h0, t0

    def draw(self, h: Tensor, t: Tensor) -> Tensor:
        """Images [len(t) c height width] of the numbers t, of the image size of h [b c height
        width]."""
        if h.ndim != 4:
            raise ValueError(
                "digits are drawn into images [b c height width], the input has shape "
                f"{list(h.shape)}"
            )
        if t.numel() != len(t):
            raise ValueError(
                "digits are drawn from class numbers [b] or [b 1], the context has shape "
                f"{list(t.shape)}; "
                "put LabelVectorToNumber before"
            )
        _, channels, height, width = h.shape
        per_line = width // CELL
        if per_line * (height // CELL) < self.places:
            raise ValueError(
                f"{self.places} digits of {CELL} x {CELL} do not fit into images of {height} x "
                f"{width}"
            )
        numbers = labels_of(t)
        if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= 10**self.places):
            raise ValueError(
                f"{self.places} digits show 0 .. {10**self.places - 1}, got numbers from "
                f"{int(numbers.min())} "
                f"to {int(numbers.max())}; raise places"
            )
        image = h.new_zeros(len(t), channels, height, width)
        for place in range(self.places):
            digit = numbers // 10 ** (self.places - 1 - place) % 10
            y, x = CELL * (place // per_line), CELL * (place % per_line)
            image[:, :, y : y + CELL, x : x + CELL] = self.glyphs[digit].to(h.dtype)[:, None]
        return image
