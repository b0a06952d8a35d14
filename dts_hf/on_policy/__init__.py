"""The student's own text as training rows."""
