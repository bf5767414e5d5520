"""The class whose methods vLLM adds to its workers. vLLM imports this module in the worker
processes; nothing in reftune does."""

from __future__ import annotations

from typing import Any


class Repacking:
    """The extension of vLLM's workers that the engine requests as `worker_extension_cls`."""

    model_runner: Any

    def repack(self) -> None:
        """Repack the weights for a CPU's matmuls, because a reload does not repack an output head
        that is tied to the embedding.

        Layers that vLLM itself has repacked are skipped; their `weight` is empty. On a GPU, nothing
        is repacked.
        """
        for module in self.model_runner.get_model().modules():
            if "cpu_linear" in vars(module) and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)
