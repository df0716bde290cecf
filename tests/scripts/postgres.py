"""Pools of psycopg connections under greenlets, one scenario for each run: ``python postgres.py RUNTIME SCENARIO DSN``.

It prints nothing and exits 0 if all is well.
"""

import sys

from tests import patched

patched.by(sys.argv[1])

import psycopg

from tests.conformance.harness import make
from tests.conformance.postgres import SCENARIOS, Observer

if __name__ == "__main__":
    rt = make(sys.argv[1])
    with psycopg.connect(sys.argv[3], autocommit=True, application_name="asking") as conn:
        rt.run(SCENARIOS[sys.argv[2]](rt, sys.argv[3], Observer(rt, conn)))
