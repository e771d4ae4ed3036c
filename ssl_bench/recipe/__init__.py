"""From a command line to one checked `Recipe`: every choice that makes up a run."""
