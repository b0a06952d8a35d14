"""Training: what Hugging Face's Trainer lacks, ``DistillationTrainer``, its callbacks, and exact resume."""
