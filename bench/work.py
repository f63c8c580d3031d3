"""``python -m bench.work``: see ``bench.static.work``."""

from bench.static.work import main

raise SystemExit(main())
