"""`model.*`, `data.*`, `optimizer.*` and `method.*` of task vision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qtrain.methods.config import MethodSection
from qtrain.registry import Registry
from qtrain.section import Section


class VisionModelSection(Section):
    """A residual network for small images, trained from scratch."""

    architecture: Literal["resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"] = Field(
        "resnet20", description="ResNet of 6n + 2 layers in three stages, as for CIFAR (arXiv 1512.03385, section 4.2)"
    )
    width: int = Field(16, ge=1, description="channels of the first stage; the others have twice and four times these")
    activation: Literal["relu", "relu6"] = Field("relu", description="after each normalization")
    classes: int = Field(10, ge=2, description="labels are 0 to classes - 1")


class VisionDataSection(Section):
    """Images and labels in the four idx files of MNIST and its successors."""

    path: str = Field(
        "/usr/share/datasets/fashion-mnist",
        description="directory of the idx files, .gz or not, or torchvision's root above FashionMNIST/raw; default: "
        "where Debian's package dataset-fashion-mnist puts them",
    )
    batch_size: int = Field(128, ge=1, description="images in a batch of training, on each device")
    eval_batch_size: int = Field(1000, ge=1, description="images in a batch without gradients")
    augment: bool = Field(
        True, description="train on random crops of the image padded by 2 pixels, half of them flipped"
    )
    validation_share: float = Field(
        0.1, ge=0, lt=1, description="share of the training images that val/* is measured on; 0 trains on all of them"
    )


class SgdSection(Section):
    """SGD with Nesterov's momentum; lr follows a cosine to 0 over the whole training."""

    name: Literal["sgd"] = Field("sgd", description="who updates the trained parameters")
    lr: float = Field(0.1, gt=0, description="learning rate at its highest")
    momentum: float = Field(0.9, gt=0, lt=1, description="share of the last step that the next one keeps")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty on all parameters")


class Unquantized(MethodSection):
    """The full-precision twin: nothing is quantized."""

    name: str = Field("none", description="what is quantized")
    compute_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="what products run in: auto is bf16 where the device has it, else fp32"
    )


METHODS: Registry[type[MethodSection]] = Registry("method", {"none": Unquantized})
