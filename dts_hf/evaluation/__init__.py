"""Protocols, evaluation sets, answers and their scores. ``evaluate.load`` is never called: it needs the network."""
