"""The paper's claims, each with an estimate, its interval, a threshold and a verdict."""
