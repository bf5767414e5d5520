"""Methods added to vLLM's worker processes. They import this by name; nothing else does."""

from __future__ import annotations

from typing import Any


class Repacking:
    """A worker extension (`worker_extension_cls`)."""

    model_runner: Any

    def repack(self) -> None:
        """Repack the weights that a CPU multiplies by: a reload forgets an output head that is
        tied to the embedding.

        Layers that vLLM packs again by itself hold no weight any more; on a GPU nothing is packed.
        """
        for module in self.model_runner.get_model().modules():
            if "cpu_linear" in vars(module) and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)
