"""What gsocketpool costs, side by side with its peers: ``python -m benchmarks``.

README.rst, next to this file, says what is measured and how, and holds the tables.
"""
