"""From uint8 images to augmented views, a whole batch in one pass."""
