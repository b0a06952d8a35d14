"""Teachers with another tokenizer: bytes of tokens, which positions of two tokenisations are the same, common ids."""
