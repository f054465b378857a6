"""Colours of a figure, on light paper and on dark."""

from dataclasses import dataclass

from ..errors import UserError
from .palette import ALARM, COLORS, FAINT, INK


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; those of lines are the four of Okabe and Ito's that stand out most from the paper."""

    paper: str
    ink: str
    faint: str
    grid: str
    alarm: str
    lines: tuple[str, str, str, str]


THEMES = {
    "light": Theme("#ffffff", INK, FAINT, "#e6e6e6", ALARM, (COLORS[0], COLORS[3], COLORS[1], COLORS[4])),
    "dark": Theme("#353535", "#eeeeee", "#bdbdbd", "#505050", "#ffb4ab", (COLORS[5], COLORS[2], COLORS[1], COLORS[4])),
}


def theme_of(name: str) -> Theme:
    """The theme of a name, "light" or "dark".

    Raises:
        UserError: another name.
    """
    if name not in THEMES:
        raise UserError(f"theme must be one of {', '.join(THEMES)}, not {name!r}")
    return THEMES[name]
