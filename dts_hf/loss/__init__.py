"""The loss: which rows count, the walk over their logits, and the sums that are logged."""
