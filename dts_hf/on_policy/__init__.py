"""The student's own text in training (GKD, arXiv 2306.13649): when it answers, how, and the rows that its answers make."""
