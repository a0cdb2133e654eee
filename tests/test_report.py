"""The report's page, made from tiny metrics and answers, and read back with an HTML parser."""

import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ruamel.yaml

from stages import report
from stages.refusal import Refusal

ROOT = Path(__file__).parent.parent
HOSTILE = [
    "<script>alert(1)</script>",
    '" onerror="alert(2)" x="',
    "' onmouseover='alert(3)",
    "<img src=https://example.com/x.png onerror=alert(4)>",
    "</pre></style></title><svg onload=alert(5)>",
    '<a href="javascript:alert(6)">x</a>',
    "<!-- {{ 7 * 191 }} {% raw %}",
    "<meta http-equiv=refresh content=0;url=https://example.com>",
    "<body onload=alert(7)>",
    "<iframe src=javascript:alert(8)></iframe>",
    "<object data=https://example.com/x.swf></object>",
    "<embed src=https://example.com/x>",
    "<link rel=stylesheet href=https://example.com/x.css>",
    "<style>@import 'https://example.com/x.css';</style>",
    "<base href=https://example.com/>",
    "<form action=https://example.com><input autofocus onfocus=alert(9)></form>",
    "<video><source onerror=alert(10)></video>",
    "<audio src=x onerror=alert(11)>",
    "<details open ontoggle=alert(12)>",
    "<math href=javascript:alert(13)>x</math>",
    "<svg><animate onbegin=alert(14) attributeName=x dur=1s>",
    "<svg><script href=https://example.com/x.js />",
    "<marquee onstart=alert(15)>",
    "<select autofocus onfocus=alert(16)>",
    "<textarea autofocus onfocus=alert(17)>",
    "<template><script>alert(18)</script></template>",
    "</textarea><script>alert(19)</script>",
    "</title><script>alert(20)</script>",
    "--><script>alert(21)</script>",
    "]]><script>alert(22)</script>",
    "<scr<script>ipt>alert(23)</script>",
    "<ScRiPt>alert(24)</sCrIpT>",
    "<img/src=x/onerror=alert(25)>",
    "<a href=' &#1; javascript:alert(26)'>x</a>",
    "\u202e<script>alert(27)</script>",
    "{{ ''.__class__.__mro__ }}{% for x in range(9) %}{% endfor %}",
    "%3Cscript%3Ealert(28)%3C/script%3E &lt;script&gt;",
]
PATHS = [
    *("data.json", "tokens.json", "train.json", "loss.csv", "merge.json", "base.jsonl", "few_shot.jsonl"),
    *("tuned.jsonl", "model-provenance.json", "provenance.json", "report.html", "comparison.json", "facets.csv"),
]
QUOTES = {"name": "quotes", "rows": "fortunes", "given_words": 5, "longest": 400}


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: its elements, their attributes, its text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = self.title = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self.text += " "

    def handle_data(self, data):
        if self.lasttag == "title":
            self.title += data.strip()
        if self.lasttag != "style":
            self.text += data


def answer(identity: str, right: bool, scores: tuple[str, ...], **fields) -> dict:
    plain = {"prompt": "singer(name, age)\n\nHow many singers?", "reference": "SELECT count(*) FROM singer"}
    written = {"answer": f"the answer to {identity}", "stopped": right, "scores": dict.fromkeys(scores, right)}
    written |= {"group": f"group {identity}", "nats": 2.5 if right else 15.0, "tokens": 10}
    written["facets"] = {"difficulty": "easy" if identity < "4" else "hard"}
    return {"id": identity, "where": f"dev.json row {identity}", **plain, **written, **fields}


def write_inputs(folder: Path, task: dict | None = None, **answers_fields) -> list[str]:
    """Fill `folder` with all that the report reads; return the command's arguments."""
    yaml = ruamel.yaml.YAML()
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["task"] = task or params["task"]
    yaml.dump(params, folder / "params.yaml")
    scores = ("right_form", "right_author") if task else ("execution_accuracy", "valid_sql", "exact_match")
    before, after = [0, 0, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 1, 1, 1]
    for name, rights in (("base", before), ("few_shot", before), ("tuned", after)):
        rows = [answer(str(i), bool(right), scores, **answers_fields) for i, right in enumerate(rights)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sides = ("train", "validation", "test")
    kinds = ("rows", "groups", "tokens", "supervised", "truncated", "dropped")
    counts = {f"{side}_{kind}": 1234 for side in sides for kind in kinds}
    write(folder / "tokens.json", counts)
    write(folder / "data.json", {**counts, "unusable": 4, "duplicates": 17, "asked_twice": 3, "leaks": 0})
    losses = {"train_loss": 0.5, "validation_loss": 0.625}
    ended = {"steps": 40, "kept_step": 40, "ended": "as planned"}
    write(folder / "train.json", {**ended, "trainable_parameters": 3796992, **losses})
    write(folder / "merge.json", {"rows": 16, "greedy_agreement": 0.998, "max_kl": 0.0123, "mean_kl": 0.0004})
    lines = [f"{step},{2 / step},,0.001,1.0" for step in range(1, 41)] + ["20,,0.7,,", "40,,0.625,,"]
    (folder / "loss.csv").write_text("\n".join(["step,loss,validation_loss,learning_rate,gradient_norm", *lines, ""]))
    origin = {"source": "wheel", "origin": ["pkg==1.0.0"], "files": {"dev.json": "0" * 64}}
    write(folder / "model-provenance.json", {**origin, "produced": {}})
    write(folder / "provenance.json", {**origin, "license": "CC BY-SA 4.0"})
    return [str(folder / name) for name in PATHS]


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def change(path: Path, **fields: object) -> None:
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **fields})


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the page of inputs that may be changed first."""
    monkeypatch.chdir(tmp_path)

    def make(arguments: list[str]) -> str:
        report.main(arguments)
        return Path(arguments[-3]).read_text(encoding="utf-8")

    return make


def test_the_page_is_the_same_bytes_when_made_again_elsewhere(make, tmp_path):
    arguments = write_inputs(tmp_path)
    first = make(arguments)
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\n")
    surroundings = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "HOSTNAME": "elsewhere"}
    subprocess.run([sys.executable, "-m", "stages.report", *arguments], env={**os.environ, **surroundings}, check=True)
    assert Path(arguments[-3]).read_text(encoding="utf-8") == first


def test_nothing_is_loaded_and_nothing_may_be(make, tmp_path):
    page = Page(make(write_inputs(tmp_path)))
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.split("; ")[:3] == ["default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"]
    assert not {tag for tag, _ in page.elements} & {
        "script",
        "link",
        "iframe",
        "img",
        "object",
        "embed",
        "base",
        "form",
    }
    for _, attributes in page.elements:
        places = [attributes.get(name) for name in ("src", "href", "xlink:href", "data", "srcset")]
        assert all(place is None or place == "run.html" or place.startswith("#") for place in places)
        assert "url(http" not in (attributes.get("style") or "")


def test_hostile_texts_are_shown_and_do_nothing(make, tmp_path):
    plain = Page(make(write_inputs(tmp_path)))
    tags = {tag for tag, _ in plain.elements}
    names = {name for _, attributes in plain.elements for name in attributes}
    text = " ".join(HOSTILE)
    row = {"answer": text, "prompt": f"{text}\n\n{text}", "reference": text, "where": text}
    arguments = write_inputs(tmp_path, QUOTES | {"rows": text}, **row)
    change(tmp_path / "provenance.json", license=text, origin=[text], files={text: "0" * 64})
    change(tmp_path / "model-provenance.json", origin=[text])
    written = make(arguments)
    page = Page(written)
    assert {tag for tag, _ in page.elements} <= tags
    assert {name for _, attributes in page.elements for name in attributes} <= names
    assert "javascript:" not in " ".join(str(value) for _, a in page.elements for value in a.values())
    assert "<script" not in written
    assert "1337" not in page.text
    assert page.text.count(text) > 6 * 6  # examples, each with prompt, question, place, reference and two answers


def test_the_headline_says_before_after_and_difference(make, tmp_path):
    text = " ".join(Page(make(write_inputs(tmp_path))).text.split())
    assert "text to sql: execution accuracy 25.0% → 75.0% +50.0 points (" in text
    assert "over the base model with 3 examples in its prompt (25.0%), on 8 test rows" in text
    assert "Fixed 5, broken 1, still wrong 1, right before and after 1." in text
    assert re.search(r"execution accuracy 25\.0% \S+% to \S+% 25\.0% .* 75\.0% .* \+50\.0 points", text)
    assert re.search(r"loss, nats a token 1\.188 .* 0\.562 .* −0\.625", text)


def test_a_difference_that_chance_explains_is_called_noise_in_the_page_and_the_metrics(make, tmp_path):
    page = Page(make(write_inputs(tmp_path)))
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    gain = comparison["execution_accuracy"]["over_base"]
    assert (gain["mean"], gain["verdict"]) == (0.5, "noise")  # five of eight won and one lost: p is 14/64
    assert gain["p"] == pytest.approx(14 / 64, abs=1e-6)
    assert "p 0.2188: noise" in " ".join(page.text.split())


def test_each_kind_shows_its_first_examples_side_by_side(make, tmp_path):
    page = make(write_inputs(tmp_path))
    fixed, broken, wrong = (
        re.split(r"<h[23]>", page.split(f"<h3>{k}")[1])[0] for k in ("Fixed", "Broken", "Still wrong")
    )
    assert re.findall("the answer to (.)", fixed) == list("00115566")  # base and tuned of each, of five four
    assert re.findall("the answer to (.)", broken) == list("22")
    assert re.findall("the answer to (.)", wrong) == list("44")
    assert fixed.count("did not end by itself") == 4  # the base's answers that did not stop
    assert '<p class="question">How many singers?</p>' in fixed


def test_the_charts_share_no_id_and_refer_to_what_is_there(make, tmp_path):
    page = Page(make(write_inputs(tmp_path)))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert [tag for tag, _ in page.elements].count("svg") == 2
    assert len(ids) == len(set(ids))
    places = [attributes.get("xlink:href", "") for _, attributes in page.elements]
    assert {place[1:] for place in places if place.startswith("#")} <= set(ids)


def test_the_headline_is_drawn_with_its_interval_for_all_three_models(make, tmp_path):
    page = make(write_inputs(tmp_path))
    (chart,) = re.findall(r'aria-label="Execution accuracy of the three models.*?</svg>', page, re.DOTALL)
    assert ">base<" in chart and ">base, 3 examples<" in chart and ">tuned<" in chart and "95% interval" in chart


def test_every_cell_of_a_table_that_is_stacked_on_a_phone_names_its_column(make, tmp_path):
    for table in re.findall(r'<table class="stacked">.*?</table>', make(write_inputs(tmp_path)), re.DOTALL):
        columns = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', table)[1:]
        for row in re.findall(r"<tr>(?=<th scope=.row).*?</tr>", table, re.DOTALL):
            assert re.findall(r'<td[^>]*data-title="(.*?)"', row) == columns


def test_the_page_tells_how_long_a_row_is_and_how_to_make_it_again(make, tmp_path):
    arguments = write_inputs(tmp_path)
    change(tmp_path / "tokens.json", train_tokens=1000, train_supervised=100, train_rows=8, test_rows=0)
    text = " ".join(Page(make(arguments)).text.split())
    assert "train 1,234 1,234 1,000 100 1,234 1,234 112.5 12.5" in text
    for told in ("whose dvc.lock names this page", "make run", "dvc repro", "dvc pull", "sha256 " + "0" * 64):
        assert told in text


def result(rows: list[list], **fields) -> dict:
    return {"rows": rows, "all_rows": len(rows), "all_columns": len(rows[0]) if rows else 0, **fields}


def test_what_reference_and_answer_return_is_shown_under_the_queries(make, tmp_path):
    shown = {"instance": 0, "reference": result([["a", 1], [None, 0.5]], all_rows=7), "answer": result([])}
    text = " ".join(Page(make(write_inputs(tmp_path, shown=shown))).text.split())
    expected = "SELECT count(*) FROM singer Returns 7 rows on database 0 a 1 NULL 0.5 … 5 more Base"
    assert text.count(expected) == 6
    assert text.count("the answer to 0 Returns 0 rows on database 0") == 2
    assert "There the reference" not in text


def test_a_result_from_another_database_than_the_references_brings_the_references_with_it(make, tmp_path):
    arguments = write_inputs(tmp_path)
    for name, shown in {
        "base": {"instance": 3, "reference": result([["x"]]), "answer": result([["y"]])},
        "tuned": {"instance": 1, "reference": result([["z"] * 8], all_columns=9), "answer": {"error": "no such <b>"}},
    }.items():
        path = tmp_path / f"{name}.jsonl"
        rows = [{**json.loads(line), "shown": shown} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = " ".join(Page(make(arguments)).text.split())
    assert "Returns 1 row on database 1, its first 8 columns: z z z z z z z z Base" in text
    assert "Returns 1 row on database 3 y There the reference: Returns 1 row on database 3 x Tuned" in text
    assert "Fails: no such <b>" in text


def test_a_task_without_execution_works(make, tmp_path):
    text = " ".join(Page(make(write_inputs(tmp_path, QUOTES))).text.split())
    assert "quotes: right author 25.0% → 75.0%" in text
    assert "execution accuracy" not in text
    assert "task.given_words 5" in text


def test_how_far_machines_of_two_kinds_come_apart_is_told_as_it_was_measured(make, tmp_path):
    text = " ".join(Page(make(write_inputs(tmp_path))).text.split())
    measured = json.loads((ROOT / "bench/results/default_run_h200.json").read_text())
    gpu, cpu = measured["tuned"], measured["tuned_on_a_cpu"]
    points = 100 * (gpu["execution_accuracy"] - cpu["execution_accuracy"])
    assert f"{gpu['rows']} test rows, came to a headline score {points:.1f} points apart" in text
    assert f"losses {abs(gpu['loss'] - cpu['loss']):.3f} apart" in text


def test_the_science_is_told_and_the_machine_is_not(make, tmp_path):
    text = " ".join(Page(make(write_inputs(tmp_path))).text.split())
    for told in (
        "lora.r 16",
        "task.columns.schema db_id",
        "CC BY-SA 4.0",
        "4 rows that the task cannot use and 17 exact duplicates were left out, and 3 rows",
        "99.8%",
        "0.01230",
    ):
        assert told in text
    assert "machine." not in text
    assert str(tmp_path) not in text


def test_what_is_not_a_number_is_left_out(make, tmp_path):
    arguments = write_inputs(tmp_path)
    curve = tmp_path / "loss.csv"
    curve.write_text(curve.read_text() + "41,nan,,,\n42,inf,,,\n42,,nan,,\n")
    page = make(arguments)
    assert not re.search(r"\b(nan|inf|none)\b", Page(page).text.lower())
    assert not re.search(r"\b(nan|inf)\b", page)
    assert report.read_curve(curve, "loss")[0] == list(range(1, 41))
    assert report.read_curve(curve, "validation_loss") == ([20, 40], [0.7, 0.625])


def test_a_run_without_validation_has_a_curve_still(make, tmp_path):
    arguments = write_inputs(tmp_path)
    (tmp_path / "loss.csv").write_text("step,loss,validation_loss\n1,2.5,\n")
    assert "<svg" in make(arguments)


def test_the_page_says_which_steps_adapter_it_is_and_that_training_ended_early(make, tmp_path):
    arguments = write_inputs(tmp_path)
    text = Page(make(arguments)).text
    assert "training loss is 0.500 and the validation loss 0.625 nats" in text and "ended early" not in text
    change(tmp_path / "train.json", kept_step=20, ended="early: no progress")
    text = Page(make(arguments)).text
    assert "3,796,992 trainable parameters, ended early since validation found nothing better." in text
    assert "The adapter is that of step 20, which validation found best: a loss of 0.625." in text
    change(tmp_path / "train.json", validation_score=0.25)
    assert "Its answers to validation rows reach 25.0% execution accuracy." in Page(make(arguments)).text


def test_answers_to_different_rows_are_refused_and_the_old_page_stays(make, tmp_path):
    arguments = write_inputs(tmp_path)
    before = make(arguments)
    answers = tmp_path / "tuned.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(Refusal, match="answer different rows"):
        make(arguments)
    assert Path(arguments[-3]).read_text(encoding="utf-8") == before
    assert not list(tmp_path.glob(".report*"))


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("singer(name)\n\nHow many?", "How many?"),
        ("### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:", "### Input:\n1 + 1"),
        ("Quote: To be", "Quote: To be"),
        ("# One heading", "# One heading"),
        ("", ""),
    ],
)
def test_the_question_is_the_last_paragraph_that_says_something(prompt, question):
    assert report.Example({"prompt": prompt}, {}).question == question


def test_the_curve_is_smoothed_over_its_neighbours():
    assert report.smoothed([4.0, 2.0, 6.0, 1.0], 1) == [3.0, 4.0, 3.0, 3.5]
    assert report.smoothed([4.0, 2.0], 0) == [4.0, 2.0]


def test_the_score_is_shown_by_class_and_written_for_plots(make, tmp_path):
    text = " ".join(Page(make(write_inputs(tmp_path))).text.split())
    assert "Execution accuracy by difficulty" in text
    assert "easy 4 50.0% 50.0% 75.0% hard 4 0.0% 0.0% 75.0%" in text
    assert (tmp_path / "facets.csv").read_text().splitlines() == [
        "facet,class,rows,model,score",
        ",all,8,base,0.25",
        ",all,8,few_shot,0.25",
        ",all,8,tuned,0.75",
        "difficulty,easy,4,base,0.5",
        "difficulty,easy,4,few_shot,0.5",
        "difficulty,easy,4,tuned,0.75",
        "difficulty,hard,4,base,0.0",
        "difficulty,hard,4,few_shot,0.0",
        "difficulty,hard,4,tuned,0.75",
    ]
