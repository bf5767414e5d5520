"""The page in a real browser: it draws, filters, and leaves the console empty. Skipped if no
Chromium is found."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reftune.results import report_command

WriteRun = Callable[..., Path]

HOSTILE = "</script><script>window.hacked = 1</script><!-- <img src=x onerror='window.hacked = 2'>"

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=500,900",
    "--virtual-time-budget=5000",
]

LISTEN = """<script>
window.faults = [];
addEventListener("error", (event) => faults.push(String(event.message)));
addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => faults.push(`blocked ${event.blockedURI}`));
for (const kind of ["error", "warn"]) console[kind] = (...words) => faults.push(words.join(" "));
</script>"""

REPORT = """<script>
const all = (query) => [...document.querySelectorAll(query)];
const isDrawn = () => all("[data-chart]").every((figure) => figure.querySelector("svg path"));
(function report(patience) {
  if (patience && !isDrawn()) return setTimeout(report, 100, patience - 1);
  const out = { drawn: isDrawn() };
  try { (() => { %s })(); } catch (error) { out.thrown = String(error); }
  document.body.innerHTML = "";
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify({ ...out, faults, hacked: window.hacked ?? null });
  document.body.append(result);
})(40);
</script>"""
STARTS = 5
"""Most starts of the browser: its virtual clock may end before a busy machine draws the page."""


def browser() -> str:
    known = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in known if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine; install one to test the page in it")
    return found


def run_in(page: Path, script: str, profile: Path) -> dict[str, Any]:
    """Open the page, run `script` in it once it has drawn, and return the values that it put into
    `out`, and all faults."""
    text = page.read_text(encoding="utf-8").replace("<head>", f"<head>{LISTEN}", 1)
    driven = page.with_name("driven.html")
    driven.write_text(text.replace("</body>", f"{REPORT % script}</body>"), encoding="utf-8")
    command = [browser(), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", driven.as_uri()]
    for _ in range(STARTS):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=100,
            env={**os.environ, "HOME": str(profile)},
        )
        match = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
        found: dict[str, Any] = json.loads(html.unescape(match[1])) if match is not None else {}
        if found.get("drawn"):
            break
    assert found, done.stderr[-2000:]
    assert "thrown" not in found, found["thrown"]
    return found


def test_the_page_draws_and_filters_without_a_fault(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run(num_problems=40, num_samples=3)
    found = run_in(
        report_command([folder]),
        """
        const figures = all("[data-chart]");
        out.empty = figures.filter((figure) => !figure.querySelector("svg path"))
            .map((figure) => figure.dataset.chart);
        out.charts = figures.length;
        out.overflow = document.documentElement.scrollWidth - innerWidth;

        const count = () => Number($("sample-found").textContent.split(" ")[0]);
        out.before = count();
        const wrong = all("#sample-verdicts button")
            .find((button) => button.dataset.verdict === "wrong");
        out.wrongLabel = Number(wrong.lastChild.textContent);
        wrong.click();
        out.wrong = count();
        out.wrongShown = all("#sample-list .chip")
            .every((chip) => chip.textContent === "wrong answer");
        wrong.click();
        $("sample-from").value = "3"; $("sample-to").value = "3";
        $("sample-from").dispatchEvent(new Event("input"));
        out.stepThree = count();
        $("sample-from").value = ""; $("sample-to").value = ""; $("sample-order").value = "slow";
        $("sample-order").dispatchEvent(new Event("change"));
        out.slowest = document.querySelector("#sample-list header").textContent;
        $("sample-order").value = "new";
        $("sample-search").value = "no such words";
        $("sample-search").dispatchEvent(new Event("input"));
        out.none = count();
        $("sample-search").value = ""; $("sample-from").value = ""; $("sample-to").value = "";
        $("sample-search").dispatchEvent(new Event("input"));
        all("#sample-list footer button")[0].click();
        out.followed = new Set(all("#sample-list .question").map((node) => node.textContent)).size;

        const options = all("#problem-filter option").map((option) => option.textContent);
        const disagree = options.find((text) => text.startsWith("methods disagree"));
        out.disagree = Number(disagree.match(/\\d+/)[0]);
        out.place = $("problem-place").textContent;
        const first = document.querySelector("#problem .question").textContent;
        $("problem-next").click();
        out.moved = first !== document.querySelector("#problem .question").textContent;

        const canvas = document.querySelector(".hero svg");
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "End" }));
        out.read = document.querySelector(".hero .tip").textContent;
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
        out.second = document.querySelector(".hero .tip").textContent;
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
        out.escaped = document.querySelector(".hero .tip").hidden;
        out.shown = all(".hero .drawing").map((node) => getComputedStyle(node).display);
        const rest = all(".multiples svg")[0], frame = rest.getBoundingClientRect();
        rest.dispatchEvent(new PointerEvent("pointermove", { clientX: frame.right }));
        out.pointed = rest.parentElement.querySelector(".tip").textContent;
        const dark = getComputedStyle(document.body).backgroundColor;
        $("theme").click();
        out.themed = dark !== getComputedStyle(document.body).backgroundColor;
        """,
        tmp_path / "profile",
    )
    assert found["faults"] == []
    assert found["charts"] > 10
    assert found["empty"] == []
    assert found["overflow"] <= 0
    assert 0 < found["wrong"] == found["wrongLabel"] < found["before"]
    assert found["wrongShown"]
    assert 0 < found["stepThree"] <= 3
    assert found["none"] == 0
    assert found["slowest"].endswith("ran 12 ms")
    assert found["followed"] == 1
    assert found["place"] == f"1 of {found['disagree']}"
    assert found["moved"]
    assert found["themed"]
    assert found["read"].startswith("sequences60,160SFT")
    assert found["second"].startswith("sequences3,840Warm-up")
    assert found["escaped"]
    assert found["shown"] == ["none", "block"], "a narrow window"
    assert found["pointed"].startswith("steps20ReFT")


def test_hostile_text_stays_text(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run()
    for path in (folder / "eval" / "reft.jsonl", folder / "stages" / "reft" / "samples.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row.update(tokens=[HOSTILE], logprobs=[-1.0])
            row.get("greedy", row).update(completion=HOSTILE, reason=HOSTILE)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run_in(
        report_command([folder]),
        """
        out.answer = all("#problem .card:last-child pre")[0].textContent;
        out.shaded = all("#sample-list pre")[0].textContent;
        out.made = all("#problem script, #samples script, main img").length;
        """,
        tmp_path / "profile",
    )
    assert found["faults"] == []
    assert found["hacked"] is None
    assert found["answer"] == found["shaded"] == HOSTILE
    assert found["made"] == 0


def test_two_runs_stand_side_by_side(write_run: WriteRun, tmp_path: Path) -> None:
    folders = [write_run("one", num_samples=3), write_run("other", methods=("warmup", "reft"))]
    found = run_in(
        report_command(folders),
        """
        const figures = all("[data-chart]");
        out.empty = figures.filter((figure) => !figure.querySelector("svg path"))
            .map((figure) => figure.dataset.chart);
        out.overflow = document.documentElement.scrollWidth - innerWidth;
        out.cards = all("#problem .card header b").map((node) => node.textContent);
        out.methods = all("#sample-method option").map((node) => node.textContent);
        out.differences = all("#differences + div tbody th").map((node) => node.textContent);
        """,
        tmp_path / "profile",
    )
    assert found["faults"] == []
    assert found["empty"] == []
    assert found["overflow"] <= 0
    assert found["cards"] == [
        "one: Warm-up",
        "one: SFT",
        "one: ReFT",
        "other: Warm-up",
        "other: ReFT",
    ]
    assert found["methods"] == ["all", "one: ReFT", "other: ReFT"]
    assert found["differences"] == ["stages.sft.kind", "stages.sft.init", "evaluate.samples"]
