"""From a config to a model, data and a state; the train step, the optimizer, the log of a run."""
