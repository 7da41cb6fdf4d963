"""One module per figure: `python -m plots.figures.fig6`."""
