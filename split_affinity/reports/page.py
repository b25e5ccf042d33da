"""Pages of HTML: one file with style, script and pictures in it, and all text in it escaped."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from split_affinity.errors import UserError, one_line
from split_affinity.text import percent, plural, shown

if TYPE_CHECKING:
    import jinja2
    from PIL import Image

SURVEY_PAGE = "data.html"  # of the command data
SMALL_PX = 64  # of pictures whose every pixel counts


@dataclass(frozen=True)
class Finding:
    """A heading, and what was found with its figures; `to_do` is empty if nothing needs doing."""

    title: str
    figures: str
    to_do: str = ""


def data_uri(picture: Image.Image) -> str:
    """A picture inside a text; small ones unchanged."""
    kind = "PNG" if max(picture.size) <= SMALL_PX else "JPEG"
    file = io.BytesIO()
    picture.save(file, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def sha256_source(script: str) -> str:
    """A script's hash, as a content security policy names the scripts that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def visible(value: Any) -> Any:
    """What is put into a page: of text, which can be anybody's, nothing is unseen. Pictures, and
    what the template makes itself, stay as they are.
    """
    if isinstance(value, Path):
        value = str(value)
    is_foreign = type(value) is str and not value.startswith("data:image/")
    return shown(value) if is_foreign else value


def read_template(package: str, name: str) -> str | None:
    """A package's template, also from a .pyz file; None if there is none of that name."""
    try:
        return resources.files(package).joinpath(name).read_text("utf-8")
    except FileNotFoundError:
        return None


def page_template(name: str, place: str | Path) -> jinja2.Template:
    """The template of a page that extends page.html.jinja, in a package or a folder.

    Every value that it names has to be there. Raises UserError without Jinja2.
    """
    try:
        import jinja2  # here, since training needs none
    except ImportError as error:
        needed = "pages need Jinja2: pip install jinja2"
        raise UserError(f"{needed} ({one_line(error)})") from None

    if isinstance(place, Path):
        own = jinja2.FileSystemLoader(place)
    else:
        own = jinja2.FunctionLoader(partial(read_template, place))
    shared = jinja2.FunctionLoader(partial(read_template, __package__))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([shared, own]),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "plural": plural, "sha256_source": sha256_source}
    return environment.get_template(name)
