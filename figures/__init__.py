"""What pictures of results are drawn with: palette, axes, contact sheet, PNG."""
