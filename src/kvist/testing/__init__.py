"""Conformance suites, fakes, and stores that fail on purpose, which kvist ships: run the suites on your own class.

Needs pytest, hypothesis.
"""
