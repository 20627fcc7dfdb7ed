"""Tasks as files of scales over one packed base.

model = qtrain.peqa.load_base("runs/peqa_llama/base")
sql, chat = (qtrain.peqa.load_scales(f"runs/{name}/scales") for name in ("sql", "chat"))
qtrain.peqa.switch(model, sql)
"""

from __future__ import annotations

from qtrain.modules.scales import Scales, load_scales, save_scales, switch, take_scales

__all__ = ["Scales", "load_scales", "save_scales", "switch", "take_scales"]
