"""Every plugin of the package keeps the contract of its kind."""

import torch

from invarlock.testing import check_adapter, check_guard, check_provider

from my_plugin.custom_adapter import CustomFormatAdapter
from my_plugin.my_guard import NaNCheckGuard
from my_plugin.text_folder import TextFolder
from my_plugin.threshold_guard import ThresholdGuard


def test_nan_check():
    check_guard(NaNCheckGuard)


def test_threshold():
    def blow_up(model):
        with torch.no_grad():
            next(model.parameters()).mul_(1e6)

    check_guard(ThresholdGuard(max_magnitude=10.0), damage=blow_up)


def test_custom_format():
    # its snapshot is a state dict, which does not say what is tied
    check_adapter(CustomFormatAdapter(), ties=False)


def test_text_folder(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"Document {number}: " + "some words of text. " * 20)
    check_provider(TextFolder(folder=str(tmp_path)))
