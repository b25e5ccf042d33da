"""Pages of HTML: what stands around their content, and text in them that may be anybody's.

Run: python -m pytest tests/reports/test_page.py
"""

import importlib
import re
import sys
import zipfile

import jinja2
import pytest
from PIL import Image

from split_affinity.errors import UserError
from split_affinity.reports import page

PAGE = """{% extends "page.html.jinja" %}
{% block title %}{{ name }}{% endblock %}
{% block style %}.own { color: red; }{% endblock %}
{% block content %}<p title="{{ name }}">{{ share|percent }} of {{ 2|plural("image") }}</p>
<img src="{{ picture }}" alt="">{% endblock %}
"""


@pytest.fixture
def template(tmp_path):
    tmp_path.joinpath("own.html.jinja").write_text(PAGE)
    return page.page_template("own.html.jinja", tmp_path)


def test_a_page_is_its_content_in_the_looks_of_all(template):
    picture = page.data_uri(Image.new("RGB", (8, 8)))
    html = template.render(name='</title>"\u202e', share=0.5, picture=picture)
    assert html.startswith("<!DOCTYPE html>") and html.endswith("</html>")
    assert "<title>&lt;/title&gt;&#34;\\u202e</title>" in html
    assert '<p title="&lt;/title&gt;&#34;\\u202e">50.0\u00a0% of 2 images</p>' in html
    assert html.index("main {") < html.index(".own {") < html.index("</style>")
    assert f'<img src="{picture}" alt="">' in html
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert f"script-src '{page.sha256_source(script)}'" in html
    assert not re.search(r"(?:src|href)=.http", html)


def test_what_a_page_names_has_to_be_there(template):
    with pytest.raises(jinja2.UndefinedError, match="picture"):
        template.render(name="a", share=0.5)


@pytest.mark.parametrize(("size", "kind"), [(64, "png"), (65, "jpeg")])
def test_the_pixels_of_small_pictures_stay(size, kind):
    assert page.data_uri(Image.new("RGB", (size, 9))).startswith(f"data:image/{kind};base64,")


def test_templates_are_found_in_one_file(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "one.pyz", "w") as one:
        one.writestr("in_one_file/__init__.py", "")
        for name in ("page.py", "page.html.jinja"):
            one.write(page.__file__.replace("page.py", name), f"in_one_file/{name}")
    monkeypatch.syspath_prepend(str(tmp_path / "one.pyz"))
    inside = importlib.import_module("in_one_file.page")
    assert inside.read_template("in_one_file", "page.html.jinja") == page.read_template(
        page.__package__, "page.html.jinja"
    )
    assert inside.read_template("in_one_file", "other.html.jinja") is None


def test_without_jinja_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match="^pages need Jinja2: pip install jinja2 ") as caught:
        page.page_template("page.html.jinja", page.__package__)
    assert "\n" not in str(caught.value)
