"""Planning (`axonn plan`): the planner for a model, a module, or the points of an experiment."""
