"""Event-driven simulation of one pipeline."""
