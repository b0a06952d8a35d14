"""Teachers: where the final states ``[N, H_t]`` and the ``Head`` of a teacher come from."""
