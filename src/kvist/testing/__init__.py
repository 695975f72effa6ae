"""Conformance suites and fakes that kvist ships: subclass one to test your own class. Needs pytest, hypothesis."""
