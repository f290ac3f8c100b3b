"""What the plots share: colours, axes and units."""

from __future__ import annotations

from typing import Any

from implementations import OURS, REFERENCE
from matplotlib.axes import Axes

# From the Okabe-Ito palette, which is safe for the colour-blind. Marker shapes differ as well.
BLUE, VERMILION, SKY_BLUE, BLACK = "#0072B2", "#D55E00", "#56B4E9", "#000000"
STYLES: dict[str, dict[str, Any]] = {
    REFERENCE: {"color": VERMILION, "marker": "s", "label": "torch.nn.utils"},
    OURS: {"color": BLUE, "marker": "o", "label": "gradclip_ext"},
}


def finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def microseconds(value: float, _: object) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g} s"
    return f"{value / 1e3:g} ms" if value >= 1e3 else f"{value:g} µs"
