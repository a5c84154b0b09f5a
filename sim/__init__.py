"""Hosts, networks, plans, and the simulator that predicts a cold start. Needs no torch except in `trace` and `models`."""
