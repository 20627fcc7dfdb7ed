"""The whole config: sections of its own and those that packages registered."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator

from qtrain.data.config import DataSection
from qtrain.distill.config import DistillSection
from qtrain.distill.generation.config import GenerateDataSection
from qtrain.evaluation.config import GenerateSection
from qtrain.export.config import FORMATS, ExportSection
from qtrain.methods.config import METHODS, MethodSection
from qtrain.models.config import ModelSection
from qtrain.registry import Registry
from qtrain.section import Section
from qtrain.vision.config import METHODS as VISION_METHODS
from qtrain.vision.config import SgdSection, VisionDataSection, VisionModelSection


class OptimizerSection(Section):
    """Who updates the trained parameters, and how fast."""

    name: Literal["adamw", "adamw_16bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        "adamw",
        description="16-bit ones hold their state in bf16, rounded by chance; 8-bit ones in blocks of 256; paged ones "
        "spill to host memory",
    )
    lr: float = Field(2e-4, gt=0, description="learning rate at its highest")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="course of lr after the warm-up")
    warmup: float = Field(0, ge=0, description="steps of linear warm-up; below 1 it is a share of all steps")
    lr_factors: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="name pattern of parameters to what multiplies their rate; {'*embed_tokens*': 0} holds embeddings",
    )

    @field_validator("betas")
    @classmethod
    def _within_unit(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("each must be at least 0 and below 1")
        return betas


class RunSection(Section):
    """Where the run lives and what makes it repeatable."""

    name: str | None = Field(None, description="default: the recipe's name, else the verb")
    dir: str | None = Field(None, description="default: runs/NAME")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of data order, adapters, dropout")
    resume: bool | str = Field(False, description="true: from the newest checkpoint of the run; or a checkpoint's path")
    overwrite: bool = Field(False, description="let go of what an earlier run left in this directory")
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "high", description="of fp32 products on a GPU: high is TF32"
    )
    gradient_compression: Literal["none", "bf16", "int8_tensor", "int8_channel"] = Field(
        "none", description="what DDP sends of gradients; int8 keeps what it leaves out for the next step"
    )
    save_every: int = Field(0, ge=0, description="optimizer steps between checkpoints; 0 is at the end of each epoch")
    keep: int = Field(2, ge=1, description="last checkpoints to keep; the one of the lowest validation loss stays too")


class LanguageRunSection(RunSection):
    """The same, and what language models alone have."""

    recompute: Literal["auto", "none", "selective", "full", "offload"] = Field(
        "auto",
        description="layers that drop activations and run again: none, half, all, all with inputs on the host; auto: "
        "the fewest that fit, by a measurement of one layer on a GPU; none where nothing is measured",
    )
    cuda_graphs: bool = Field(
        False,
        description="replay decoder layers as CUDA graphs: for models whose kernels are over sooner than the CPU "
        "launches them; method.name=qat on one GPU",
    )
    samples: list[str] = Field(default_factory=list, description="prompts answered at each validation")


class WandbSection(Section):
    """Tracking in Weights & Biases; CSV is written in any case."""

    enabled: bool = Field(False, description="log to W&B; WANDB_MODE=offline works too")
    project: str = Field("qtrain", description="project in W&B")
    entity: str | None = Field(None, description="team or user in W&B")
    tags: list[str] = Field(default_factory=list, description="labels of the run")
    artifacts: bool = Field(True, description="log base, what was trained, and exports, with what came from what")
    upload: list[Literal["base", "adapter", "scales", "weights", "export"]] = Field(
        default_factory=lambda: ["adapter", "scales"],  # type: ignore[arg-type]
        description="artifacts whose files go to W&B; of the others it keeps paths and checksums",
    )


class RunConfig(Section):
    """What the config of every task holds; a task narrows the sections and adds its own."""

    implementation: ClassVar[str]
    """``package.module:attribute`` of the function that fits it, imported when it runs."""

    tagged: ClassVar[dict[str, tuple[Registry[Any], str]]]
    """Sections whose class a key of theirs chooses: the table, whose first entry is the default, and the key."""

    task: str = Field(description="what kind of model")
    recipe: str | None = Field(None, description="name or path the run was composed from")
    model: SerializeAsAny[Section]
    data: SerializeAsAny[Section]
    method: SerializeAsAny[MethodSection]
    optimizer: SerializeAsAny[Section]
    trainer: dict[str, Any] = Field(default_factory=dict, description="arguments of lightning.Trainer, by their names")
    run: SerializeAsAny[RunSection]
    wandb: WandbSection = Field(default_factory=WandbSection)


class Config(RunConfig):
    """One run on a language model, resolved: every key with its value."""

    implementation: ClassVar[str] = "qtrain.training.fit:fit"
    tagged: ClassVar[dict[str, tuple[Registry[Any], str]]] = {
        "method": (METHODS, "name"),
        "export": (FORMATS, "format"),
    }

    task: Literal["language"] = Field("language", description="what kind of model")
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    run: LanguageRunSection = Field(default_factory=LanguageRunSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    generate: GenerateSection = Field(default_factory=GenerateSection)
    generate_data: GenerateDataSection = Field(default_factory=GenerateDataSection)
    export: SerializeAsAny[ExportSection]


class VisionConfig(RunConfig):
    """One run on an image classifier, resolved."""

    implementation: ClassVar[str] = "qtrain.training.fit_vision:fit"
    tagged: ClassVar[dict[str, tuple[Registry[Any], str]]] = {"method": (VISION_METHODS, "name")}

    task: Literal["vision"] = Field("vision", description="what kind of model")
    model: VisionModelSection = Field(default_factory=VisionModelSection)
    data: VisionDataSection = Field(default_factory=VisionDataSection)
    optimizer: SgdSection = Field(default_factory=SgdSection)
    run: RunSection = Field(default_factory=RunSection)


TASKS: Registry[type[RunConfig]] = Registry("task", {"language": Config, "vision": VisionConfig})
