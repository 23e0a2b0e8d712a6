"""The words of a command line that start what a plan chose.

Invariant: parsed again they make the options they were made of, as far as a plan sees them.
"""

from llama_lib.config import Options


def flags(options: Options, world_size: int) -> list[str]:
    """The words of a command line that say what a plan chose."""
    parallel, training = options.parallel, options.training
    words = ["-p", parallel.plugin]
    for name in ("tp", "pp"):
        if getattr(parallel, name) > 1:
            words += [f"--{name}", str(getattr(parallel, name))]
    if parallel.sp_mode is not None:
        words += ["--sp", str(parallel.sp), "--sp_mode", parallel.sp_mode]
    if parallel.pp_style != "1f1b":
        words += ["--pp_style", parallel.pp_style]
        words += ["--num_model_chunks", str(parallel.num_model_chunks)]
    if parallel.zero_stage is not None:
        words += ["--zero_stage", str(parallel.zero_stage)]
    words += ["-b", str(training.batch_size)]
    if parallel.microbatch_size is not None:
        words += ["--microbatch_size", str(parallel.microbatch_size)]
    if training.global_batch_tokens is not None:
        words += ["--global_batch_tokens", str(training.global_batch_tokens)]
    elif training.accumulation_steps > 1:
        words += ["--accumulation_steps", str(training.accumulation_steps)]
    words += ["-l", str(options.model.max_length), "-x", training.mixed_precision]
    if options.recompute == "full":
        words.append("-g")
    elif options.recompute != "none":
        words += ["--recompute", options.recompute]
    if not options.model.chunked_loss:
        words.append("--no-chunked_loss")
    for name in ("offload_optim_frac", "offload_param_frac"):
        if getattr(parallel, name):
            words += [f"--{name}", str(getattr(parallel, name))]
    return words


def launch_command(
    options: Options, world_size: int, gpus_per_host: int, before: list[str], after: list[str]
) -> str:
    """How to start a plan: alone, on one host, or on several by a host file.

    Args:
        before, after: words of the script's command line before and after what the plan chose.
    """
    if world_size == 1:
        start = ["python"]
    elif world_size <= gpus_per_host:
        start = ["torchrun", "--standalone", "--nproc_per_node", str(world_size)]
    else:
        start = ["colossalai", "run", "--nproc_per_node", str(gpus_per_host)]
        start += ["--hostfile", "YOUR_HOST_FILE"]
    return " ".join([*start, f"{options.script}.py", *before, *flags(options, world_size), *after])
