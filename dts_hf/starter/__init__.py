"""The first recipe: what teacher and data are, and a commented file made of that. ``dts-hf init`` calls ``start``."""
