"""What a run leaves on disk, in files that are whole or absent."""
