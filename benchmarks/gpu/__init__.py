"""`make bench-gpu`: whole decode steps, prompts and attention calls of 7B shapes on a GPU; see `__main__`."""
