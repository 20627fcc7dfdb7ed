"""Tasks as files of scales: saved, swapped on a live model, refused over another base."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qtrain import peqa
from qtrain.errors import CheckpointError, ModelError
from qtrain.modules.packed_identity import packed_identity
from qtrain.modules.packed_linear import PackedLinear
from qtrain.modules.record import LinearRecord
from qtrain.numerics.affine import choose_qparams, quantize
from qtrain.numerics.spec import QuantSpec


def packed(seed: int, out: int, columns: int, spec: QuantSpec) -> PackedLinear:
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    qparams = choose_qparams(weight, spec)
    return PackedLinear.from_record(LinearRecord(quantize(weight, qparams, spec), *qparams, spec), torch.zeros(out))


def model_of(seed: int = 0, *, symmetric: bool = False, zero_points: bool = False, trains: bool = True) -> nn.Module:
    spec = QuantSpec("int4", symmetric, "per_group", 8, scale_dtype="bf16")
    model = nn.Sequential(packed(seed, 24, 16, spec), nn.SiLU(), packed(seed + 1, 8, 24, spec))
    for layer in (model[0], model[2]):
        if trains:
            assert isinstance(layer, PackedLinear)
            layer.train_ranges(zero_points=zero_points)
    return model


def move(model: nn.Module, seed: int) -> None:
    """As a training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))


def test_a_hundred_alternations_give_the_same_bits(tmp_path: Path) -> None:
    x = torch.randn(5, 16)
    tasks: list[tuple[peqa.Scales, torch.Tensor]] = []
    for seed, zero_points in ((1, False), (2, True)):
        model = model_of(zero_points=zero_points)
        move(model, seed)
        file = peqa.save_scales(model, tmp_path / f"task{seed}")
        tasks.append((peqa.load_scales(file), model(x)))
    assert not torch.equal(tasks[0][1], tasks[1][1])
    for live in (model_of(trains=False), model_of(zero_points=True)):
        for turn in range(100):
            scales, expected = tasks[turn % 2]
            peqa.switch(live, scales)
            assert torch.equal(live(x), expected)


def test_a_task_is_as_large_as_its_scales(tmp_path: Path) -> None:
    model = model_of(symmetric=True)
    file = peqa.save_scales(model, tmp_path)
    assert file == tmp_path / "scales.safetensors"
    stored = load_file(file)
    assert {name: tensor.dtype for name, tensor in stored.items()} == dict.fromkeys(
        ("0.scale", "2.scale"), torch.bfloat16
    )
    assert sum(tensor.numel() for tensor in stored.values()) == (24 * 2) + (8 * 3)


def test_another_base_is_refused_by_name_and_nothing_changes(tmp_path: Path) -> None:
    model, other = model_of(0), model_of(7)
    move(other, 3)
    file = peqa.save_scales(other, tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=packed_identity(other)) as caught:
        peqa.switch(model, peqa.load_scales(file))
    assert packed_identity(model) in str(caught.value) and "scales.safetensors" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_changed_code_is_another_base() -> None:
    model = model_of()
    here = packed_identity(model)
    assert packed_identity(copy.deepcopy(model)) == here
    move(model, 1)
    assert packed_identity(model) == here
    with torch.no_grad():
        model.get_submodule("2").weight[3, 1] ^= 1 << 9  # type: ignore[operator, index]
    changed = packed_identity(model)
    assert changed != here
    with torch.no_grad():  # the same words in another order
        model.get_submodule("2").weight.copy_(model.get_submodule("2").weight.flip(0))  # type: ignore[operator]
    assert packed_identity(model) not in (here, changed)


def test_scales_of_another_shape_are_refused_before_anything_changes() -> None:
    model = model_of()
    taken = peqa.take_scales(model)
    tensors = dict(taken.tensors) | {"2.scale": taken.tensors["2.scale"][:, :1]}
    tensors["0.scale"] = tensors["0.scale"] * 2
    before = model.get_submodule("0").scale.clone()  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"2 has scales of shape \[8, 3\]"):
        peqa.switch(model, peqa.Scales(tensors, taken.base))
    assert torch.equal(model.get_submodule("0").scale, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["absent", "noise", "something else"])
def test_files_that_are_no_scales(tmp_path: Path, content: str) -> None:
    file = tmp_path / "scales.safetensors"
    if content == "noise":
        file.write_bytes(b"\x00" * 64)
    elif content == "something else":
        save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError) as caught:
        peqa.load_scales(tmp_path)
    assert str(file) in str(caught.value)


def test_a_model_without_packed_layers_has_no_scales() -> None:
    with pytest.raises(ModelError, match="Linear has no packed layer"):
        peqa.take_scales(nn.Linear(4, 4))
