"""What pictures of results are drawn with: palette, themes, rows of panels, axes, contact sheet, PNG."""
