"""The Trainer's arguments, read from its source, are those that it has."""

from __future__ import annotations

import inspect
from datetime import timedelta

import lightning
import pytest
from pydantic import TypeAdapter, ValidationError

from qtrain.config.trainer_args import OWNED, argument_type, trainer_arguments


def test_names_are_those_of_the_installed_trainer() -> None:
    names = list(inspect.signature(lightning.Trainer).parameters)
    assert list(trainer_arguments()) == names
    assert {"max_steps", "accumulate_grad_batches", "precision", "gradient_clip_val"} <= set(names)
    assert set(OWNED) <= set(names)


def test_every_default_of_the_trainer_fits_its_own_annotation() -> None:
    for name, parameter in inspect.signature(lightning.Trainer).parameters.items():
        TypeAdapter(argument_type(trainer_arguments()[name])).validate_python(parameter.default)


@pytest.mark.parametrize(
    ("name", "fits", "wrong"),
    [
        ("max_steps", 10, "ten"),
        ("max_epochs", None, 1.5),
        ("limit_val_batches", 0.25, [1]),
        ("devices", [0, 1], {"a": 1}),
        ("gradient_clip_val", 0.3, "much"),
        ("max_time", "00:12:00:00", 1.5j),
        ("strategy", "ddp", 3),
    ],
)
def test_values_are_checked_by_type(name: str, fits: object, wrong: object) -> None:
    adapter = TypeAdapter(argument_type(trainer_arguments()[name]))
    adapter.validate_python(fits)
    with pytest.raises(ValidationError):
        adapter.validate_python(wrong)


def test_a_duration_is_one() -> None:
    assert TypeAdapter(argument_type("Optional[timedelta]")).validate_python(timedelta(1)) == timedelta(1)
