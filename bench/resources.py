"""``python -m bench.resources``: see ``bench.static.resources``."""

from bench.static.resources import main

raise SystemExit(main())
