"""The figure of `transformer_lm.py`: the loss and the learning rate of every step, and how calibrated the end is."""

from __future__ import annotations

import numpy as np
from _evaluation import Calibration
from matplotlib.figure import Figure

__all__ = ["figure"]

LOSS, RATE = "#1f5fa8", "#c44e52"


def figure(title: str, losses: np.ndarray, rates: np.ndarray, calibrations: dict[str, Calibration]) -> Figure:
    result = Figure(figsize=(13, 4), layout="constrained")
    loss_axis, rate_axis, calibration_axis = result.subplots(1, 3, width_ratios=(2, 1, 1))
    result.suptitle(title)

    steps = np.arange(1, len(losses) + 1)
    loss_axis.plot(steps, losses, color=LOSS, alpha=0.3, linewidth=0.8, label="each step")
    width = max(len(losses) // 50, 1)
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    loss_axis.plot(steps[width - 1 :], smooth, color=LOSS, label=f"mean of {width}")
    loss_axis.set(xlabel="steps", ylabel="training loss (nat per token)")
    loss_axis.legend(frameon=False)

    rate_axis.plot(steps, rates, color=RATE)
    rate_axis.set(xlabel="steps", ylabel="learning rate", ylim=(0, None))

    calibration_axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for (name, calibration), color in zip(calibrations.items(), (RATE, LOSS), strict=False):
        bins, label = (calibration.confidence, calibration.accuracy), f"{name}: error {calibration.error:.4f}"
        calibration_axis.plot(*bins, "o-", color=color, markersize=4, label=label)
    calibration_axis.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    calibration_axis.legend(frameon=False)

    for axis in (loss_axis, rate_axis, calibration_axis):
        axis.spines[["top", "right"]].set_visible(False)
    return result
