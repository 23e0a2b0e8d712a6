"""From tokens per second to TFLOPS by name and to the share of a card's peak.

Invariant: what is computed here is fixed when a run begins; a step costs nothing but divisions.
"""

from typing import Any

from llama_lib import flops
from llama_lib.config import Options
from llama_lib.result_file import Peak


class Throughput:
    """The rates of one job.

    Args:
        config: the model's transformers config.
        num_gpus: processes of the run, each with a GPU if there are any.
        device_name: torch.cuda.get_device_name, or cpu.
        num_adapter: parameters of all adapters, 0 if the whole model is trained.

    Attributes:
        flops_per_token: by name of the formula; the model's own alone under adapters, since no
            other formula of flops.py knows them.
        peak: of one GPU, as given or from the table of known cards.
    """

    def __init__(
        self,
        options: Options,
        config: Any,
        sequence: int,
        num_gpus: int,
        device_name: str,
        num_adapter: int = 0,
    ) -> None:
        self.num_gpus, self.device_name = num_gpus, device_name
        self.flops_per_token = _flops_per_token(options, config, sequence, num_adapter)
        self.peak = _peak(options, device_name)

    def tflops_per_gpu(self, tokens_per_second: float) -> dict[str, float]:
        """1e12 FLOPs per second and GPU by formula; `tokens_per_second` is that of all GPUs."""
        return {
            name: flops.tflops_per_gpu(value, tokens_per_second, self.num_gpus)
            for name, value in self.flops_per_token.items()
        }

    def mfu(self, model_tflops: float) -> float | None:
        """Share of the peak; None where that is unknown."""
        return None if self.peak.tflops is None else model_tflops / self.peak.tflops


def _flops_per_token(
    options: Options, config: Any, sequence: int, num_adapter: int
) -> dict[str, float]:
    if num_adapter:
        return {"model": flops.lora_flops_per_token(config, sequence, num_adapter)}
    recompute: Any = options.recompute
    # The two legacy formulas know full recomputation or none.
    checkpointing = recompute == "full"
    return {
        "model": flops.model_flops_per_token(config, sequence),
        "causal": flops.causal_flops_per_token(config, sequence),
        "hardware": flops.hardware_flops_per_token(config, sequence, recompute),
        "colossalai_8n": flops.colossalai_8n(config, checkpointing),
        "megatron_2021": flops.megatron_2021(config, sequence, checkpointing),
    }


def _peak(options: Options, device_name: str) -> Peak:
    if options.report.peak_tflops is not None:
        return Peak(options.report.peak_tflops, "given")
    known = flops.peak_tflops(device_name, options.training.mixed_precision)
    return Peak(known, "unknown" if known is None else f"data sheet of {device_name}")
