"""The paper's CIFAR-10 command."""
