"""Thin adapters to trainers; nothing here is imported until asked for."""
