"""The site. Its source folder is the root of the repository, so that a link between two of the
repository's pages means the same in the site, on a code host and in an editor.

    sphinx-build -W --keep-going -n -E -c docs . build/docs
"""

import importlib.metadata
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for our own extensions
os.environ["COLUMNS"] = "88"  # argparse's width of help, and rich's
os.environ["OMP_WAIT_POLICY"] = "passive"  # so that a busy machine does not slow the notebook

project = "gpt_ext"
version = release = importlib.metadata.version("gpt-ext")
copyright = "the authors of gpt_ext, Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_help",
    "source_pages",
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "benchmarks/*.md"]
exclude_patterns = [".*", "build", "**/__pycache__", "csrc", "gpt_ext", "tests", "runs", "dist"]

default_role = "code"  # docstrings say `name`, as Markdown does
highlight_language = "none"
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# No inventory is fetched: names of torch and of the standard library are no links.
nitpick_ignore_regex = [("py:.*", r"(?!gpt_ext).*")]

templates_path = ["_templates"]
html_additional_pages = {"index": "to_docs.html"}
html_theme = "furo"
html_title = "gpt_ext"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
