"""Every implementation of the sums over rows against the formulas in float64, and the switch
between them."""

import re
import threading

import pytest
import torch
from torch.nn import functional as F

from pilimit_lib.core import BLOCK_ROWS
from pilimit_lib.inf import InfPiLinearReLU
from pilimit_lib.inf.rows import autograd as functional
from pilimit_lib.inf.rows.sums import chunked as rows_torch
from pilimit_lib.inf.rows.sums import native as rows_native
from pilimit_lib.inf.rows.sums.choice import row_twin

STORAGE = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8]
EPS = {
    torch.float64: 1e-15,
    torch.float32: 2e-7,
    torch.bfloat16: 2e-7,
    torch.float16: 2e-7,
    torch.int8: 2e-7,
}


def filled(m, r, o, row_dtype=torch.float32, decay=1.0, block_rows=None):
    layer = InfPiLinearReLU(r, o, bias_alpha=0, row_dtype=row_dtype)
    if block_rows:
        for name in ("A", "Amult", "B", "origin"):
            layer.row_storage(name).block_rows = block_rows
    layer.set_rows(torch.randn(m, o), torch.randn(m), F.normalize(torch.randn(m, r)))
    layer.Amult.blocks.scale_(decay)
    return layer


def dense(layer, g, weights):
    """Output and gradient by autograd in float64, of the rows as they are stored."""
    A, amult, B = (getattr(layer, name).detach().double() for name in ("A", "Amult", "B"))
    g = g.detach().double().requires_grad_()
    s = g.norm(dim=1, keepdim=True)
    c = ((g / s) @ B.T).clamp(-1 + 1e-16, 1 - 1e-16)
    out = s * ((((1 - c * c).sqrt() + c * torch.acos(-c)) / (2 * torch.pi) * amult) @ A)
    return out.detach(), torch.autograd.grad((out * weights.double()).sum(), g)[0]


def run(layer, g, weights):
    g = (
        g.detach()
        .clone()
        .to(torch.float64 if layer.A.dtype == torch.float64 else torch.float32)
        .requires_grad_()
    )
    out = layer(g)
    out.backward(weights.to(out))
    return out.detach().double(), g.grad.double()


@pytest.mark.parametrize("row_dtype", STORAGE, ids=str)
@pytest.mark.parametrize("twin", ["plain", "chunked", "native"])
def test_twins_agree_with_the_formulas_on_the_rows_that_are_stored(twin, row_dtype):
    """Scales and shifts of eight bits, lazy factors, and rows that are converted all meet in one
    coefficient per row.

    A term costs some roundings of its own. A sum of n terms adds one rounding per partial sum, and
    partial sums of random signs are as large as the result: √n roundings, where their signs are
    random too. Plain sums are one over all rows; chunked and native ones are short sums, added up
    in float64."""
    m = 9000
    runs = "chunked" if (twin, row_dtype) == ("native", torch.float64) else twin
    longest = {"plain": m, "chunked": BLOCK_ROWS, "native": 512}[runs]
    bound = (8 + longest**0.5) * (2.0**-53 if row_dtype == torch.float64 else 2.0**-24)
    layer = filled(m, 7, 3, row_dtype, decay=0.3)
    g, weights = torch.randn(5, 7), torch.randn(5, 3)
    with row_twin(twin, debug=True) as said:
        for got, expected in zip(run(layer, g, weights), dense(layer, g, weights)):
            assert (got - expected).norm() / expected.norm() < bound
    if said[0].startswith("native refuses: there is no"):
        pytest.skip(said[0])
    assert said[-1] == f"{runs} runs"


@pytest.mark.parametrize("b", [1, 31, 1030])
@pytest.mark.parametrize("saved", [True, False])
def test_any_batch_with_cosines_saved_or_recomputed(b, saved, monkeypatch):
    monkeypatch.setattr(functional, "SAVED_COSINES_BYTES", 1 << 40 if saved else 0)
    layer = filled(4200, 16, 4)
    g, weights = torch.randn(b, 16), torch.randn(b, 4)
    for got, expected in zip(run(layer, g, weights), dense(layer, g, weights)):
        assert (got - expected).norm() / expected.norm() < 2e-6


@pytest.mark.parametrize("m", [0, 1, 255, 256, 257, 4097])
def test_chunks_at_their_borders(m, monkeypatch):
    monkeypatch.setattr(rows_torch, "CHUNK_ELEMENTS", 256)
    layer = filled(m, 5, 4, torch.int8)
    g, weights = torch.randn(3, 5), torch.randn(3, 4)
    for got, expected in zip(run(layer, g, weights), dense(layer, g, weights)):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_error_does_not_grow_with_the_number_of_rows():
    """Two levels of sums: relative to the result, eight blocks are off by no more than one is. A
    single sum of float32 would be off by √8 times as much, in the mean over draws."""
    errors = []
    for m in (BLOCK_ROWS, 8 * BLOCK_ROWS):
        total = 0.0
        for _ in range(3):
            layer = filled(m, 16, 16)
            layer.set_rows(layer.A.detach(), torch.rand(m), layer.B.detach())
            g, weights = torch.randn(4, 16), torch.randn(4, 16)
            for got, expected in zip(run(layer, g, weights), dense(layer, g, weights)):
                total += float((got - expected).norm() / expected.norm())
        errors.append(total)
    assert errors[1] < 8**0.25 * errors[0]


def test_the_backward_pass_uses_the_twin_of_the_forward_pass(monkeypatch):
    used = []
    real = rows_torch.backward
    monkeypatch.setattr(rows_torch, "backward", lambda *args: (used.append(1), real(*args))[1])
    layer, g = filled(10, 3, 2), torch.randn(2, 3, requires_grad=True)
    with row_twin("plain"):
        out = layer(g)
    out.sum().backward()
    assert not used
    layer(g).sum().backward()
    assert used


def test_a_twin_that_refuses_says_why_when_asked(caplog):
    layer, g = filled(10, 3, 2), torch.randn(2, 3)
    expected = layer(g)
    with row_twin("triton") as silent:
        assert torch.equal(layer(g), expected)
    assert not silent and not caplog.records
    with row_twin("triton", debug=True) as said:
        assert torch.equal(layer(g), expected)
        layer(g)
    assert [line.split(":")[0] for line in said] == ["triton refuses", "chunked runs"]
    assert "cpu" in said[0] or "not installed" in said[0]
    assert said[0] in caplog.text


def test_the_switch_is_no_global():
    def elsewhere():
        with row_twin("plain", debug=True) as said:
            filled(3, 3, 2)(torch.randn(2, 3))
        told.append(said)

    told = []
    with row_twin("chunked", debug=True) as said:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert not said
        filled(3, 3, 2)(torch.randn(2, 3))
    assert told == [["plain runs"]] and said == ["chunked runs"]


@pytest.fixture
def compiled():
    if isinstance(rows_native._library(), str):
        pytest.skip(rows_native._library())


@pytest.mark.parametrize(
    "m, r, o, b",
    [
        (3, 2, 1, 1),
        (513, 16, 1, 8),
        (513, 8, 17, 2),
        (700, 100, 10, 3),
        (515, 33, 16, 9),
        (520, 8, 40, 17),
        (130, 48, 3, 70),
    ],
)
@pytest.mark.parametrize("row_dtype", STORAGE[1:], ids=str)
def test_native_sums_at_odd_sizes(m, r, o, b, row_dtype, compiled):
    """Few and many samples; rows, ranks and samples that fill no vector. Memory beyond the last row
    may hold anything."""
    layer = filled(m, r, o, row_dtype, decay=0.3, block_rows=128)
    for parameter in (layer.A, layer.B):
        last = parameter.blocks._blocks[-1]
        for tensor in last if row_dtype == torch.int8 else (last,):
            tensor[m % 128 :] = 127 if tensor.dtype == torch.int8 else float("nan")
    g, weights = torch.randn(b, r), torch.randn(b, o)
    with row_twin("native"):
        for got, expected in zip(run(layer, g, weights), dense(layer, g, weights)):
            assert (got - expected).norm() / expected.norm() < (1e-5 if r < 8 else 1e-6)


def test_native_threads_share_the_blocks_and_are_deterministic(compiled):
    layer = filled(1000, 20, 10, block_rows=128)
    g, weights = torch.randn(5, 20), torch.randn(5, 10)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            with row_twin("native"):
                found.append(run(layer, g, weights))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(found[1], found[2]))
    for one, three in zip(found[0], found[1]):
        torch.testing.assert_close(one, three, rtol=1e-6, atol=1e-6)


def test_native_passes_on_what_is_not_a_number(compiled):
    layer = filled(300, 20, 10)
    g = torch.randn(3, 20)
    g[1, 4] = float("nan")
    with row_twin("native"):
        out = layer(g)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    "compiler, reason",
    [("no-such-compiler", r"no C\+\+ compiler 'no-such-compiler'"), ("false", "false failed")],
)
def test_without_a_compiler_the_native_twin_refuses(compiler, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows_native._library.cache_clear()
    try:
        with row_twin("native", debug=True) as said:
            filled(3, 3, 2)(torch.randn(2, 3))
    finally:
        rows_native._library.cache_clear()
    assert re.search(reason, said[0]) and said[1] == "chunked runs"


def test_an_unknown_twin_is_named():
    with pytest.raises(ValueError, match="'fast'.*chunked"):
        with row_twin("fast"):
            pass
