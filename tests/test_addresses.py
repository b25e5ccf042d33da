"""Addresses lose their logins wherever they are shown or saved.

Run: python -m pytest tests/test_addresses.py
"""

import pytest
from processes import run_script
from small import TINY

from split_affinity.options.settings import Settings, as_options, plain_settings
from split_affinity.text import without_login, without_logins


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://me:secret@host/dir", "ftp://host/dir"),
        ("ftp://me:secret@host:2121/dir", "ftp://host:2121/dir"),
        ("sftp://me@host/dir", "sftp://host/dir"),
        ("https://token@host/a@b", "https://host/a@b"),
        ("ftp://me:p@ss@host/dir", "ftp://host/dir"),
        ("ftp://me:se/cr?et@host/dir", "ftp://host/dir"),
        ("ftp://me:my secret@host/my dir", "ftp://host/my dir"),
        ("ftp://me:a::b@host/dir", "ftp://host/dir"),
        ("https://host/dir?sig=secret&se=2030", "https://host/dir?..."),
        ("https://me:secret@[::1]:80/dir?X-Amz-Signature=secret", "https://[::1]:80/dir?..."),
        ("simplecache::s3://key:secret@bucket/run", "simplecache::s3://bucket/run"),
        ("zip://a.zip::ftp://me:secret@host/b", "zip://a.zip::ftp://host/b"),
        ("abfs://container@account.dfs.core.windows.net/run",) * 2,
        ("abfs://me:secret@account.dfs.core.windows.net/run",)
        + ("abfs://account.dfs.core.windows.net/run",),
        ("s3://arn:aws:s3:us-west-2:123:accesspoint/name",) * 2,
        ("s3://bucket/epoch@3",) * 2,
        ("/home/me@work/what?",) * 2,
        ("--mirror=ftp://me:secret@host", "--mirror=ftp://host"),
        ("",) * 2,
    ],
)
def test_an_address_without_its_login(url, shown):
    assert without_login(url) == shown


def test_addresses_in_a_text():
    text = "403, url='https://host/x?sig=secret', then ftp://me:secret@host: refused"
    assert "secret" not in without_logins(text)
    assert without_logins(text).startswith("403, url='https://host/x?...")
    assert without_logins(text).endswith(" then ftp://host: refused")


def test_settings_as_text_have_no_login():
    settings = Settings(mirror="ftp://me:secret@host/dir", pictures=("http://a/b?token=secret",))
    assert plain_settings(settings)["mirror"] == "ftp://host/dir"
    assert as_options(settings) == "--mirror ftp://host/dir --pictures 'http://a/b?...'"


@pytest.mark.slow
def test_no_file_and_no_line_of_a_run_has_the_login(in_tmp):
    """The checkpoint too, which may be given away. Nobody listens at port 9."""
    url = "ftp://somebody:s3cr3t@127.0.0.1:9/far"
    done = run_script(*TINY, "--steps", "1", "--output-dir", "out", "--mirror", url)
    assert done.returncode == 0, done.stderr
    assert "--mirror ftp://127.0.0.1:9/far" in done.stdout
    assert "last.pt not copied in 3 attempts: " in done.stderr
    files = [path.read_bytes() for path in in_tmp.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for secret in ("somebody", "s3cr3t"):
        assert secret not in done.stdout + done.stderr
        assert not any(secret.encode() in data for data in files)


@pytest.mark.parametrize("flag", ["--mirrr", "--split", "plan"])
def test_nor_has_an_error(in_tmp, flag):
    url = "ftp://somebody:s3cr3t@127.0.0.1:9/far"
    words = [url, "plan"] if flag == "plan" else [flag, url]
    done = run_script(*words)
    assert done.returncode == 2
    assert "ftp://127.0.0.1:9/far" in done.stderr
    assert "s3cr3t" not in done.stderr
