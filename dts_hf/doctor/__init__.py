"""``dts-hf doctor``: what would go wrong with a recipe, before an hour of a GPU is spent. Start reading in ``run.py``.

It calls the stages of ``distill`` and judges what comes out of them; ``training/memory_estimate.py`` estimates memory.
"""
