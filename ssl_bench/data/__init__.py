"""From files to uint8 images and labels, drawn by a pure function of (seed, step)."""
