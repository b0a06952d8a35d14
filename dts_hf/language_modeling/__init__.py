"""Language modelling as a ``Task``: rows are prompts with answers, and models are scored by the answers they generate."""
