"""Predicted time and memory of the speed benchmark's methods on chips that are not here, beside what was measured."""
