"""Data sets made ready to train and score on: ``dts-hf prepare NAME``, one module a set."""
