"""The recipe: what a person writes, how it is read and checked, and the words for what is wrong with it."""
