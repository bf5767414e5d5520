"""The notebook runs from top to bottom, with settings so small that it learns nothing."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "first_steps.ipynb"


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFTUNE_TINY", "1")
    monkeypatch.chdir(tmp_path)


@pytest.mark.timeout(300)
def test_the_cells_run_one_after_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    namespace: dict[str, object] = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
    check(capsys.readouterr().out, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_notebook_runs_in_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client.NotebookClient(
        notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    check(
        "".join(
            output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
        ),
        tmp_path,
    )


def check(said: str, folder: Path) -> None:
    assert "correct    21 is the gold answer 21" in said
    assert "of 20 test problems" in said
    run = folder / "runs" / "first-steps"
    assert (run / "report.html").is_file()
    assert (run / "figures" / "reward_correct.svg").is_file()


def test_the_notebook_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    cells = [
        cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"
    ]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
