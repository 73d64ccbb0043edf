"""Fits Keras models: the training loop, its schedules, checkpoints and device strategies."""
