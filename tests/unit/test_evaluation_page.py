"""The page of an evaluation: its numbers are the metrics', its texts are text, and it works without a network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from prefopt.cli import main
from prefopt.evaluation.length_control import Comparison
from prefopt.reporting.evaluation_figures import length_relation, rate_estimate, win_rate_figure
from prefopt.reporting.evaluation_page import Evaluation, page_data, render_page, shown_row, verdict_of
from prefopt.stages.shown import evaluations_of
from prefopt.winrate import length_controlled_win_rate

HOSTILE = '</script><img src=x onerror="alert(1)"><!-- <script> & \u2028 end'
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
N = 48


def records(model, seed, size=N):
    """AlpacaEval's records: won, lost, draw, missing in turn; the first row is hostile; answers of many lengths."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(size):
        texts = [f"{side}-{model}-{i} " + "w " * int(rng.integers(1, 60)) for side in ("base", "mine")]
        rows.append({"instruction": f"Question {i}?", "output_1": texts[0], "generator_1": "reference",
                     "output_2": texts[1], "generator_2": model, "dataset": ("alpha", "beta")[i % 2],
                     "preference": (2.0, 1.0, 1.5, None)[i % 4]})  # fmt: skip
    rows[0] |= {"instruction": HOSTILE, "output_2": HOSTILE * 2}
    return rows


def saved(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    files = [saved(folder / f"{m}.json", records(m, seed)) for seed, m in enumerate(("first", "second <b>"))]
    out = folder / "page.html"
    assert main(["show-answers", "--annotations", *map(str, files), "--out", str(out)]) == 0
    return out


class Elements(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.inside, self.text, self.scripts = [], None, "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.text += data


def test_every_text_is_in_the_data_once_and_every_row_points_at_its_own(tmp_path):
    rows = [*records("a", 0), *records("b", 1)]
    data = page_data(evaluations_of([saved(tmp_path / "x.json", rows)]))
    assert len(set(data["texts"])) == len(data["texts"])
    for record, row in zip(rows, data["rows"], strict=True):
        assert [data["texts"][k] for k in row[2:5]] == [
            record[name] for name in ("instruction", "output_1", "output_2")
        ]
        assert data["datasets"][row[1]] == record["dataset"]
        assert data["models"][row[0]] == [record["generator_2"], "reference"]
        assert row[5] == record["preference"]
        assert row[6:8] == [len(record["output_2"]), len(record["output_1"])]
    # the prompts of both models are the same: 2 N answers of the model and of the baseline, less the shared hostile one
    assert len(data["texts"]) == N + 4 * N - 1
    assert shown_row(data, data["rows"][0])["prompt"] == HOSTILE


def test_a_verdict_is_not_rounded_to_a_draw():
    assert [verdict_of(p) for p in (0.5, 0.5 + 1e-9, 0.5 - 1e-9, float("nan"))] == ["draw", "won", "lost", "missing"]
    rows = pd.DataFrame({"preference": [1.5 + 1e-9, 0, 1.2], "len_model": [1, 2, 3], "len_baseline": [1, 1, 9]})
    data = page_data([Evaluation("m", rows, {})])
    shown = [shown_row(data, row) for row in data["rows"]]
    assert [row["verdict"] for row in shown] == ["won", "draw", "lost"]
    assert shown[0]["facts"] == "prompt 0 · preference 1.500 · both answers are equally long"
    assert shown[1]["facts"].endswith("the model's answer is 1 characters longer")
    assert shown[2]["facts"].endswith("the model's answer is 6 characters shorter")
    assert shown[0]["answer"] is None  # the template says that the files do not have it


def test_the_page_is_one_file_that_may_load_nothing_and_run_its_own_scripts_only(page_file):
    page = page_file.read_text(encoding="utf-8")
    elements = Elements(page)
    policy = next(a["content"] for t, a in elements.tags if t == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    data, *scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, flags=re.DOTALL)
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts]
    assert re.search("script-src ([^;]*)", policy)[1].split() == hashes
    assert json.loads(data)["models"] == [["first", "reference"], ["second <b>", "reference"]]
    outside = [a for _, a in elements.tags if any(not a.get(k, "#").startswith("#") for k in ("src", "href"))]
    assert outside == []
    assert not any(name.startswith("on") for _, a in elements.tags for name in a)


def test_text_from_files_is_text(page_file):
    page = page_file.read_text(encoding="utf-8")
    tags = {tag for tag, _ in Elements(page).tags}
    assert "img" not in tags
    assert "b" not in tags
    assert page.count("<script") == 3
    assert HOSTILE[:40] in Elements(page).text
    assert "<" not in re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL)[1]


def test_without_scripts_there_are_the_figures_the_table_and_the_first_rows(page_file):
    page = page_file.read_text(encoding="utf-8")
    body = page[: page.index("<template")]
    assert body.count("<svg") == 3
    assert body.count('<article class="answers">') == 5
    assert "The first 5 of 96 rows" in body
    assert "base-first-4" in html.unescape(body)
    assert re.search(r'<form id="filters" hidden>', body)
    # per model N / 4 each of won, drawn, lost and missing: rate 50 over 3 N / 4 rows
    cells = re.findall(r'<td class="[a-z]+">(.*?)</td>', body)
    assert cells[0] == "first"
    assert cells[1].startswith("50.00 [")
    assert cells[3:6] == ["50.00", f"{N // 4}/{N // 4}/{N // 4}", str(N // 4)]


def test_the_same_files_give_the_same_page(page_file):
    folder = page_file.parent
    again = render_page(evaluations_of([folder / "first.json", folder / "second <b>.json"]))
    assert again == page_file.read_text(encoding="utf-8")


def test_the_curve_at_equal_length_is_the_length_controlled_win_rate():
    rng = np.random.default_rng(3)
    size = 300
    difficulty = rng.normal(size=size)
    rows = pd.DataFrame({"len_model": rng.integers(50, 900, size), "len_baseline": rng.integers(50, 900, size)})
    longer = np.tanh((rows["len_model"] - rows["len_baseline"]) / 300)
    rows["preference"] = 1 + (rng.random(size) < 1 / (1 + np.exp(-2 * longer - difficulty)))
    rows["index"] = range(size)
    for given in (difficulty, None):
        metrics = length_controlled_win_rate(rows, difficulty=given, gamed=None, C=10.0)
        relation = Evaluation("m", rows, metrics, given).relation()
        assert relation.at_zero == pytest.approx(metrics["length_controlled_win_rate"], abs=1e-9)
        assert relation.curve[20] == pytest.approx([0, relation.at_zero], abs=1e-9)
        assert (np.diff(relation.curve[:, 1]) < 0).all()  # longer answers win here, and t < 0 is longer


def test_bins_hold_all_rows_and_keep_equal_lengths_together():
    p = np.array([np.nan, *np.tile([0.0, 1.0, 1.0, 1.0], 30)])
    delta = np.array([99.0, *np.repeat([-50.0, 0.0, 0.0, 80.0], 30)])
    bins = length_relation(Comparison(p, delta, None, None), None).bins
    assert [estimate["n"] for _, estimate in bins] == [30, 60, 30]
    assert [place for place, _ in bins] == pytest.approx(np.tanh(np.array([-50, 0, 80]) / delta.std(ddof=1)))
    assert bins[1][1]["mean"] == 75.0
    assert bins[1][1]["low"] < 75 < bins[1][1]["high"]


def test_an_estimate_of_one_row_has_no_interval_and_of_none_no_mean():
    assert rate_estimate([1.0]) == {"mean": 100.0, "low": None, "high": None, "n": 1}
    assert rate_estimate([])["mean"] is None


def test_summaries_of_items_can_be_drawn():
    svg = win_rate_figure(
        {"dpo $x_1$": {"win rate": {"mean": 61.25, "low": 50.0, "high": 70.0}}, "not run": {"win rate": None}}
    )
    assert "61.2" in svg
    assert "dpo $x_1$" in html.unescape(svg)
    assert svg.count('id="interval-') == 1


def test_texts_that_annotations_lack_come_from_the_files_of_answers(tmp_path):
    rows = records("m", 5)
    numbers = pd.DataFrame({"model": "m", "index": range(N), "preference": [r["preference"] for r in rows]})
    numbers = numbers.assign(
        **{f"len_{k}": [len(r[f"output_{s}"]) for r in rows] for s, k in ((1, "baseline"), (2, "model"))}
    )
    numbers.iloc[::-1].to_csv(tmp_path / "numbers.csv", index=False)
    answers = {s: [{"instruction": r["instruction"], "output": r[f"output_{s}"]} for r in rows] for s in (1, 2)}
    baseline, outputs = (saved(tmp_path / f"{side}.json", answers[side]) for side in (1, 2))
    whole = evaluations_of([tmp_path / "numbers.csv"], baseline=baseline, outputs=outputs)[0].rows.iloc[::-1]
    for name in ("instruction", "output_1", "output_2"):
        assert list(whole[name]) == [r[name] for r in rows]
    bare = page_data(evaluations_of([tmp_path / "numbers.csv"]))
    assert {tuple(row[1:5]) for row in bare["rows"]} == {(-1, -1, -1, -1)}


def test_one_name_in_several_files_is_told_apart_by_their_folders(tmp_path, capsys):
    files = [saved(tmp_path / folder / "annotations.json", records("m", 1)) for folder in ("one", "two")]
    assert [e.label for e in evaluations_of(files)] == ["m (one)", "m (two)"]
    out = str(tmp_path / "page.html")
    assert main(["show-answers", "--annotations", str(files[0]), str(files[0]), "--out", out]) == 2
    assert "'m (one)' is there twice" in capsys.readouterr().err
    assert main(["show-answers", "--annotations", *map(str, files), "--outputs", "x.json", "--out", out]) == 2
    assert "--outputs is of one model" in capsys.readouterr().err


STEPS = """
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
frame.onload = async () => {
  const page = frame.contentDocument, seen = {};
  const form = page.getElementById("filters");
  const set = async (name, value) => {
    form.elements[name].value = value;
    form.elements[name].dispatchEvent(new Event("input", { bubbles: true }));
    await wait(300);
  };
  const count = () => page.getElementById("count").textContent;
  const slots = (name) => [...page.querySelectorAll(`#rows [data-slot="${name}"]`)].map((e) => e.textContent);
  seen.start = [count(), slots("verdict").length, page.querySelector(".place").textContent];
  seen.prompt = slots("prompt")[0];
  seen.images = page.images.length;
  page.querySelector('[data-step="1"]').click();
  seen.next = [slots("facts")[0], page.querySelector(".place").textContent, page.activeElement.id];
  await set("verdict", "missing");
  seen.missing = [count(), [...new Set(slots("verdict"))]];
  await set("model", "1");
  await set("dataset", "0");
  seen.none = count();  // missing rows have odd numbers, alpha has the even ones
  await set("dataset", "1");
  seen.both = [count(), [...new Set(slots("name"))]];
  for (const name of ["model", "dataset", "verdict"]) await set(name, "");
  await set("text", "MINE-first-13 ");
  seen.text = [count(), slots("facts")[0]];
  await set("text", "");
  seen.orders = {};
  for (const order of ["longer", "shorter", "best", "worst"]) {
    await set("order", order);
    seen.orders[order] = slots("facts")[0];
  }
  out.textContent = JSON.stringify(seen);
};
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to run the page's script")
def test_the_script_filters_searches_sorts_and_pages(page_file):
    harness = page_file.with_name("harness.html")
    harness.write_text(f'<pre id="out"></pre><iframe id="frame"></iframe><script>{STEPS}frame.src="page.html"</script>')
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={page_file.parent / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    ran = subprocess.run([*command, harness.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    seen = json.loads(html.unescape(re.search(r'<pre id="out">(.+?)</pre>', ran.stdout, flags=re.DOTALL)[1]))

    assert seen["start"] == ["96 of 96 rows", 20, "page 1 of 5"]
    assert seen["prompt"] == HOSTILE
    assert seen["images"] == 0
    assert seen["next"][0].startswith("prompt 20 ")
    assert seen["next"][1:] == ["page 2 of 5", "answers-title"]
    assert seen["missing"] == [f"{2 * N // 4} of 96 rows", ["missing"]]
    assert seen["none"] == "0 of 96 rows"
    assert seen["both"] == [f"{N // 4} of 96 rows", ["second <b>"]]
    assert seen["text"][0] == "1 of 96 rows"
    data = json.loads(re.search(r'id="data">(.*?)</script>', page_file.read_text(encoding="utf-8"))[1])
    facts = {order: shown_row(data, row)["facts"] for order, row in _extremes(data["rows"]).items()}
    assert seen["orders"] == facts
    thirteen = next(row for row in data["rows"] if "mine-first-13 " in data["texts"][row[4]])
    assert seen["text"][1] == shown_row(data, thirteen)["facts"]


def _extremes(rows):
    """The row that each order puts first; sorting is stable, so the first of equals."""
    known = [row for row in rows if row[5] is not None]
    return {
        "longer": max(rows, key=lambda r: r[6] - r[7]),
        "shorter": min(rows, key=lambda r: r[6] - r[7]),
        "best": max(known, key=lambda r: r[5]),
        "worst": min(known, key=lambda r: r[5]),
    }


def test_real_annotations_beside_real_prompts(shared_data, tmp_path):
    """One leaderboard model: the page's numbers are the published ones, and every prompt is AlpacaEval's own."""
    folder = shared_data / "alpaca_eval"
    table = pd.read_csv(folder / "annotations.csv.gz")
    table[table["model"] == "claude"].to_csv(tmp_path / "claude.csv", index=False)
    evaluation = evaluations_of(
        [tmp_path / "claude.csv"],
        baseline=folder / "eval_set.json.gz",
        difficulty=folder / "instruction_difficulty.csv",
        gamed=folder / "df_gamed_surrogate.csv",
    )[0]
    published = pd.read_csv(folder / "leaderboard.csv", index_col=0).loc["claude"]
    relation = evaluation.relation()
    assert relation.at_zero == pytest.approx(published["length_controlled_winrate"], abs=0.03)
    by_dataset = evaluation.by_dataset()
    total = sum(e["mean"] * e["n"] for e in by_dataset.values()) / sum(e["n"] for e in by_dataset.values())
    assert total == pytest.approx(published["win_rate"], abs=1e-8)
    prompts = json.loads(gzip.decompress((folder / "eval_set.json.gz").read_bytes()))
    assert list(evaluation.rows["instruction"]) == [p["instruction"] for p in prompts]
    assert {name: e["n"] for name, e in by_dataset.items()} == pd.DataFrame(prompts)["dataset"].value_counts().to_dict()
