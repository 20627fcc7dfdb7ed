from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtrain.config.compose import load_recipe
from qtrain.errors import ConfigError
from qtrain.training.fit import fit
from qtrain.training.module import LanguageModule
from qtrain.training.rate_factors import with_factors
from qtrain.training.run_directory import RunDirectory


def model() -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(4, 3), "first": nn.Linear(3, 3), "last": nn.Linear(3, 2)})


def rates(groups: list[dict[str, Any]], named: dict[str, torch.Tensor]) -> dict[str, float]:
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in named.items()}


def test_each_parameter_has_its_group_s_rate_times_the_last_factor_that_names_it() -> None:
    net = model()
    named = dict(net.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if "bias" not in n], "lr": 0.1, "weight_decay": 0.5},
        {"params": [p for n, p in named.items() if "bias" in n], "lr": 0.01},
    ]
    found = with_factors(groups, named.items(), {"*": 2.0, "embed.*": 0.0, "first.*": 0.5})
    assert rates(found, named) == pytest.approx(
        {"embed.weight": 0.0, "first.weight": 0.05, "first.bias": 0.005, "last.weight": 0.2, "last.bias": 0.02}
    )
    assert all(group["weight_decay"] == 0.5 for group in found if group["lr"] > 0.04 or group["lr"] == 0)
    assert sum(len(group["params"]) for group in found) == len(named)


def test_without_factors_groups_stay() -> None:
    net = model()
    groups = [{"params": list(net.parameters()), "lr": 0.1}]
    assert with_factors(groups, net.named_parameters(), {}) == groups


def test_a_pattern_that_names_nothing_is_an_error() -> None:
    net = model()
    groups = [{"params": list(net["first"].parameters()), "lr": 0.1}]
    with pytest.raises(ConfigError, match=r"'embed\.\*' matches nothing that trains(.|\n)*first\.weight"):
        with_factors(groups, net.named_parameters(), {"embed.*": 0.0})


def test_a_factor_of_zero_holds_a_parameter_through_a_fit(tiny_llama_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("one two three four five six seven eight nine ten " * 60)
    config = load_recipe(
        None,
        *(
            f"model.path={tiny_llama_dir}",
            f"data.train={text}",
            "data.max_length=32",
            f"data.validation={text}",
            f"run.dir={tmp_path / 'run'}",
        ),
        *("method.name=qat", "optimizer.lr=1e-2", "trainer.max_steps=2", "optimizer.lr_factors={'*embed_tokens*': 0}"),
    )
    before = LanguageModule(config)
    before.build(torch.device("cpu"))
    fit(config, RunDirectory(tmp_path / "run"))
    after = LanguageModule(config)
    after.build(torch.device("cpu"))
    trained = RunDirectory(tmp_path / "run").trained
    assert trained is not None
    assert after.model is not None
    assert before.model is not None
    after.method.restore(after.model, trained)
    old, new = dict(before.model.named_parameters()), dict(after.model.named_parameters())
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    assert not torch.equal(old["model.norm.weight"], new["model.norm.weight"])
