"""Configuration: the keys that a YAML file may have, and a strict reader that names the nearest key in every error."""
