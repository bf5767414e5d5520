"""Defines the class whose methods vLLM adds to its workers. Only vLLM's worker processes import
this module."""

from __future__ import annotations

from typing import Any


class Repacking:
    """An extension of vLLM's workers, which the engine passes to vLLM as `worker_extension_cls`."""

    model_runner: Any

    def repack(self) -> None:
        """Convert weights to vLLM's layout for matmuls on a CPU. After a reload, some layers, such
        as an output head that is tied to the embedding, lack this layout.

        Layers that vLLM has already converted have an empty `weight` and are skipped. On a GPU,
        nothing is converted.
        """
        for module in self.model_runner.get_model().modules():
            if "cpu_linear" in vars(module) and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)
