"""A figure of rows below each other, each of one or two panels, with headings and legends in between.

Such figures belong to no window and leave pyplot alone.  They are 900 pixels wide; at the 400 of a node their smallest
text is still 8 pixels high.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from .numbers import number
from .themes import Theme

WIDTH, DPI = 6, 150  # inches, and 900 pixels
TEXT, HEADING = 9, 10.5  # points; 9 are 8 pixels where the figure is shown 400 wide


@dataclass(frozen=True)
class Row:
    """A row of one or two panels.

    Attributes:
        height: height in inches, labels included.
        draw: called with the axes of the panels.
        columns: number of panels, 1 or 2.
    """

    height: float
    draw: Callable[..., None]
    columns: int = 1


def stack(rows: Sequence[Row], look: Theme) -> Figure:
    """A figure of rows, from top to bottom."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, hspace=0, wspace=0.02)
    figure = Figure((WIDTH, sum(row.height for row in rows)), dpi=DPI, facecolor=look.paper, layout=layout)
    grid = figure.add_gridspec(len(rows), 2, height_ratios=[row.height for row in rows])
    for i, row in enumerate(rows):
        places = [grid[i, :]] if row.columns == 1 else [grid[i, 0], grid[i, 1]]
        row.draw(*(_styled(figure.add_subplot(place), look) for place in places))
    return figure


def _styled(axes: Axes, look: Theme) -> Axes:
    axes.set_facecolor(look.paper)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set(color=look.faint, linewidth=0.8)
    axes.tick_params(colors=look.faint, labelsize=TEXT, labelcolor=look.ink, length=3)
    axes.grid(axis="y", color=look.grid, lw=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    return axes


def headline(sentence: str, look: Theme, alarm: bool = False) -> Row:
    """A sentence: what stands before its first colon in bold, the evidence after it below."""
    claim, _, evidence = sentence.partition(": ")
    claim, evidence = wrapped(claim[0].upper() + claim[1:], 54), wrapped(evidence, 74)
    below = 15 * (1 + claim.count("\n")) + 3
    height = below + (13 * (1 + evidence.count("\n")) if evidence else 0)

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        text_below(axes, claim, 0, fontsize=11.5, weight="bold", color=look.ink)
        text_below(axes, evidence, below, fontsize=9.5, color=look.alarm if alarm else look.ink)

    return Row(height / 72 + 0.1, draw)


def heading(title: str, note: str, handles: Sequence, look: Theme) -> Row:
    """Title, note and legend of the rows that follow."""
    note = wrapped(note, 74)
    below = 18 + (11.5 * (note.count("\n") + 1) + 4 if note else 0)

    def draw(axes: Axes) -> None:
        axes.set_axis_off()
        text_below(axes, title, 0, fontsize=HEADING, weight="bold", color=look.ink)
        text_below(axes, note, 18, fontsize=TEXT, color=look.faint)
        if handles:
            legend(axes, handles, look, down=below, ncols=3)

    return Row((below + (14 if handles else 0)) / 72, draw)


def wrapped(text: str, characters: int) -> str:
    """Text in lines of at most ``characters``, never broken at a hyphen."""
    return textwrap.fill(text, characters, break_on_hyphens=False)


def text_below(axes: Axes, text: str, down: float, **style) -> None:
    """Write text at the left, ``down`` points below the top of the axes."""
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "linespacing": 1.2}
    axes.annotate(text, (0, 1), (0, -down), **place, **style)


def legend(axes: Axes, handles: Sequence, look: Theme, down: float, ncols: int = 1) -> None:
    """Draw a legend at the left, ``down`` points below the top of the axes."""
    place = axes.transAxes + ScaledTranslation(0, -down / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 1), bbox_transform=place, ncols=ncols, frameon=False,
        fontsize=TEXT, labelcolor=look.ink, borderaxespad=0, borderpad=0, handlelength=2.2, handletextpad=0.5,
        columnspacing=1.3,
    )  # fmt: skip


def panel_title(axes: Axes, text: str, color: str, pad: float = 4) -> None:
    """Set the title of a panel, at its left."""
    axes.set_title(text, fontsize=TEXT, color=color, loc="left", pad=pad)
