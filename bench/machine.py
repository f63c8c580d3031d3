"""``python -m bench.machine``: see ``bench.engine.machine``."""

from bench.engine.machine import main

raise SystemExit(main())
