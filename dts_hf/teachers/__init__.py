"""Where the teacher's final states come from. Every teacher returns states ``[N, H_t]`` and a ``Head``."""

from dts_hf.teachers.base import Teacher
from dts_hf.teachers.live import LiveTeacher

__all__ = ["LiveTeacher", "Teacher"]
