"What Sphinx is told; tools/website.py calls it with the copies of the chapters."
import datetime
from pathlib import Path

from docutils import nodes

project = "iddpm_nb"
author = "The iddpm_nb authors"
copyright = f"{datetime.date.today().year}, {author}"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_inline", "attrs_block"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
html_theme = "sphinx_book_theme"
html_title = "iddpm_nb"
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css", "playground.css"]
html_copy_source = html_show_sourcelink = False
html_show_search_summary = False                # it would be fetched, which a disk does not allow
html_context = {"default_mode": "auto"}
html_favicon = str(Path(__file__).parent / "static" / "icon.svg")
html_theme_options = {
    "navbar_persistent": [], "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "use_download_button": False, "use_fullscreen_button": False, "use_issues_button": False,
    "use_repository_button": True, "show_toc_level": 2, "show_navbar_depth": 1,
    "navigation_with_keys": False, "toc_title": "On this page",
}
# numbers of equations are the paper's own, given by \tag
math_numfig = smartquotes = False
# \\color{crimson}{v} colours v alone, as in a notebook
mathjax3_config = {"tex": {"autoload": {"color": [], "colorv2": ["color"]}}}


def whole(app, doctree):
    r"Displayed mathematics as written: Sphinx would put what has lines into `split`, without \tag."
    for node in doctree.findall(nodes.math_block):
        if "\\\\" in node.astext() and not node.get("no-wrap"):
            text = f"\\[{node.astext()}\\]"
            node.children = [nodes.Text(text)]
            node["no-wrap"] = node["nowrap"] = True


def aside(app):
    "Pictures of chapters go where the doctrees are, not beside the site."
    folder = Path(app.doctreedir).parent / "outputs"
    app.env.mystnb_config = app.env.mystnb_config.copy(output_folder=str(folder))


def setup(app):
    app.connect("builder-inited", aside, priority=900)
    # it only copies files at the end, and does not say so
    app.extensions["sphinx-mathjax-offline"].parallel_read_safe = True
    app.connect("doctree-read", whole)
