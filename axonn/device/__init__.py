"""Devices that ranks compute on: assignment, streams and events, page-locked memory, compiled functions."""
