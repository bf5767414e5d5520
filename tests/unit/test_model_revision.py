"""A model on the Hub is loaded at the revision that the recipe names."""

import pytest

from reftune.errors import ModelError
from reftune.model.weights import load_model
from reftune.recipe import ModelTable


@pytest.mark.parametrize(("told", "asked"), [("v1.2", "v1.2"), (None, "main")])
def test_the_revision_is_asked_for(monkeypatch: pytest.MonkeyPatch, told, asked):
    calls = []

    def from_pretrained(path, *, revision, **_):
        calls.append((path, revision))
        raise OSError("not here")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="owner/name: cannot be loaded"):
        load_model(ModelTable(path="owner/name", revision=told))
    assert calls == [("owner/name", asked)]
