from __future__ import annotations

import pytest

from qtrain.evaluation import progress as module
from qtrain.evaluation.progress import progress


def test_items_pass_unchanged_and_nothing_is_printed_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", -1.0)
    assert list(progress(range(5), "counting")) == [0, 1, 2, 3, 4]
    assert list(progress(iter("ab"), "no length")) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_the_bar_appears_once_the_loop_is_slow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress(range(3), "quick")) == [0, 1, 2]
    assert "quick" not in capsys.readouterr().err
    monkeypatch.setattr(module, "QUIET_SECONDS", -1.0)
    assert list(progress(range(3), "slow")) == [0, 1, 2]
    assert "slow" in capsys.readouterr().err
