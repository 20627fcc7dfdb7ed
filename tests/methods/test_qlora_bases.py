"""Adapters over packed integers and over the codes of quantized checkpoints."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qtrain.errors import ExportError, ModelError
from qtrain.kernels import packed_linear as kernel
from qtrain.methods.base import load_base
from qtrain.methods.config import METHODS
from qtrain.methods.method import build_method
from qtrain.methods.packed import pack
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.methods.qlora.method import QLora
from qtrain.models.config import ModelSection
from qtrain.models.packed import load_packed, save_packed
from qtrain.modules.frozen_linear import dense_weight, frozen_kind, linears
from qtrain.modules.packed_identity import packed_layers

CPU = torch.device("cpu")
GROUPS = {"group_size": 32}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT 0.21, transformers 5.23
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),  # once for each int8 product
]


def of_models(name: str) -> ModuleType:
    """A module of the tests of models, which write quantized directories."""
    path = Path(__file__).parent.parent / "models" / f"{name}.py"
    spec = spec_from_file_location(f"of_models_{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_checkpoint = of_models("conftest").make_checkpoint
Gptq, Hqq = of_models("test_quantized_gptq").Gptq, of_models("test_quantized_hqq").Hqq
HQQ_HEADER = of_models("test_quantized_hqq").HEADER
Bnb = of_models("test_quantized_bitsandbytes").Bnb

PACKED: dict[str, dict[str, Any]] = {
    "hqq int4": {"init": "hqq", "weight": {**GROUPS, "symmetric": False}},
    "hqq int3": {"init": "hqq", "weight": {**GROUPS, "format": "int3", "symmetric": False}},
    "hqq int6": {"init": "hqq", "weight": {**GROUPS, "format": "int6"}},
    "int8 rows (EETQ)": {"init": "rtn", "weight": {"format": "int8"}},
    "gptq int4": {"init": "gptq", "weight": GROUPS},
    "awq int4": {"init": "awq", "weight": GROUPS},
    "spqr int2": {"init": "spqr", "weight": {**GROUPS, "format": "int2"}},
    "some": {
        "init": "mse",
        "weight": GROUPS,
        "skip": ["*.k_proj"],
        "head": True,
        "rules": {"*.up_proj": {"weight": {"format": "int8"}}},
    },
}
CHECKPOINTS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gptq": lambda: ((it := Gptq()), it.header),
    "gptq asymmetric": lambda: ((it := Gptq(sym=False)), it.header),
    "hqq, fractional zero points": lambda: (Hqq(), HQQ_HEADER),
    "bitsandbytes nf4": lambda: ((it := Bnb()), it.header),
    "bitsandbytes int8": lambda: ((it := Bnb("int8", False)), it.header),
}
Base = Callable[..., tuple[QLora, PeftModel]]


def text(rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 120, (1, 24), generator=generator) for _ in range(min(rows, 6))]


@pytest.fixture
def base(tiny_llama_dir: Path, make_checkpoint: Callable[..., Any]) -> Base:
    """A tiny model under adapters, by the name of its base."""

    def call(name: str, **keys: Any) -> tuple[QLora, PeftModel]:
        if name in PACKED:
            options = QLoraOptions(r=4, base="packed", packed=PACKED[name], **keys)
            directory = tiny_llama_dir
        else:
            options = QLoraOptions(r=4, base="checkpoint", **keys)
            whole = {"intermediate_size": 128} if keys.get("dora") and name == "bitsandbytes nf4" else {}
            directory = make_checkpoint(*CHECKPOINTS[name](), **whole).directory
        model = load_base(
            ModelSection(path=str(directory)), options, torch.float32, compute_dtype=torch.float32, device=CPU
        )
        method = build_method(options)
        assert isinstance(method, QLora)
        torch.manual_seed(5)
        adapted = method.prepare(model, compute_dtype=torch.float32, device=CPU, text=text)
        return method, adapted

    return call


def stir(model: nn.Module) -> None:
    """Move B off zero, and DoRA's magnitudes off the norms, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))


def dense(method: QLora, model: PeftModel) -> LlamaForCausalLM:
    """A plain model with the numbers that the base stands for."""
    inner = method.plain_model(model)
    plain = LlamaForCausalLM(LlamaConfig.from_dict(inner.config.to_dict())).eval()
    state = {}
    for name, module in inner.named_modules():
        own = name.replace(".base_layer", "")
        if ".lora_" in name or hasattr(module, "base_layer"):
            continue
        if hasattr(module, "in_features"):
            state[f"{own}.weight"] = dense_weight(module)
        elif isinstance(getattr(module, "weight", None), Tensor):
            state[f"{own}.weight"] = module.weight
    plain.load_state_dict(state)
    assert isinstance(plain, LlamaForCausalLM)
    return plain


def ids() -> Tensor:
    return torch.arange(5, 37)[None]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(input_ids=ids()).logits
    return result


def tolerance(name: str) -> float:
    return 5e-2 if name == "bitsandbytes int8" else 1e-5  # LLM.int8() in eval mode rounds the layer's inputs too


@pytest.mark.parametrize("name", [*PACKED, *CHECKPOINTS])
def test_adapters_that_are_zero_leave_the_numbers_of_the_codes(name: str, base: Base) -> None:
    method, model = base(name)
    torch.testing.assert_close(
        logits(model.eval()), logits(dense(method, model)), rtol=tolerance(name), atol=tolerance(name)
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert len(trained) == 2 * 14
    kinds = {frozen_kind(layer.get_base_layer()) for layer in model.modules() if isinstance(layer, LoraLayer)}
    known = {"bitsandbytes nf4": {"nf4"}, "bitsandbytes int8": {"int8"}, "some": {"packed", None}}
    assert kinds == known.get(name, {"packed"})


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", [*PACKED, *CHECKPOINTS])
def test_gradients_are_those_over_the_dense_weight(name: str, dora: bool, base: Base) -> None:
    method, model = base(name, dora=dora)
    stir(model)
    plain = build_method(QLoraOptions(r=4, base="none", dora=dora))
    twin = plain.prepare(dense(method, model), compute_dtype=torch.float32, device=CPU)
    assert isinstance(twin, PeftModel)
    set_peft_model_state_dict(twin, get_peft_model_state_dict(model, save_embedding_layers=False))
    found: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for one, gradients in ((model, found), (twin, expected)):
        one.train()  # nothing here depends on it but LLM.int8(), which leaves inputs as they are then
        one(input_ids=ids(), labels=ids()).loss.backward()
        gradients |= {key: p.grad for key, p in one.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) == (3 if dora else 2) * 14
    for key, gradient in expected.items():
        assert 0 < float((found[key] - gradient).norm() + gradient.norm()) < 1.001 * float(gradient.norm()), key


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", [*PACKED, *CHECKPOINTS])
def test_what_is_deployed_is_what_was_trained(name: str, dora: bool, base: Base) -> None:
    method, model = base(name, dora=dora, target_modules=["q_proj", "k_proj", "down_proj"])
    stir(model)
    deployed = method.deployed(model, dtype=torch.float32)
    tensors = list(deployed.tensors())
    values = {tensor.name: tensor.value() for tensor in tensors}
    assert all(tuple(values[tensor.name].shape) == tensor.shape for tensor in tensors)
    assert sum(tensor.linear for tensor in tensors) == 14
    plain = LlamaForCausalLM(LlamaConfig.from_dict(deployed.config.to_dict())).eval()
    plain.load_state_dict(values, strict=True)
    torch.testing.assert_close(logits(plain), logits(model.train()), rtol=1e-3, atol=1e-4)
    assert any(f"method.base={method.options.base}" in note for note in deployed.notes)


@pytest.mark.parametrize("name", PACKED)
def test_the_base_is_kept_without_its_adapters(name: str, base: Base, tmp_path: Path) -> None:
    method, model = base(name)
    assert method.keeps_base
    stir(model)
    save_packed(method.plain_model(model), tmp_path / "base")
    again = load_packed(tmp_path / "base", torch.float32)
    with model.disable_adapter():
        assert torch.equal(logits(again), logits(model.eval()))
    loaded = method.prepare(again, compute_dtype=torch.float32, device=CPU)  # there is no text, and none is asked for
    method.save(model, tmp_path / "adapter")
    method.restore(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_lines_name_the_base(base: Base) -> None:
    method, model = base("hqq int4")
    assert method.lines(model)[:3] == [
        "base        packed, by hqq",
        "packed      14 layers, int4 asymmetric, per_group(32)",
        "size        0.0 MB, 4.625 bits a weight",
    ]
    method, model = base("hqq, fractional zero points")
    assert method.lines(model)[0] == "base        codes of model.path"
    assert "fractional zero points" in method.lines(model)[1]


@pytest.mark.parametrize(
    ("name", "kernels", "used"),
    [("gptq", None, True), ("hqq, fractional zero points", None, True), ("hqq int4", "auto", True)]
    + [("hqq int4", "plain", False)],
)
def test_the_kernels_are_those_of_the_device(
    name: str, kernels: str | None, used: bool, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over codes of a checkpoint too, for which no key chooses them. The choice of a GPU is made for a CPU here."""
    monkeypatch.setattr(kernel, "packed_tiles", SimpleNamespace(fits=lambda *_: False))
    monkeypatch.setattr(pack, "choose_tiles", lambda asked, device: kernel.choose_tiles(asked, torch.device("cuda")))
    if kernels is not None:
        monkeypatch.setitem(PACKED, name, PACKED[name] | {"kernels": kernels})
    method, model = base(name)
    assert [layer.tiles for layer in packed_layers(model).values()] == [used] * 14
    words = "PyTorch's own operations" + (": those in Triton need a GPU" if used else "")
    assert f"kernels     {words}" in method.lines(model)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gptq", "gptq asymmetric", "hqq, fractional zero points"])
def test_weights_of_a_checkpoint_are_unpacked_by_kernels_on_a_gpu(name: str, base: Base) -> None:
    method, model = base(name)
    kept = {key: layer.dense_weight() for key, layer in packed_layers(model).items()}
    inner = method.plain_model(model)
    pack.use_tiles(inner, "auto", torch.device("cuda"))
    inner.to("cuda")
    assert "kernels     Triton: dequantization, sums of scales' gradients" in method.lines(model)
    for key, layer in packed_layers(model).items():
        assert layer.tiles and torch.equal(layer.dense_weight().cpu(), kept[key])


def test_lines_of_codebooks(base: Base) -> None:
    method, model = base("bitsandbytes nf4")
    assert method.lines(model)[:2] == ["base        codes of model.path", "codes       14 layers, nf4"]
    assert not method.keeps_base


def test_an_adapter_fits_the_original_unless_its_inputs_were_scaled(base: Base) -> None:
    assert base("gptq int4")[0].why_no_original() is None
    assert "scaled the layers' inputs" in str(base("awq int4")[0].why_no_original())
    assert "no other weights" in str(base("gptq")[0].why_no_original())


ASKED = [
    ("qlora", {"base": "nf4"}, r"method\.base=nf4 chooses codes(.|\n)*method\.base=checkpoint keeps them"),
    ("qlora", {"base": "int8"}, r"method\.base=int8 chooses codes(.|\n)*method\.base=checkpoint keeps them"),
    ("qlora", {"base": "packed"}, r"method\.base=packed chooses codes(.|\n)*method\.base=checkpoint keeps them"),
    ("qlora", {"base": "none"}, r"method\.base=none keeps 16-bit weights(.|\n)*method\.base=checkpoint keeps them"),
    ("qat", {"weight": {"format": "int4"}}, r"method\.name=qat trains 16-bit(.|\n)*qlora method\.base=checkpoint"),
    ("peqa", {"init": "gptq"}, r"method\.init=gptq chooses codes(.|\n)*method\.init=checkpoint keeps them"),
]


@pytest.mark.parametrize(("name", "keys", "message"), ASKED)
@pytest.mark.parametrize("hub", [False, True])
def test_codes_are_neither_unpacked_nor_quantized_again(
    name: str,
    keys: dict[str, Any],
    message: str,
    hub: bool,
    make_checkpoint: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_checkpoint(writer := Gptq(), writer.header)
    path = str(made.directory)
    if hub:
        config = json.loads((made.directory / "config.json").read_text())
        monkeypatch.setattr("qtrain.methods.base.PretrainedConfig.get_config_dict", lambda *_, **__: (config, {}))
        path = "someone/a-quantized-model"
    options = METHODS.get(name).model_validate({"name": name, **keys})
    with pytest.raises(ModelError, match=message) as caught:
        load_base(ModelSection(path=path), options, torch.float32, compute_dtype=torch.float32, device=CPU)
    assert "model.path holds gptq codes" in str(caught.value)


def test_a_quantized_hub_id_is_downloaded(make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_checkpoint(writer := Gptq(), writer.header)
    config = json.loads((made.directory / "config.json").read_text())
    monkeypatch.setattr("qtrain.methods.base.PretrainedConfig.get_config_dict", lambda *_, **__: (config, {}))
    monkeypatch.setattr("qtrain.models.stored.snapshot_download", lambda *_, **__: str(made.directory))
    options = QLoraOptions(base="checkpoint")
    section = ModelSection(path="someone/a-quantized-model")
    model = load_base(section, options, torch.float32, compute_dtype=torch.float32, device=CPU)
    assert len(packed_layers(model)) == 14


def test_codebooks_are_for_adapters_alone(make_checkpoint: Callable[..., Any]) -> None:
    made = make_checkpoint(writer := Bnb(), writer.header)
    section = ModelSection(path=str(made.directory))
    for keys in ({"init": "gptq"}, {"init": "checkpoint"}):
        options = METHODS.get("peqa").model_validate({"name": "peqa", **keys})
        with pytest.raises(ModelError, match=r"method\.name=qlora"):
            load_base(section, options, torch.float32, compute_dtype=torch.float32, device=CPU)


def test_dora_is_refused_where_peft_reads_other_numbers(tiny_llama: PreTrainedModel) -> None:
    tiny_llama.model.layers[0].mlp.down_proj = torch.nn.Linear(96, 64, bias=False)
    for keys, refused in (({"dora": True}, True), ({"dora": True, "base": "int8"}, False), ({}, False)):
        method = build_method(QLoraOptions(r=4, **keys))
        with pytest.raises(ModelError, match=r"0\.mlp\.down_proj: DoRA over 96") if refused else nullcontext():
            method.prepare(copy.deepcopy(tiny_llama), compute_dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("given", [False, True])
def test_plain_weights_hold_no_codes(given: bool, tiny_llama_dir: Path, tiny_llama: PreTrainedModel) -> None:
    options = QLoraOptions(base="checkpoint")
    with pytest.raises(ModelError, match=r"16-bit weights(.|\n)*method\.base=nf4"):
        if given:
            build_method(options).prepare(tiny_llama, compute_dtype=torch.float32, device=CPU)
        section = ModelSection(path=str(tiny_llama_dir))
        load_base(section, options, torch.float32, compute_dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"packed": {"init": "hqq"}}, "method.base=packed"),
        ({"base": "checkpoint", "packed": {}}, "method.packed=null"),
        ({"base": "packed", "packed": {"init": "checkpoint"}}, "method.base=checkpoint"),
        ({"base": "packed", "packed": {"init": "smoothquant"}}, "init=awq or gptq"),
        ({"base": "packed", "packed": {"init": "gtpq"}}, "gptq"),
        ({"base": "packed", "packed": {"weight": {"range": "learned"}}}, "method.packed.init"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        QLoraOptions.model_validate(keys)


def test_a_resolved_config_is_read_again() -> None:
    for keys in ({}, {"base": "packed"}, {"base": "packed", "packed": {"init": "hqq"}}):
        options = QLoraOptions.model_validate(keys)
        assert (options.packed is not None) == bool(keys)
        assert QLoraOptions.model_validate(options.model_dump(mode="json")) == options


def over_aqlm(model: PreTrainedModel) -> None:
    """Layers that look like those of the package, which is not there in most environments."""
    for _, layer in linears(model):
        layer.register_buffer("codebooks", torch.zeros(1))


@pytest.mark.parametrize(
    ("keys", "device", "message"),
    [({}, CPU, r"on a CPU(.|\n)*a GPU"), ({"dora": True}, torch.device("cuda"), r"method\.dora=false")],
)
def test_what_aqlm_cannot_do(
    keys: dict[str, Any], device: torch.device, message: str, tiny_llama: PreTrainedModel
) -> None:
    over_aqlm(tiny_llama)
    method = build_method(QLoraOptions(base="checkpoint", **keys))
    with pytest.raises(ModelError, match=message):
        method.prepare(tiny_llama, compute_dtype=torch.float32, device=device)


def test_adapters_are_not_merged_into_aqlm(tiny_llama: PreTrainedModel) -> None:
    over_aqlm(tiny_llama)
    method = build_method(QLoraOptions(base="checkpoint"))
    model = method.prepare(tiny_llama, compute_dtype=torch.float32, device=CPU, restoring=True)
    assert "14 layers, AQLM" in method.lines(model)[1]
    with pytest.raises(ExportError, match=r"14 layers hold AQLM(.|\n)*export\.format=adapter"):
        method.deployed(model, dtype=torch.float32)
