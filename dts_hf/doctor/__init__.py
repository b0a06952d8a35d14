"""``dts-hf doctor``: what would go wrong with a recipe, before an hour of a GPU is spent.

Start reading in ``run.py``. ``estimate.py`` and ``shapes.py`` load no model and can be used alone.
"""
