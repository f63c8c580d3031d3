"""From text and passages to the packed rows of a prompt, and which of its chunks stand as text."""
