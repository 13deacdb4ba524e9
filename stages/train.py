"""Train a GPT on the prepared tokens, as one MLflow run.

python -m stages.train        data/prepared
                              -> models/gpt, results/train/{history,batches,samples,metrics}.csv, {metrics,run}.json

torchrun --nproc-per-node 2 -m stages.train

If train.processes > 1, the first command starts that number of processes. A training that was killed resumes from its
last checkpoint when the same command runs again.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt import errors, params, program
from minigpt.files import (
    MODEL,
    PREPARED,
    RESULTS,
    atomic_directory,
    check_replaceable,
    workspace,
    write_csv,
    write_json,
)
from minigpt.runtime import cpu, launcher
from minigpt.tracking.sender import start_sender

if TYPE_CHECKING:
    import torch

    from minigpt.tracking.run import Tracker
    from minigpt.training.trainer import Trainer, TrainResult


def main() -> None:
    """Run the stage."""
    settings = params.load()
    check_replaceable(MODEL, RESULTS / "train")  # before the work
    if launcher.launch("stages.train", settings.train.processes):
        return
    sender = start_sender() if errors.environment_integer("RANK", 0) == 0 else None  # imports MLflow meanwhile
    cpu.configure_cpu()  # before torch is imported
    from minigpt import export
    from minigpt.data.checks import check_corpus
    from minigpt.data.dataset import load_corpus
    from minigpt.runtime.distributed import join_process_group
    from minigpt.tracking.run import Tracker
    from minigpt.training.checkpoint import Checkpoints, fingerprint
    from minigpt.training.control import ignore_signals, interruptible
    from minigpt.training.trainer import Trainer

    with join_process_group(settings.train.device, settings.train.grad_accum, settings.train.parallel) as group:
        corpus = load_corpus(PREPARED, group.device)
        check_corpus(settings, corpus.tokenizer, len(corpus.train))
        if group.is_main and settings.sample.compile == "always":
            check_decoder(group.device)
        checkpoints = Checkpoints(workspace(), fingerprint(settings, corpus.digest))
        with checkpoints.locked() if group.is_main else nullcontext():
            with interruptible():
                history = RESULTS / "train" / "history.csv"
                tracker = Tracker(checkpoints.run_key(), history, sender) if group.is_main else None
                trainer = Trainer(settings, corpus, group, tracker, checkpoints)
                if tracker is None:
                    trainer.run()
                    return
                try:
                    begin(tracker, trainer, settings)
                    result = trainer.run()
                    export.export(MODEL, settings.model, result.weights, corpus.tokenizer)
                    write_results(result, tracker, settings.data.source)
                    record(result, tracker)
                    tracker.end("FINISHED", trainer.state.resumed_at)
                except BaseException as error:
                    status = "KILLED" if isinstance(error, errors.Interrupted) else "FAILED"
                    tracker.end(status, trainer.state.resumed_at)
                    raise
            # Without its checkpoints, an interrupted stage would begin again at step 0.
            ignore_signals()
            checkpoints.remove()


def begin(tracker: Tracker, trainer: Trainer, settings: params.Params) -> None:
    """Record the start of a training, and print its model and the store of its run."""
    from minigpt.training.initial import weights_digest

    corpus = trainer.corpus
    sizes = {"train": len(corpus.train), "val": len(corpus.val)} | ({"test": corpus.n_test} if corpus.n_test else {})
    tracker.begin(settings, corpus.digest, sizes, trainer.group.device)
    if settings.train.init_from:
        tracker.journal.tags({"init_from": weights_digest(Path(settings.train.init_from))})
    run = f"run {tracker.journal.key[:8]} goes to {tracker.display_uri}"
    print(f"minigpt: {trainer.describe()}\nminigpt: {run}")


def write_results(result: TrainResult, tracker: Tracker, source: str) -> None:
    """Write history, samples and metrics, and run.json, which names the run for the later stages."""
    with atomic_directory(RESULTS / "train") as folder:
        write_csv(folder / "history.csv", result.history)
        write_csv(folder / "batches.csv", result.batches)
        if result.samples:
            write_csv(folder / "samples.csv", result.samples)
        write_json(folder / "metrics.json", result.metrics)
        write_csv(folder / "metrics.csv", tracker.curves())
        write_json(folder / "run.json", tracker.describe() | {"source": source})


def check_decoder(device: torch.device) -> None:
    """Compile the decoder that the stage sample requires; raise a UserError if that fails."""
    from minigpt.generation.compiler import NotCompiledError, build_library

    try:
        if device.type != "cpu":
            raise NotCompiledError("it runs on a CPU only")
        build_library()
    except NotCompiledError as error:
        problem = f"sample.compile: no compiled decoder: {error}"
        raise errors.UserError(f"params.yaml: {problem}; set it to auto or never") from None


def record(result: TrainResult, tracker: Tracker) -> None:
    """Record the metrics and the packaged model in the MLflow run."""
    from minigpt.generation.package import package

    metrics = result.metrics
    tracker.results("train", metrics)
    tracker.journal.params({"parameters": metrics["parameters"]})
    tracker.journal.artifact(RESULTS / "train" / "history.csv", "train")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        tracker.attempt("packaged model", lambda: tracker.model(package(MODEL, folder)))
    tracker.note(RESULTS, "train")
    tracker.journal.tags({"throughput": f"{metrics['chars_per_second']:,} characters/s"})


if __name__ == "__main__":
    program.run(main)
