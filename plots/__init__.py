"""Figures and the report, drawn from records."""
