"""Hosts, networks, plans, and the simulator that predicts a cold start. Only what builds and traces modules needs torch."""
