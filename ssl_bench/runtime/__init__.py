"""The process a run lives in: its peers, random streams, signals, memory and terminal."""
