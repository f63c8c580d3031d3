"""Commands of ``refrag``, one module each."""
