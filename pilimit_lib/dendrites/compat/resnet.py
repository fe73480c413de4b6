"""A torchvision ResNet rebuilt so that each convolution and its norm are one block: what dendrites
want of pretrained networks."""

from torch import nn

from ..conversion import PAISequential


class _Block(nn.Module):
    """A BasicBlock or Bottleneck with PAISequential(conv, norm) in the places of conv_i and bn_i;
    same tensors, same function."""

    def __init__(self, block: nn.Module):
        super().__init__()
        count = sum(name.startswith("conv") for name, _ in block.named_children())
        self.convs = nn.ModuleList(
            PAISequential([getattr(block, f"conv{i + 1}"), getattr(block, f"bn{i + 1}")])
            for i in range(count)
        )
        self.relu = block.relu
        self.downsample = (
            None if block.downsample is None else PAISequential(list(block.downsample))
        )

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if i < len(self.convs) - 1:
                x = self.relu(x)
        return self.relu(x + shortcut)


class ResNetPAI(nn.Module):
    """Takes a torchvision ResNet, pretrained or not, and computes the same; every convolution with
    its norm becomes dendritic as one block.

    For use as a replacement (``append_replacement_modules([PBM.ResNetPB])``) or directly: ``model =
    ResNetPAI(resnet18())``.
    """

    def __init__(self, resnet: nn.Module):
        super().__init__()
        missing = [
            n
            for n in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer4", "avgpool", "fc")
            if not hasattr(resnet, n)
        ]
        if missing:
            raise TypeError(
                f"ResNetPAI takes a torchvision ResNet; {type(resnet).__name__} lacks {missing}"
            )
        self.stem = PAISequential([resnet.conv1, resnet.bn1])
        self.relu, self.maxpool, self.avgpool = resnet.relu, resnet.maxpool, resnet.avgpool
        for name in ("layer1", "layer2", "layer3", "layer4"):
            setattr(self, name, nn.Sequential(*(_Block(block) for block in getattr(resnet, name))))
        self.fc = resnet.fc

    def forward(self, x):
        x = self.maxpool(self.relu(self.stem(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.fc(self.avgpool(x).flatten(1))
