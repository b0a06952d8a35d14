"""``dts-hf advise``: what a sample of rows says of teacher and student, and what that makes worth sweeping."""
