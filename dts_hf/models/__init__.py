"""Models: loading, pruning, adapters, the head and the vocabulary, and saving the student."""
