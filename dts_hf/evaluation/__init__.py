"""Scores of generated text. ``evaluate.load`` is never called: it needs the network and runs local files."""
