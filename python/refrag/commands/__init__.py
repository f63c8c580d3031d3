"""Commands of ``refrag`` that work on a prompt of one's own, one module each."""
