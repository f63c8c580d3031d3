"""``python -m bench.roofline``: see ``bench.static.roofline``."""

from bench.static.roofline import main

raise SystemExit(main())
