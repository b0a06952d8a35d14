"""The Hub: which files leave the machine (``staging``), how they get there (``push``) and back (``pull``)."""
