"""Figures of the runs, after the paper's and beyond."""
