"""The least code of a π-network, as a test: `python -m tests.minimal_test_mlp` runs it by hand."""

from experiments.tests.minimal_test_mlp import FinNet, InfNet, dummy_data, main, train


def test_an_infinite_network_learns_and_a_finite_one_follows_it():
    x, y = dummy_data()
    inf = InfNet(10, r=20, classes=2)
    fin = FinNet(inf, 10, n=1024)
    inf_losses, fin_losses = train(inf, x, y), train(fin, x, y)
    assert inf_losses[-1] < 0.5 * inf_losses[0]
    assert (inf(x).argmax(1) == y).float().mean() > 0.95
    assert len(inf.hidden) == 20 + 10 * 64, "one row per sample and step, beside the initial ones"
    assert abs(fin_losses[-1] - inf_losses[-1]) < 0.1


if __name__ == "__main__":
    main()
