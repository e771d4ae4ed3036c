"""Tables, figures, statistics, checked claims and one self-contained web page from the records of runs."""
