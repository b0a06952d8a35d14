"""Where the teacher's final states come from. Every teacher returns states ``[N, H_t]`` and a ``Head``."""

from dts_hf.teachers.base import Teacher
from dts_hf.teachers.live import LiveTeacher
from dts_hf.teachers.none import NoTeacher

__all__ = ["LiveTeacher", "NoTeacher", "Teacher"]
