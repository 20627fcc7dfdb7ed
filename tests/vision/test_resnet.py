"""The network has the paper's shape and size, learns, and knows nothing of quantization."""

from __future__ import annotations

import ast
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from qtrain.vision.resnet import ResNet


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")],  # table 6 of the paper, in millions
)
def test_parameters_are_those_of_the_paper(depth: int, parameters: str) -> None:
    model = ResNet(depth, width=16, classes=10, channels=3)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    digits = len(parameters.partition(".")[2])
    assert f"{count:.{digits}f}" == parameters


@settings(deadline=None, max_examples=12)
@given(
    blocks=st.integers(1, 2),
    width=st.integers(1, 6),
    classes=st.integers(2, 12),
    channels=st.integers(1, 3),
    side=st.integers(4, 33),
)
def test_shapes(blocks: int, width: int, classes: int, channels: int, side: int) -> None:
    model = ResNet(6 * blocks + 2, width, classes, channels)
    images = torch.randn(2, channels, side, side)
    logits = model(images)
    assert logits.shape == (2, classes)
    inner = model.stage3(model.stage2(model.stage1(model.conv(images))))
    quarter = math.ceil(side / 4)
    assert inner.shape == (2, 4 * width, quarter, quarter)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 6 * blocks + 2


def test_each_activation_is_a_module_of_its_own() -> None:
    model = ResNet(20)
    used: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, *_: used.append(m))
    model(torch.randn(2, 1, 28, 28))
    assert len(used) == len(set(used)) == 19  # one after each convolution
    assert all(
        isinstance(module, nn.ReLU6)
        for module in ResNet(8, activation=nn.ReLU6).modules()
        if "ReLU" in str(type(module))
    )


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        ResNet(depth)


def test_it_learns_64_images_by_heart() -> None:
    torch.manual_seed(0)
    model = ResNet(8, width=8)
    images, labels = torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    for _ in range(40):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).all()


@pytest.mark.parametrize("module", ["classifier", "resnet"])
def test_it_knows_nothing_of_qtrain(module: str) -> None:
    spec = find_spec(f"qtrain.vision.{module}")
    assert spec and spec.origin
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    imported += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imported and not [name for name in imported if name.startswith("qtrain")]
