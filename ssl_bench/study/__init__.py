"""Many runs: a grid or a search of recipes, expanded into cells and run on this machine or on a cluster."""
