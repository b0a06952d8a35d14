"""Several processes: how they were launched, what they tell each other, and weights that are sharded over them."""
