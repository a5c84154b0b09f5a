"""Measure a host: identity, links, costs and layers, with their spread and where each figure comes from."""
