"""Weights: the catalogue, what a name means, reading and writing files, the Hub."""
