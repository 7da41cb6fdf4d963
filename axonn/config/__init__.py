"""What a YAML file may say, and how it is read: strict, with the line and the nearest key in every error."""
