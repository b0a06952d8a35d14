"""Several runs together: how sure a difference between them is."""
