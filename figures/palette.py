"""Colours and markers of all figures."""

INK, FAINT, ALARM = "#222222", "#666666", "#b3261e"
# Okabe and Ito's palette, which colour-blind readers can tell apart, in the order that separates neighbours best
COLORS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
