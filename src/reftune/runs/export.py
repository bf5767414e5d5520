"""Exports a trained model or only its adapters. A config, a generation config, a tokenizer and a
model card are included, so that clients can prompt the model as in training."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from reftune.datasets import load_splits
from reftune.errors import CheckpointError, ModelError, ReftuneError
from reftune.model.adapters import export_adapters
from reftune.model.encoder import Encoder, bos_of, stop_texts, token_ids_of
from reftune.recipe import LengthTable, load_component, parse_recipe
from reftune.results import read_groups, summarize
from reftune.results.records import evaluated_split, read_recipe
from reftune.stages.reward_model import WEIGHTS
from reftune.storage.files import replace_folder
from reftune.storage.run_folder import EXPORT_SETTINGS, RunFolder
from reftune.text import brief, counted
from reftune.types import Answer, BareText, Conversation, Problem

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from reftune.grading.formats import Format

LOG = logging.getLogger(__name__)
NOT_PART_OF_THE_MODEL = ("checkpoints", "adapters", "*.jsonl", "stage.json", "nonfinite-*.json")


def export_model(run_folder: Path, method: str, out: Path, *, adapter: bool = False) -> Path:
    """Write a method's model to the folder `out`, and return the folder. Without `adapter`, the
    folder contains the whole model. Any adapters are merged into the model, so plain
    `from_pretrained` and vLLM can load it. With `adapter`, the folder contains only the adapters.
    Raises: CheckpointError if there is no such run, if the method is not finished or is a reward
    model, if its weights cannot be read, if `adapter` is set but adapters are missing, or if `out`
    exists or cannot be written; DataError if the run's recipe cannot be read; ModelError if the run
    started from adapters that cannot be read."""
    run = RunFolder(run_folder)
    if not run.recipe.is_file():
        raise CheckpointError(f"{run_folder}: not a run folder: it has no recipe.yaml")
    stage = run.stage(method).path
    if not run.stage(method).is_done:
        raise CheckpointError(
            f"{stage}: not a finished method (no stage.json); finished here:"
            f" {', '.join(run.trained()) or 'none'}"
        )
    if (stage / WEIGHTS).is_file() or not run.stage(method).facts().get("is_method", True):
        raise CheckpointError(f"{stage}: not a method, so its model answers no questions")
    if out.exists():
        raise CheckpointError(f"{out}: exists already; choose a folder that does not")
    if not adapter:
        _require_weights(stage)
    recipe, _ = read_recipe(run.recipe)
    serving = _serving(recipe, stage)

    def fill(folder: Path) -> None:
        lora = None
        if adapter:
            from peft import LoraConfig

            folder.mkdir(parents=True, exist_ok=True)
            export_adapters(run, method, recipe.get("model") or {}, folder)
            lora = LoraConfig.from_pretrained(str(folder))
        else:
            ignore = shutil.ignore_patterns(*NOT_PART_OF_THE_MODEL)
            shutil.copytree(stage, folder, ignore=ignore)
        if serving is not None:
            serving.encoder.tokenizer.save_pretrained(folder)
            serving.generation.save_pretrained(folder)
        settings = {key: recipe.get(key) for key in ("format", "lengths")}
        settings["model"] = {"dtype": (recipe.get("model") or {}).get("dtype", "auto")}
        text = json.dumps(settings, indent=2, default=str)
        (folder / EXPORT_SETTINGS).write_text(f"{text}\n", encoding="utf-8")
        card = model_card(run, method, serving, lora)
        (folder / "README.md").write_text(card, encoding="utf-8")

    replace_folder(out, fill)
    return out


def _require_weights(stage: Path) -> None:
    """Raises: CheckpointError if a file of weights is missing, incomplete or damaged."""
    index = stage / "model.safetensors.index.json"
    names = {"model.safetensors"}
    try:
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(names):
            with safe_open(stage / name, framework="pt"):
                pass  # opening compares the file's size with its header
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        raise CheckpointError(
            f"{stage}: cannot be exported: the weights cannot be read: {brief(error)}"
        ) from None


def push_model(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload an exported model to the Hub repository `OWNER/NAME`, and return the repository's
    address. A missing repository is created; it is private unless `public` is set. Raises:
    ModelError if the Hub cannot be reached or rejects the upload; the local folder is kept."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repository, commit_message="Exported by reftune"
        )
    except Exception as error:  # noqa: BLE001  the Hub's HTTP client raises errors of its own
        raise ModelError(
            f"{repository}: cannot be pushed: {brief(error)}; the model stays in {folder}"
            " (to log in to the Hub, run `hf auth login`)"
        ) from None
    return str(address)


# --- prompting as in training ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """The settings that a client needs to prompt the model as the evaluation did."""

    encoder: Encoder
    problem: Problem
    """An example from the data, or `MADE_UP` if the data cannot be read."""
    generation: GenerationConfig
    stored_dtype: str
    """The dtype of the saved weights."""
    dtype: str
    """The dtype in which the run computed when it evaluated the model."""
    is_quantized: bool
    """Whether the run stored the base model in 4 bits."""

    @property
    def prompt(self) -> str | Conversation:
        return self.encoder.format.prompt(self.problem)

    @property
    def sent(self) -> str | list[dict[str, str]]:
        """The prompt as a client sends it: text, or the messages of a chat."""
        if not isinstance(self.prompt, Conversation):
            return str(self.prompt)
        return [{"role": turn.role, "content": turn.content} for turn in self.prompt.turns]

    @property
    def stop(self) -> list[str]:
        return list(stop_texts(self.encoder.format))

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer's defaults encode the prompt's text as in training."""
        ids = self.encoder.prompt(self.problem)
        return ids == list(self.encoder.tokenizer.encode(self.encoder.text_of(self.prompt)))


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `--max-lora-rank` accepts."""
MADE_UP = Problem(
    id="made up", question="What is 1 + 1?", answer=Answer(kind="number", value=Fraction(2))
)
"""A problem for finding out how a format builds prompts. The model card does not show it."""


def _serving(table: dict[str, Any], stage: Path) -> Serving | None:
    """The settings for serving a stage's model, read from the recipe `table` and the stage's files.
    If a setting can no longer be read, a warning is logged and the result is None. The export then
    leaves the tokenizer and the generation config as they are."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    model = table.get("model") or {}
    trust = bool(model.get("trust_remote_code"))
    try:
        format_: Format = load_component(table.get("format") or "nl", group="formats")
        lengths = LengthTable.model_validate(table.get("lengths") or {})
        tokenizer = AutoTokenizer.from_pretrained(stage, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(stage, trust_remote_code=trust)
        generation = GenerationConfig.from_pretrained(stage)
        problem = _example(table, stage)
        _ask_as_trained(tokenizer, format_.prompt(problem))
    except Exception as error:  # noqa: BLE001  a user's format may need fields that a problem lacks
        reason = "exported without the recipe's length limit and prompt settings"
        LOG.warning("%s: %s: %s", stage, reason, brief(error))
        return None
    generation.max_new_tokens = lengths.max_new
    stored = str(config.dtype or "float32").removeprefix("torch.")
    evaluated = model.get("dtype") or "auto"
    return Serving(
        encoder=Encoder(tokenizer, format_),
        problem=problem,
        generation=generation,
        stored_dtype=stored,
        dtype=stored if evaluated == "auto" else evaluated,
        is_quantized=model.get("quantize") is not None,
    )


def _example(table: dict[str, Any], stage: Path) -> Problem:
    """A problem from the dataset of the recipe `table`. If the data can no longer be read, a
    warning is logged, and the result is the made-up problem `MADE_UP`."""
    try:
        splits = load_splits(parse_recipe(table))
    except (ReftuneError, OSError, ValueError) as error:
        reason = "the model card shows no prompt, because the data cannot be read"
        LOG.warning("%s: %s: %s", stage, reason, brief(error))
        return MADE_UP
    return next(iter((*splits.dev, *splits.train)))


def _ask_as_trained(tokenizer: PreTrainedTokenizerBase, prompt: str | Conversation) -> None:
    """Change the tokenizer's defaults so that it encodes prompts as in training. From then on, it
    adds no end token after a text, and no BOS before a `BareText` (a prompt without special
    tokens). For a chat, it uses the recipe's template arguments unless a client overrides them."""
    if isinstance(prompt, Conversation):
        defaults = "".join(
            f"{{%- if {name} is not defined -%}}{{%- set {name} = {value!r} -%}}{{%- endif -%}}"
            for name, value in prompt.template_args.items()
        )
        own = tokenizer.chat_template
        tokenizer.chat_template = (
            {name: defaults + template for name, template in own.items()}
            if isinstance(own, dict)
            else defaults + own
        )
        return
    bos = [] if isinstance(prompt, BareText) else bos_of(tokenizer)
    if list(tokenizer.encode("a")) != [*bos, *tokenizer.encode("a", add_special_tokens=False)]:
        # setting these rewrites the post-processor, whatever tokens it added before
        tokenizer.add_bos_token, tokenizer.add_eos_token = bool(bos), False


# --- the card -------------------------------------------------------------------------------------


def model_card(
    run: RunFolder, method: str, serving: Serving | None, lora: LoraConfig | None
) -> str:
    """The model card, written from the run's files. `lora` is the configuration of the exported
    adapters, or None if the whole model is exported."""
    recipe, stage = run.recipe.read_text(encoding="utf-8"), run.stage(method).facts()
    table = yaml.safe_load(recipe)
    path = (table.get("model") or {}).get("path") if lora is None else lora.base_model_name_or_path
    chosen = f", chosen as the best of {counted(stage['looks'], 'dev evaluation')}"
    choice = "" if stage.get("snapshot_of") else chosen
    split, score = evaluated_split(table), _score(run, method)
    is_told = split == "dev" and score is not None
    name = f"{table['name']}-{method}"
    dev = counted(stage["dev_n"], "dev problem")
    on_dev = f" The model solves\n{stage['dev_accuracy']:.1%} of {dev}."
    head = {
        "library_name": "transformers" if lora is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["reftune", "reasoning"],
        **({"base_model": path} if path else {}),
    }
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# {table["name"]}: {method}

This model was made with reftune, which implements [ReFT](https://arxiv.org/abs/2401.08967), in a
stage of kind `{stage["kind"]}` that started from `{stage["init"]}`. It was trained on
{_data(table)}.
{_accuracy(score, split)}
The weights are those of step {stage["chosen_step"]}{choice}.{"" if is_told else on_dev}

The model was trained on one prompt format, and its solutions were graded by their final answers
only. Their reasoning was not checked. Programs that the model writes are untrusted: run them in a
sandbox.{_contents(lora, table.get("model") or {})}
{"" if serving is None else _usage(serving, name, lora)}
## Recipe

{_fenced(recipe.strip(), "yaml")}
"""


def _contents(lora: LoraConfig | None, model: Mapping[str, Any]) -> str:
    if lora is None:
        return " `value_head/`, if present, holds a value head, which generation does not need."
    bits = " in 4 bits (NF4)" if model.get("quantize") is not None else ""
    base = f"`{lora.base_model_name_or_path}`"
    if lora.revision:
        base += f" at revision `{lora.revision}`"
    return f" This folder contains only adapters, for the base model{bits}, {base}."


def _data(recipe: dict[str, Any]) -> str:
    dataset = recipe.get("dataset") or {}
    source = dataset.get("train")
    if isinstance(source, str):
        return f"`{source}` (`{dataset['kind']}`)"
    return f"the dataset `{dataset.get('kind')}`"


def _score(run: RunFolder, method: str) -> dict[str, Any] | None:
    """The method's row in the summary, or None if its final evaluation is not done."""
    if run.summary.is_file():
        summary = json.loads(run.summary.read_text(encoding="utf-8"))
    else:  # other methods are not evaluated yet
        summary = summarize(*read_groups([run.path], finished=False))
    found: dict[str, Any] | None = summary["methods"].get(method)
    return found


def _accuracy(score: Mapping[str, Any] | None, split: str) -> str:
    if score is None:
        return "Its final evaluation is not done."
    low, high = score["ci95"]
    return (
        f"Its greedy accuracy on {counted(score['n'], f'{split} problem')} is"
        f" {score['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%})."
    )


def _usage(serving: Serving, name: str, lora: LoraConfig | None) -> str:
    ends = token_ids_of(serving.generation.eos_token_id)
    stops = [f"`{serving.encoder.tokenizer.decode([id_])}` (id {id_})" for id_ in ends]
    stops += [f"the string {text!r}, which is not part of the answer" for text in serving.stop]
    model = "weights are" if lora is None else "adapters, merged into the base, were"
    were = "were " if lora is None else ""
    example = calls = ""
    if serving.problem != MADE_UP:
        bos = "" if serving.adds_special_tokens else ", with no special token before it"
        text = serving.encoder.text_of(serving.prompt)
        example = f"""
The exact prompt for one problem{bos}:

{_fenced(text, "text")}

As a Python string, the end of this prompt is `` {text[-24:]!r} ``.
"""
        calls = f"""
Run the following in this folder:

{_shell(serving, name, lora)}
{_fenced(_python(serving, lora), "python")}
"""
    return f"""
## Use
{example}
A completion ends at {" or ".join(stops)}. In training, completions had at most
{serving.generation.max_new_tokens} tokens.
The {model} stored in {serving.stored_dtype} and {were}evaluated in {serving.dtype}.
{calls}"""


def _shell(serving: Serving, name: str, lora: LoraConfig | None) -> str:
    """Shell commands that start vLLM and send it a request. Empty for adapters of a 4-bit base,
    because these are untested with vLLM."""
    if lora is not None and serving.is_quantized:
        return ""
    serve = f"vllm serve . --served-model-name {name}"
    if lora is not None:  # with the run's tokenizer and end tokens, not the base's
        rank = min((rank for rank in VLLM_RANKS if rank >= lora.r), default=lora.r)
        base = lora.base_model_name_or_path
        at = f" --revision {lora.revision}" if lora.revision else ""
        serve = (
            f"vllm serve {base}{at} --tokenizer . --generation-config . \\\n"
            f"  --enable-lora --lora-modules {name}=. --max-lora-rank {rank}"
        )
    address = "http://localhost:8000/v1"
    path = "completions" if isinstance(serving.sent, str) else "chat/completions"
    body = json.dumps(request_body(serving, name), indent=2, ensure_ascii=False)
    commands = (
        f"{serve} --dtype {serving.dtype} &\n"
        f"curl {address}/{path} -H 'Content-Type: application/json' -d @- <<'JSON'\n{body}\nJSON"
    )
    return f"{_fenced(commands, 'bash')}\n"


def request_body(serving: Serving, name: str) -> dict[str, Any]:
    """The body of an OpenAI-compatible request that prompts the model as the evaluation did."""
    prompt = serving.prompt
    limit = serving.generation.max_new_tokens
    body: dict[str, Any] = {"model": name, "temperature": 0, "max_tokens": limit}
    if serving.stop:
        body["stop"] = serving.stop
    if not isinstance(prompt, Conversation):
        special = {} if serving.adds_special_tokens else {"add_special_tokens": False}
        return {**body, "prompt": serving.sent, **special}
    if prompt.template_args:
        body["chat_template_kwargs"] = dict(prompt.template_args)
    return {**body, "messages": serving.sent}


def _python(serving: Serving, lora: LoraConfig | None) -> str:
    options = ", return_full_text=False"
    if isinstance(serving.sent, str) and not serving.adds_special_tokens:
        options += ", add_special_tokens=False"
    if serving.stop:  # a generation config with stop strings would fail without a tokenizer
        options += f", stop_strings={serving.stop!r}, tokenizer=generate.tokenizer"
    names, lines, load = ["pipeline"], [], f', dtype="{serving.dtype}"'
    if lora is not None and serving.is_quantized:
        names.append("BitsAndBytesConfig")
        lines.append('bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")')
        load += ', model_kwargs={"quantization_config": bits}'
    if lora is not None:  # by default, a pipeline uses the base's tokenizer and generation config
        names.append("GenerationConfig")
        at = f', revision="{lora.revision}"' if lora.revision else ""
        load = f', tokenizer="."{at}{load}'
    lines.append(f'generate = pipeline("text-generation", "."{load})')
    if lora is not None:
        lines.append('generate.model.generation_config = GenerationConfig.from_pretrained(".")')
    lines += [
        f"prompt = {serving.sent!r}",
        f'print(generate(prompt{options})[0]["generated_text"])',
    ]
    return "\n".join([f"from transformers import {', '.join(sorted(names))}", "", *lines])


def _fenced(text: str, language: str) -> str:
    """`text` as a code block, with a fence that `text` does not contain."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.removesuffix(chr(10))}\n{fence}"
