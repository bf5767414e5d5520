"""A chosen model as a folder of its own: weights, tokenizer, generation config and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from reftune.errors import CheckpointError, ModelError
from reftune.storage.atomic import replace_folder

NOT_PART_OF_THE_MODEL = ("checkpoints", "*.jsonl", "stage.json", "nonfinite-*.json")


def export_model(run_folder: Path, method: str, out: Path) -> Path:
    """Write `out`, which loads with plain `from_pretrained` and in vLLM. Adapters are merged
    already.

    Raises: CheckpointError where the method is not finished or `out` exists.
    """
    stage = run_folder / "stages" / method
    if not (stage / "stage.json").is_file():
        done = sorted(path.parent.name for path in run_folder.glob("stages/*/stage.json"))
        raise CheckpointError(
            f"{stage}: not a finished method (no stage.json); finished here:"
            f" {', '.join(done) or 'none'}"
        )
    if out.exists():
        raise CheckpointError(f"{out}: exists already; choose a folder that does not")

    def fill(folder: Path) -> None:
        shutil.copytree(stage, folder, ignore=shutil.ignore_patterns(*NOT_PART_OF_THE_MODEL))
        (folder / "README.md").write_text(model_card(run_folder, method), encoding="utf-8")

    out.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(out, fill)
    return out


def push_model(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload an exported model to `OWNER/NAME` on the Hub, made if it is not there. Returns its
    address.

    Raises: ModelError where the Hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repository, commit_message="Exported by reftune"
        )
    # the Hub's errors are OSErrors or ValueErrors, httpx's are neither
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{repository}: cannot be pushed, and stays in {folder}: {reason} (`hf auth login`"
            " logs in)"
        ) from None
    return str(address)


def model_card(run_folder: Path, method: str) -> str:
    """What the model is, how it was made and how good it is, from the run's own files."""
    recipe = (run_folder / "recipe.yaml").read_text(encoding="utf-8")
    stage = json.loads((run_folder / "stages" / method / "stage.json").read_text(encoding="utf-8"))
    table = yaml.safe_load(recipe)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [reftune, reasoning]
---

# {table["name"]}: {method}

Made by reftune, which implements [ReFT](https://arxiv.org/abs/2401.08967): stage
`{stage["kind"]}`, started from `{stage["init"]}`, trained on {_data(table)}.
{_accuracy(run_folder, method)} The weights are those of step {stage["chosen_step"]},
chosen on {stage["dev_n"]} dev problems ({stage["dev_accuracy"]:.1%} right, the best of
{stage["looks"]} looks).

The model was trained on one prompt format and one kind of question, and graded by its final
answers only. Its reasoning was not checked, and programs that it writes are untrusted: run them in
a sandbox. `value_head/` holds the value head used in training; generation does not need it.

## Recipe

```yaml
{recipe.strip()}
```
"""


def _data(recipe: dict[str, Any]) -> str:
    dataset = recipe.get("dataset") or {}
    source = dataset.get("train")
    return (
        f"`{source}` (`{dataset['kind']}`)"
        if isinstance(source, str)
        else f"the generated data `{dataset.get('kind')}`"
    )


def _accuracy(run_folder: Path, method: str) -> str:
    path = run_folder / "summary.json"
    methods: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8"))["methods"] if path.is_file() else {}
    )
    if method not in methods:
        return "It has not been evaluated."
    score = methods[method]
    low, high = score["ci95"]
    return (
        f"Greedy accuracy {score['accuracy']:.1%} of {score['n']} problems (95 % interval {low:.1%}"
        f" to {high:.1%})."
    )
