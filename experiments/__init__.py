"""What figures consist of, and the commands that train, measure, predict and plan."""
