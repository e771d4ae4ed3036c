"""Backbones and the supervised classifier, with initial weights that depend on the seed alone."""
