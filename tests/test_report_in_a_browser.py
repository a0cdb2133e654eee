"""Both pages full of texts that attack, opened in Chromium beside a server that nobody may ask for anything."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stages import report
from tests.test_report import HOSTILE, QUOTES, Page, change, write, write_inputs

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")

# What loads something or runs without a click; alert(…) and https://example.com are replaced by the server's traps.
LOADING = [
    "<script src=https://example.com/a.js></script>",
    "<img srcset='https://example.com/a 2x'>",
    "<img src=https://example.com/a loading=eager>",
    "<input type=image src=https://example.com/a>",
    "<video autoplay poster=https://example.com/a src=https://example.com/b></video>",
    "<link rel=preload as=image href=https://example.com/a>",
    "<link rel=prefetch href=https://example.com/a><link rel=preconnect href=https://example.com>",
    "<iframe src=https://example.com/a></iframe>",
    "<iframe srcdoc='<script>parent.alert(30)</script><img src=https://example.com/a>'></iframe>",
    "<iframe src='data:text/html,<img src=https://example.com/a>'></iframe>",
    "<object data='data:text/html,<script>alert(31)</script>'></object>",
    "<svg><image href=https://example.com/a /><use href=https://example.com/a#x /></svg>",
    "<svg><foreignObject><img src=https://example.com/a></foreignObject></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=x onerror=alert(32)&gt;'>",
    "<div style='background:url(https://example.com/a)'>x</div>",
    "</style><style>*{background:url(https://example.com/a)}</style>",
    "</style><style>@import url(https://example.com/a);@font-face{font-family:x;src:url(https://example.com/a)}",
    "*{} body{background:url(https://example.com/a)}",
    "<table background=https://example.com/a><td>x</table>",
    "<p style='width:expression(alert(33))'>x</p>",
    "<form id=f action=https://example.com/a></form><img src=x onerror=f.submit()>",
    "<input autofocus onfocus=alert(34)><div contenteditable autofocus onfocus=alert(35)>",
    "<video src=x onerror=alert(36)></video><audio autoplay onplay=alert(37)>",
    "<style onload=alert(38)></style><div style='animation:x 1s' onanimationstart=alert(39)>",
    "\"><script>alert(40)</script>",
    "'><script>alert(41)</script>",
    "--!><script>alert(42)</script>",
    "</pre></td></table></article></details><script>alert(43)</script>",
    "</svg><script>alert(44)</script>",
    "</noscript></xmp></plaintext><script>alert(45)</script>",
    "\ufffd\ufeff<script>alert(46)</script>",
    "\u2066\u202e<img src=x onerror=alert(47)>\u2069",
    "+ADw-script+AD4-alert(48)+ADw-/script+AD4-",
    "&#60;script&#62;alert(49)&#60;/script&#62; &lt;img src=x onerror=alert(50)&gt;",
    "{% include 'page.html.jinja' %}{{ cycler.__init__.__globals__ }}",
    "<meta http-equiv=Content-Security-Policy content=\"default-src *\"><script>alert(51)</script>",
    "<meta charset=utf-7><meta http-equiv=refresh content='0;url=https://example.com/a'>",
    "<a id=x href=javascript:alert(52)>x</a><img src=x onerror=x.click()>",
]  # fmt: skip


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A server on this machine that notes in `asked` every path it is asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_error(404)

        do_POST = do_HEAD = do_OPTIONS = do_GET

        def log_message(self, *_arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def payloads(server) -> list[str]:
    """Every attack, aimed at the server: a script that runs asks it for /ran and renames the page."""
    place = f"http://127.0.0.1:{server.server_port}"
    ran = f"(document.title=`ran`,new/**/Image().src=`{place}/ran`)"
    aimed = [text.replace("https://example.com", place) for text in HOSTILE + LOADING]
    return [re.sub(r"alert\(\d+\)", lambda _: ran, text) for text in aimed]


def opened(page: Path, folder: Path) -> str:
    """The page's elements as Chromium has them after three seconds."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def write_hostile(folder: Path, text: str) -> list[Path]:
    """Make both pages with `text` wherever a text of the model's, the data's or the machine's can come in."""
    (folder / "metrics").mkdir()
    write(folder / "metrics/tuned.json", {text: text})
    write_inputs(folder)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"], cwd=folder, check=True)
    write(folder / "metrics/tuned.json", {text: f"{text}, changed", f"{text}, new": text})
    write(folder / "metrics/timing.json", {text: {"seconds": text, "device": text, "gpu": text, text: text}})
    result = {"rows": [[text, text]], "all_rows": 9, "all_columns": 3}
    shown = {"instance": 0, "reference": result, "answer": result}
    row = {"answer": text, "prompt": f"{text}\n\n{text}", "reference": text, "where": text, "shown": shown}
    arguments = write_inputs(folder, QUOTES | {"rows": text}, **row)
    failed = {"instance": 1, "reference": result, "answer": {"error": text}}
    base = folder / "base.jsonl"
    rows = [json.loads(line) for line in base.read_text(encoding="utf-8").splitlines()]
    base.write_text("".join(json.dumps({**row, "shown": failed}) + "\n" for row in rows), encoding="utf-8")
    change(folder / "provenance.json", license=text, origin=[text], files={text: text})
    change(folder / "model-provenance.json", origin=[text], files={text: text})
    report.main(arguments)
    return [folder / "report.html", folder / "run.html"]


def shares(texts: list[str], size: int = 1200) -> list[str]:
    """The texts in lumps of at most `size` characters, for the page cuts longer ones."""
    lumps = [""]
    for text in texts:
        if len(lumps[-1]) + len(text) >= size:
            lumps.append("")
        lumps[-1] += text + " "
    return lumps


def test_no_attack_runs_loads_or_makes_an_element_in_either_page(tmp_path, monkeypatch, server, payloads):
    assert len(payloads) >= 60
    for number, text in enumerate(["plain", *shares(payloads)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        pages = [Page(opened(page, tmp_path)) for page in write_hostile(folder, text)]
        made = [{(tag, name) for tag, attributes in page.elements for name in [None, *attributes]} for page in pages]
        if number == 0:
            harmless = made
        assert [page.title for page in pages] == ["quotes: 25.0% → 75.0%", "How this run went"]
        assert made == harmless
        for page, places in zip(pages, (50, 9), strict=True):
            links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
            assert links in ({"run.html"}, {"report.html"})
            assert page.text.count(text.strip()) > places
    assert server.asked == []


def test_without_escaping_and_policy_the_same_attacks_run_and_load(tmp_path, server, payloads):
    for number, text in enumerate(shares(payloads)):
        page = tmp_path / f"{number}.html"
        page.write_text(f"<!doctype html><meta charset=utf-8><title>x</title><body>{text}", encoding="utf-8")
        opened(page, tmp_path)
    assert "/ran" in server.asked
    assert len(set(server.asked)) > 5
