"""`python -m lmcache_native.cli` where the script is not installed."""

from lmcache_native.cli import main

raise SystemExit(main())
