"""The commands of ``refrag``, one module each."""
