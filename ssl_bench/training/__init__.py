"""One run, step by step: what a recipe builds, the loop, and what surrounds it."""
