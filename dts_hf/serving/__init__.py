"""A teacher behind HTTP: final states for trainers on other machines (``dts-hf serve-teacher``)."""
