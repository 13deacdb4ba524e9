"""Train a GPT on the prepared tokens, tracked as one MLflow run.

    python -m stages.train        data/prepared -> models/gpt, results/train/{history.csv,metrics.json,run.json}
    torchrun --nproc-per-node 2 -m stages.train

With train.processes above 1, the first is the second with that many processes. Killed at any moment, it goes on from
its last checkpoint when it is run again.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

from minigpt import errors, params
from minigpt.files import atomic_directory, write_csv, write_json
from minigpt.runtime import cpu, launcher
from stages import MODEL, PREPARED, RESULTS


def main() -> None:
    """Run the stage."""
    settings = params.load()
    if launcher.launch("stages.train", settings.train.processes):
        return
    cpu.configure_cpu()
    from minigpt import export
    from minigpt.data import dataset
    from minigpt.evaluation import charts
    from minigpt.files import workspace
    from minigpt.runtime.distributed import join_process_group
    from minigpt.tracking.run import Tracker
    from minigpt.training import checkpoint
    from minigpt.training.trainer import Trainer

    with join_process_group(settings.train.device, settings.train.grad_accum, settings.train.parallel) as job:
        text = dataset.load_corpus(PREPARED, job.device)
        dataset.check_context(text, settings.model.block_size)
        checkpoints = checkpoint.Checkpoints(workspace(), checkpoint.fingerprint(settings, text.digest))
        with checkpoints.locked() if job.is_main else nullcontext():
            tracker = Tracker(checkpoints.run_key()) if job.is_main else None
            trainer = Trainer(settings, text, job, tracker, checkpoints)
            if tracker is None:
                trainer.run()
                return
            tracker.begin(settings, text.digest, {"train": len(text.train), "val": len(text.val)}, job.device)
            print(f"minigpt: {trainer.describe()}; run {tracker.journal.key[:8]} goes to {tracker.display_uri}")
            try:
                outcome = trainer.run()
            except BaseException as error:
                status = "KILLED" if isinstance(error, errors.Interrupted) else "FAILED"
                tracker.end(status, trainer.state.resumed_at)
                raise

            export.export(MODEL, settings.model, outcome.weights, text.tokenizer)
            with atomic_directory(RESULTS / "train") as folder:
                write_csv(folder / "history.csv", outcome.history)
                write_json(folder / "metrics.json", outcome.metrics)
                write_json(folder / "run.json", {"run": tracker.journal.key})

            tracker.metrics(int(outcome.metrics["steps"]), {f"train.{k}": v for k, v in outcome.metrics.items()})
            tracker.journal.artifact(RESULTS / "train" / "history.csv", "train")
            with tempfile.TemporaryDirectory() as temporary:
                chart, packaged = Path(temporary) / "loss.png", Path(temporary) / "model"
                tracker.attempt("loss chart", lambda: charts.loss_chart(outcome.history, settings.data.source, chart))
                tracker.attempt("packaged model", lambda: package(packaged))
                for made, shown_in in ((chart, "train"), (packaged, "")):
                    if made.exists():
                        tracker.journal.artifact(made, shown_in)
            tracker.journal.tags({"throughput": f"{outcome.metrics['chars_per_second']:,} characters/s"})
            tracker.end("FINISHED", trainer.state.resumed_at)
            checkpoints.remove()


def package(target: Path) -> None:
    """The model as an MLflow model; mlflow need not be there to train."""
    from minigpt.generation import serving

    serving.package(MODEL, target)


if __name__ == "__main__":
    errors.run(main)
