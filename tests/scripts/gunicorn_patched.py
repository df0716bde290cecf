"""The same settings, for a master that patches the standard library before anything else happens in it."""

from gevent import monkey

monkey.patch_all()

import runpy
from pathlib import Path

globals().update(runpy.run_path(str(Path(__file__).parent / "gunicorn_watched.py")))
