"""REFRAG in other stacks: each module needs its stack only when it is used."""
