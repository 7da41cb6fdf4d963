"""The event-driven simulation of one pipeline."""
