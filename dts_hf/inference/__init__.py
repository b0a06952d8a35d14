"""A student (or any model) at work: answers to a file of prompts, and a conversation beside its teacher."""
