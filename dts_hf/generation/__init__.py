"""Text from a model: the engine that generates it, how prompts are shared out, and answers kept while they are made."""
