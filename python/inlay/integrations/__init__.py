"""The only files that import other libraries' internals: one per library."""
