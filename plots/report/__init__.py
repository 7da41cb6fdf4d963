"""results/report.html: all figures, tables and evidence on one page."""
