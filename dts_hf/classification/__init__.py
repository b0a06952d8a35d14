"""Distillation of sequence classifiers on the road of language models: N examples, states = logits, identity head."""
