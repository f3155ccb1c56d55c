"""The only files that import other libraries' internals: one file or folder per library."""
