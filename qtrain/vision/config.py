"""`model.*`, `data.*`, `optimizer.*` and `method.*` of task vision."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qtrain.methods.config import MethodSection
from qtrain.modules.config import QuantizerSection, WeightSection
from qtrain.numerics.spec import BITS, INTEGER_BITS
from qtrain.registry import Registry, did_you_mean
from qtrain.section import Section


class VisionModelSection(Section):
    """A residual network for small images."""

    architecture: Literal["resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"] = Field(
        "resnet20", description="ResNet of 6n + 2 layers in three stages, as for CIFAR (arXiv 1512.03385, section 4.2)"
    )
    width: int = Field(16, ge=1, description="channels of the first stage; the others have twice and four times these")
    activation: Literal["relu", "relu6"] = Field("relu", description="after each normalization")
    classes: int = Field(10, ge=2, description="labels are 0 to classes - 1")
    weights: str | None = Field(
        None,
        description="what training begins with: the directory of a run that quantized nothing, or a .safetensors "
        "file; null: random weights",
    )


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


class ImageMethod(MethodSection):
    """Keys that every method of this task has."""

    name: str = Field("none", description="what is quantized")
    compute_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="what products run in: auto is bf16 where the device has it, else fp32"
    )


class Unquantized(ImageMethod):
    """The full-precision twin: nothing is quantized."""


class PactSection(QuantizerSection):
    """`method.pact.*`: codes from 0 to a trained bound, int4 unless it is said."""

    format: str = Field("int4", description="int2 .. int8")
    symmetric: Literal[False] = Field(False, description="a ReLU leaves nothing below 0")
    range: Literal["pact"] = Field("pact", description="a trained clipping bound, one for each activation")


class QatOptions(ImageMethod):
    """Quantization-aware training: what is convolved in training is what will be deployed."""

    weight: WeightSection | None = Field(
        default_factory=WeightSection, description="of every convolution and the linear layer; null leaves weights be"
    )
    activation: QuantizerSection | None = Field(None, description="of every such layer's input")
    pact: PactSection | None = Field(None, description="of the clipping activation that replaces each ReLU (PACT)")
    rules: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description='other keys for layers by name: {"*.stage3.*": {weight: {format: int8}, pact: null}}',
    )
    skip: list[str] = Field(default_factory=list, description='layers that stay as they are, by name: ["*.head"]')
    first_last: str | None = Field(None, description="a format for the first and the last layer, such as int8")
    scale_lr: float | None = Field(None, gt=0, description="learning rate of learned ranges; default: optimizer.lr")
    start_step: int = Field(0, ge=0, description="optimizer steps in full precision before quantization sets in")
    freeze_ranges_step: int | None = Field(None, ge=0, description="learned ranges stay as they are from this step on")
    bits_schedule: dict[int, str | dict[str, str]] = Field(
        default_factory=dict,
        description="formats from a step on, of weights or of both: {0: int8, 500: {weight: int4, activation: int6}}",
    )
    calibration_batches: int = Field(
        8, ge=0, description="training batches from which static ranges and learned starts of activations are found"
    )

    @field_validator("first_last")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        if name is not None and name not in BITS:
            raise ValueError(f"no such format; {did_you_mean(name, BITS)}")
        return name

    @field_validator("bits_schedule")
    @classmethod
    def _known_formats(cls, schedule: dict[int, str | dict[str, str]]) -> dict[int, str | dict[str, str]]:
        for entry in schedule.values():
            formats = {"weight": entry} if isinstance(entry, str) else entry
            for part, name in formats.items():
                if part not in ("weight", "activation"):
                    raise ValueError(f"{part!r} is neither weight nor activation")
                if name not in INTEGER_BITS:
                    raise ValueError(f"{name!r} is no integer format; {did_you_mean(name, INTEGER_BITS)}")
        return schedule

    @model_validator(mode="after")
    def _something(self) -> QatOptions:
        if not any((self.weight, self.activation, self.pact, self.rules)):
            raise ValueError("nothing is quantized: set method.weight.format, method.pact.format or others")
        return self


METHODS: Registry[type[MethodSection]] = Registry("method", {"none": Unquantized, "qat": QatOptions})
