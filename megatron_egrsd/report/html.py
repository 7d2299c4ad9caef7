"""The templates of the pages, which escape all data."""

import base64
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def template(name: str, directory: Path = TEMPLATES) -> jinja2.Template:
    """Load a template of the package, or of `directory`; every value is HTML-escaped unless it is Markup."""
    loader = jinja2.FileSystemLoader([directory, TEMPLATES])
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def script(name: str, directory: Path = TEMPLATES) -> dict[str, str]:
    """Return a script of `directory` as variables of a template: itself, and the hash by which the page allows it."""
    text = (directory / name).read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).digest()
    return {"script": Markup(text), "script_hash": base64.b64encode(digest).decode()}
