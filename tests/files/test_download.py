import io
import urllib.request

import pytest

from jaxgpt.files import download


class Response(io.BytesIO):
    """What a server answers."""

    def __init__(self, content, announced):
        super().__init__(content)
        self.headers = {} if announced is None else {"Content-Length": announced}


@pytest.mark.parametrize(("announced", "arrives"), [("9", True), (None, True), ("many", True), ("10", False)])
def test_a_download_is_read_in_parts_and_one_that_breaks_off_is_an_error(tmp_path, monkeypatch, announced, arrives):
    monkeypatch.setattr(download, "CHUNK", 4)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Response(b"Citizens.", announced))
    target = tmp_path / "text.txt"
    if arrives:
        download.url_download(target, "https://example.org/text.txt", "the text", "name another")
        assert target.read_bytes() == b"Citizens."
    else:
        with pytest.raises(download.DownloadError, match=r"cannot download the text .*9 bytes read.*: name another"):
            download.url_download(target, "https://example.org/text.txt", "the text", "name another")
        assert not target.exists()
