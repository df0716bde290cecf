"""``python -m gsocketpool``: a pool at work, what it does when its borrowers are killed, and how large it should be."""

from __future__ import annotations

import sys

import gevent

try:
    from gsocketpool.cli.main import main
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("click", "rich"):
        raise
    sys.exit(
        f"python -m gsocketpool needs click and rich, and {missing} is not there. "
        'Install them with:\n    pip install "gsocketpool[cli]"'
    )

if __name__ == "__main__":
    # Ctrl-C while the hub runs: click says "Aborted!", and the hub need not say more.
    hub = gevent.get_hub()
    hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)
    main(prog_name="python -m gsocketpool")
