"""What a step needs of memory: blocks that are computed twice instead of kept, and what to do when it is not enough."""
