"""Tiny models of every architecture, and what inlay makes of each."""
