"""The picture: training loss and error rate over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

INK, BLUE, ORANGE = "#222222", "#1f5fa8", "#c2571a"


def plot_curves(path: Path, losses: Sequence[float], rates: Mapping[int, float], *, base: float, tuned: float) -> None:
    """`rates`: optimizer step -> error rate on the validation words; `base`, `tuned`: on the held-out ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot(range(1, len(losses) + 1), losses, color=BLUE, alpha=0.3, linewidth=1)
    left.plot(*_smooth(losses), color=BLUE, linewidth=2)
    left.set(xlabel="optimizer step", ylabel="training loss (nats per phoneme token)", title="Loss")
    left.set_ylim(0, min(max(losses), 4.0))

    right.plot(list(rates), [100 * rate for rate in rates.values()], color=ORANGE, marker="o", linewidth=2)
    right.set(xlabel="optimizer step", ylabel="phoneme error rate, %", title="Error on words never trained on")
    right.set_yscale("log")
    right.annotate(
        f"{100 * tuned:.1f}% on the 300 held-out words\n(before: {100 * base:.0f}%)",
        xy=(0.97, 0.95),
        xycoords="axes fraction",
        ha="right",
        va="top",
        color=INK,
    )
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _smooth(values: Sequence[float], window: int = 10) -> tuple[list[int], list[float]]:
    means = [sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))]
    return list(range(1, len(values) + 1)), means
