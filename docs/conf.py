"""Sphinx's settings. Build with ``make docs``."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import gsocketpool

warnings.filterwarnings("ignore", r"\s*Eventlet is deprecated")  # which its reference has to import

project = "gsocketpool"
author = "the gsocketpool authors"
copyright = "2026, the gsocketpool authors"
release = version = gsocketpool.__version__

extensions = ["sphinx.ext.autodoc", "sphinx_design", "pool_pictures"]
exclude_patterns = ["_build"]
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
add_module_names = False

# Every name of our own must lead somewhere. Other projects' would need their inventories, from the network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!gsocketpool\.).*"),
    (r"py:.*", r"gsocketpool\.(blocking\..*|asyncio\.Lease|\w+\.[CR])"),
]

html_theme = "furo"
html_title = f"gsocketpool {release}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
