"""Artifacts in W&B, written offline: base -> what was trained -> export, references where no upload was asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger
from wandb.proto.wandb_internal_pb2 import ArtifactRecord, Record

from qtrain.cli import main
from qtrain.config.schema import Config
from qtrain.export.config import ExportSection
from qtrain.methods.qlora.config import QLoraOptions
from qtrain.training.lineage import log_export, log_trained, use_base
from qtrain.training.run_directory import RunDirectory
from qtrain.training.tracking import close, export_loggers, loggers

Artifacts = Callable[[Path], list[ArtifactRecord]]


def config(**wandb_keys: Any) -> Config:
    section = {"enabled": True, **wandb_keys}
    return Config(method=QLoraOptions(), export=ExportSection(), wandb=section, run={"name": "a run/1"})  # type: ignore[arg-type]


def entries(artifact: ArtifactRecord) -> dict[str, tuple[bool, str]]:
    """Path in the artifact to whether it is a reference, and the digest."""
    return {entry.path: (bool(entry.ref), entry.digest) for entry in artifact.manifest.contents}


@pytest.fixture
def trained(tmp_path: Path) -> RunDirectory:
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"adapter")
    export = tmp_path / "run" / "export" / "compressed-tensors"
    export.mkdir(parents=True)
    (export / "model.safetensors").write_bytes(b"codes")
    (export / "config.json").write_text("{}")
    return RunDirectory(tmp_path / "run")


def tracked(run: RunDirectory, settings: Config) -> tuple[str, str]:
    """Ids of the two W&B runs: the one that trained, the one that exported."""
    opened = loggers(settings, run.path)
    use_base(settings, opened, "meta-llama/Llama-3.1-8B", "f00d")
    adapter = run.trained
    assert adapter is not None and isinstance(opened[1], WandbLogger)
    log_trained(settings, opened, adapter, "f00d", {"val_loss_after": 2.5, "recovery": None})
    first = opened[1].experiment.id
    close(opened)
    exporting, name = export_loggers(settings, run, "compressed-tensors")
    assert isinstance(exporting[0], WandbLogger)
    second = exporting[0].experiment.id
    found = {
        "directory": str(run.export("compressed-tensors")),
        "kl": 0.03,
        "candidate_perplexity": 14.9,
        "merge_loss": 0.05,
        "verified": {"passed": True},
        "notes": ["not for W&B"],
    }
    log_export(settings, exporting, adapter, name, "f00d", found)
    close(exporting)
    wandb.teardown()  # the service writes the files out when it ends
    return first, second


def test_from_the_base_to_the_export(
    fresh_wandb: pytest.MonkeyPatch,
    trained: RunDirectory,
    wandb_artifacts: Artifacts,
    wandb_records: Callable[[Path], list[Record]],
) -> None:
    fresh_wandb.setenv("WANDB_MODE", "offline")
    first, second = tracked(trained, config())
    assert first != second
    (fit,) = trained.path.glob(f"wandb/offline-run-*-{first}/*.wandb")
    (export,) = trained.path.glob(f"wandb/offline-run-*-{second}/*.wandb")
    run = next(record.run for record in wandb_records(export) if record.WhichOneof("record_type") == "run")
    assert (run.display_name, run.run_group, run.job_type) == ("a run/1-compressed-tensors", "a run/1", "export")

    base, adapter = wandb_artifacts(fit)
    assert (base.name, base.use_after_commit) == ("base-meta-llama-Llama-3.1-8B", True)
    assert json.loads(base.metadata) == {"path": "meta-llama/Llama-3.1-8B", "fingerprint": "f00d"}
    assert list(entries(base)) == ["base.json"]
    assert (adapter.name, adapter.use_after_commit) == ("a-run-1-adapter", False)
    assert json.loads(adapter.metadata) == {"method": "qlora", "base_fingerprint": "f00d", "val_loss_after": 2.5}
    assert [ref for ref, _ in entries(adapter).values()] == [False]  # its files are uploaded

    used, exported = wandb_artifacts(export)
    assert (used.name, used.digest, used.use_after_commit) == ("a-run-1-adapter", adapter.digest, True)
    assert (exported.name, exported.use_after_commit) == ("a-run-1-compressed-tensors", False)
    assert {path: ref for path, (ref, _) in entries(exported).items()} == {
        "config.json": True,
        "model.safetensors": True,
    }
    metadata = json.loads(exported.metadata)
    hashed = {"model.safetensors": hashlib.sha256(b"codes").hexdigest()}
    assert metadata.pop("sha256") == hashed
    assert metadata.pop("codes_sha256") == hashlib.sha256(json.dumps(hashed).encode()).hexdigest()
    assert metadata == {
        "format": "compressed-tensors",
        "method": "qlora",
        "base_fingerprint": "f00d",
        "verified": True,
        "candidate_perplexity": 14.9,
        "kl": 0.03,
        "merge_loss": 0.05,
    }


def test_what_is_asked_for_is_uploaded_and_the_base_is_known_by_its_fingerprint(
    fresh_wandb: pytest.MonkeyPatch, tmp_path: Path, trained: RunDirectory, wandb_artifacts: Artifacts
) -> None:
    fresh_wandb.setenv("WANDB_MODE", "offline")
    found = {}
    for name, fingerprint, upload in (("a", "f00d", []), ("b", "f00d", []), ("c", "cafe", ["base"])):
        weights = tmp_path / name / "model"
        weights.mkdir(parents=True)
        (weights / "model.safetensors").write_bytes(b"base")
        settings = config(upload=upload)
        run = RunDirectory(tmp_path / name)
        opened = loggers(settings, run.path)
        use_base(settings, opened, str(weights), fingerprint)
        assert trained.trained is not None
        log_trained(settings, opened, trained.trained, fingerprint, {})
        close(opened)
        wandb.teardown()
        (file,) = run.path.glob("wandb/offline-run-*/*.wandb")
        found[name] = wandb_artifacts(file)
    assert found["a"][0].digest == found["b"][0].digest != found["c"][0].digest
    assert set(entries(found["c"][0])) == {"base.json", "model.safetensors"}
    assert [ref for ref, _ in entries(found["a"][1]).values()] == [True]


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_without_artifacts_or_without_wandb_nothing_is_logged(
    fresh_wandb: pytest.MonkeyPatch, trained: RunDirectory, wandb_artifacts: Artifacts, mode: str
) -> None:
    fresh_wandb.setenv("WANDB_MODE", mode)
    tracked(trained, config(artifacts=mode == "disabled"))
    for file in trained.path.glob("wandb/offline-run-*/*.wandb"):
        assert wandb_artifacts(file) == []


def test_what_wandb_refuses_costs_no_run(
    fresh_wandb: pytest.MonkeyPatch, trained: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    fresh_wandb.setenv("WANDB_MODE", "offline")
    settings = config()
    opened = loggers(settings, trained.path)

    def refuse(*args: Any, **keys: Any) -> None:
        raise wandb.errors.CommError("no such project\nmore")

    fresh_wandb.setattr(wandb.Run, "log_artifact", refuse)
    assert trained.trained is not None
    log_trained(settings, opened, trained.trained, "f00d", {})
    close(opened)
    assert "W&B took no artifact: no such project" in caplog.text and "more" not in caplog.text


def test_the_commands_leave_the_whole_chain(
    fresh_wandb: pytest.MonkeyPatch, tiny_llama_dir: Path, tmp_path: Path, wandb_artifacts: Artifacts
) -> None:
    fresh_wandb.setenv("WANDB_MODE", "offline")
    fresh_wandb.chdir(tmp_path)
    Path("notes.txt").write_text("The dog sleeps on.\n" * 40)
    words = [f"model.path={tiny_llama_dir}", "data.train=notes.txt", "data.validation=notes.txt", "data.max_length=32"]
    assert main(["fit", *words, "method.name=qlora", "trainer.max_steps=2", "wandb.enabled=true", "run.name=n"]) == 0
    assert main(["export", "run.dir=runs/n", "export.group_size=32"]) == 0
    wandb.teardown()
    fit, export = sorted(
        (wandb_artifacts(file) for file in Path("runs/n").glob("wandb/offline-run-*/*.wandb")),
        key=lambda found: not found[0].name.startswith("base-"),
    )
    assert [artifact.use_after_commit for artifact in (*fit, *export)] == [True, False, True, False]
    assert fit[1].digest == export[0].digest and export[1].name == "n-compressed-tensors"
    metadata = json.loads(export[1].metadata)
    assert metadata["verified"] and metadata["kl"] > 0 and metadata["merge_loss"] is not None
    assert metadata["base_fingerprint"] == json.loads(fit[0].metadata)["fingerprint"]
    recorded = json.loads(Path("runs/n/export.json").read_text())["compressed-tensors"]
    assert recorded["merge_loss"] == recorded["candidate_perplexity"] / recorded["reference_perplexity"] - 1
