"""What both pages share: templates that escape all data, and a file that is whole or not there."""

from pathlib import Path

import jinja2

from megatron_egrsd.errors import RunError

TEMPLATES = Path(__file__).parent / "templates"


def template(name: str) -> jinja2.Template:
    """A template of the package; every value is HTML-escaped unless it is Markup."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def write_page(html: str, path: Path) -> None:
    """Write atomically, over an older page; RunError where that fails."""
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(html, encoding="utf-8")
        temporary.rename(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None
