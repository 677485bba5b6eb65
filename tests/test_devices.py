"""A card that torch was not built for is told of, once."""

import logging

import pytest
import torch

from lowvram import devices
from lowvram.devices import choose_device
from lowvram.memory import capacity
from lowvram.processes import StageProcesses


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An NVIDIA card, and a torch for CPUs."""
    monkeypatch.setattr(capacity, "nvml_names", lambda: ["NVIDIA GeForce RTX 3060"])
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    devices._warn_of_unseen_card.cache_clear()


@pytest.mark.usefixtures("unseen")
def test_it_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_device("cpu", warns=True) == choose_device("auto") == torch.device("cpu")
    assert caplog.messages == []  # as was asked, and where nothing is computed
    for _ in range(2):
        choose_device("auto", warns=True)
    [told] = caplog.messages
    assert told.startswith("NVIDIA GeForce RTX 3060 is here, but torch ")
    assert told.endswith(" is a build for CPUs: install the one for the card")


@pytest.mark.usefixtures("unseen")
def test_a_build_for_the_card_is_not_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    choose_device("auto", warns=True)
    assert caplog.messages == []


def test_stages_in_processes_of_their_own_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    processes = StageProcesses()
    for _ in range(3):
        processes._log(logging.WARNING, "a card is here")
        processes._log(logging.INFO, "denoise on cpu")
    assert caplog.messages == ["a card is here", *["denoise on cpu"] * 3]
