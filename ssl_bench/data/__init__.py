"""From files to uint8 images and labels, drawn by a pure function of (seed, step).

`dataset.load_dataset` opens every data set, `raw` is the interface that a data set of one's own implements.
"""
