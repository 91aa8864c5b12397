"""The stages of an experiment that touch a model: calibrate, decompose, compress."""
