"""Keys of starting points in the options of methods that can begin at one."""

from __future__ import annotations

from pydantic import Field

from qtrain.ptq.config import STARTS, AwqSection, GptqSection, HqqSection, SmoothQuantSection, StartSection
from qtrain.section import Section


class StartKeys(Section):
    """A section for each starting point that has options, under its own name."""

    hqq: HqqSection = Field(default_factory=HqqSection, description="options of init=hqq")
    awq: AwqSection = Field(default_factory=AwqSection, description="options of init=awq")
    gptq: GptqSection = Field(default_factory=GptqSection, description="options of init=gptq")
    smoothquant: SmoothQuantSection = Field(
        default_factory=SmoothQuantSection, description="options of init=smoothquant"
    )

    def start_options(self, name: str) -> StartSection:
        """Options of the starting point of that name."""
        found: StartSection = getattr(self, name, None) or STARTS[name]()
        return found
