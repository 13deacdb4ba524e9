"""Train a GPT on the prepared tokens, as one MLflow run.

    python -m stages.train        data/prepared
                                  -> models/gpt, results/train/{history.csv,samples.csv,metrics.json,run.json}
    torchrun --nproc-per-node 2 -m stages.train

If train.processes > 1, the first command starts that number of processes. A training that was killed resumes from its
last checkpoint when the same command runs again.
"""

from __future__ import annotations

import io
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt import errors, params
from minigpt.files import atomic_directory, workspace, write_csv, write_json
from minigpt.runtime import cpu, launcher
from stages import MODEL, PREPARED, RESULTS

if TYPE_CHECKING:
    from minigpt.tracking.run import Tracker
    from minigpt.training.trainer import TrainResult


def main() -> None:
    """Run the stage."""
    settings = params.load()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters of a sample
    if launcher.launch("stages.train", settings.train.processes):
        return
    cpu.configure_cpu()  # before torch is imported
    from minigpt import export
    from minigpt.data.dataset import check_context, load_corpus
    from minigpt.runtime.distributed import join_process_group
    from minigpt.tracking.run import Tracker
    from minigpt.training.checkpoint import Checkpoints, fingerprint
    from minigpt.training.trainer import Trainer

    with join_process_group(settings.train.device, settings.train.grad_accum, settings.train.parallel) as group:
        corpus = load_corpus(PREPARED, group.device)
        check_context(corpus, settings.model.block_size)
        checkpoints = Checkpoints(workspace(), fingerprint(settings, corpus.digest))
        with checkpoints.locked() if group.is_main else nullcontext():
            tracker = Tracker(checkpoints.run_key()) if group.is_main else None
            trainer = Trainer(settings, corpus, group, tracker, checkpoints)
            if tracker is None:
                trainer.run()
                return
            tracker.begin(settings, corpus.digest, {"train": len(corpus.train), "val": len(corpus.val)}, group.device)
            print(f"minigpt: {trainer.describe()}; run {tracker.journal.key[:8]} is tracked in {tracker.display_uri}")
            try:
                result = trainer.run()
            except BaseException as error:
                status = "KILLED" if isinstance(error, errors.Interrupted) else "FAILED"
                tracker.end(status, trainer.state.resumed_at)
                raise
            export.export(MODEL, settings.model, result.weights, corpus.tokenizer)
            with atomic_directory(RESULTS / "train") as folder:
                write_csv(folder / "history.csv", result.history)
                if result.samples:
                    write_csv(folder / "samples.csv", result.samples)
                write_json(folder / "metrics.json", result.metrics)
                write_json(folder / "run.json", tracker.describe() | {"source": settings.data.source})
            record(result, tracker, settings.data.source)
            tracker.end("FINISHED", trainer.state.resumed_at)
            checkpoints.remove()


def record(result: TrainResult, tracker: Tracker, source: str) -> None:
    """Record the metrics, the loss chart and the packaged model in the MLflow run."""
    from minigpt.evaluation.charts import loss_chart

    metrics = result.metrics
    tracker.metrics(int(metrics["steps"]), {f"train.{name}": value for name, value in metrics.items()})
    tracker.journal.artifact(RESULTS / "train" / "history.csv", "train")
    with tempfile.TemporaryDirectory() as temporary:
        chart, packaged = Path(temporary) / "loss.png", Path(temporary) / "model"
        tracker.attempt("loss chart", lambda: loss_chart(result.history, source, chart))
        tracker.attempt("packaged model", lambda: package(packaged))
        for path, artifact_folder in ((chart, "train"), (packaged, "")):
            if path.exists():
                tracker.journal.artifact(path, artifact_folder)
    tracker.journal.tags({"throughput": f"{metrics['chars_per_second']:,} characters/s"})


def package(target: Path) -> None:
    """Package the exported model as an MLflow model."""
    from minigpt.generation import serving  # imports mlflow; without it, only this fails

    serving.package(MODEL, target)


if __name__ == "__main__":
    errors.run(main)
