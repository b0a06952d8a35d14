"""Rows: where they come from, their formats, the prompt around them, their tokens, and the batches made of them."""
