"""The process that a run lives in: collectives, CUDA graphs, random streams, signals, memory, terminal."""
