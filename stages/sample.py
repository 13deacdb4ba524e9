"""Write text with the trained model, measure the copied share, and make a web page that writes such text.

python -m stages.sample        models/gpt, data/prepared, results/{train,evaluate}
                               -> results/sample/{samples.txt,memorized.csv,metrics.json,page.html}
"""

from __future__ import annotations

import os

from minigpt import errors, params, program
from minigpt.files import MODEL, PREPARED, RESULTS, atomic_directory, check_replaceable, write_csv, write_json
from minigpt.runtime import cpu
from minigpt.tracking.sender import start_sender


def main() -> None:
    """Run the stage."""
    settings = params.load()
    check_replaceable(RESULTS / "sample")  # before the work
    sender = start_sender()  # imports MLflow meanwhile
    cpu.configure_cpu(spin=True)  # before torch is imported
    from minigpt.data.checks import check_prompts
    from minigpt.data.dataset import load_corpus
    from minigpt.evaluation import memorization
    from minigpt.generation.generator import Generator
    from minigpt.page.facts import PageModel, build_page
    from minigpt.runtime.device import choose_device
    from minigpt.summary import summarize
    from minigpt.tracking.run import tracker_of_model

    tracker = tracker_of_model(RESULTS / "train" / "run.json", sender)
    sampling, device = settings.sample, choose_device(settings.train.device)
    characters = len(sampling.prompts) * sampling.max_new_tokens
    generator = Generator.load(MODEL, device, sampling.dtype, compile=sampling.compile, characters=characters)
    prompts = check_prompts(sampling.prompts, generator.tokenizer)  # before anything is written

    sections, pairs = [], []
    for name, prompt in prompts.items():
        for number, text in enumerate(generator.generate(prompt, sampling, sampling.num_samples, name), 1):
            sections.append(f"===== prompt {prompt!r}, sample {number} =====\n{text}\n")
            pairs.append((prompt, text))
    corpus = load_corpus(PREPARED)
    rows, metrics = memorization.compare(pairs, corpus)

    samples = RESULTS / "sample" / "samples.txt"
    with atomic_directory(samples.parent) as folder:
        (folder / samples.name).write_text("\n".join(sections), encoding="utf-8")
        write_csv(folder / "memorized.csv", rows)
        write_json(folder / "metrics.json", metrics)
        try:
            build_page([PageModel.load(MODEL)], folder / "page.html", sampling=sampling, corpus=corpus)
        except errors.UserError as error:  # the model is too large
            print(f"minigpt: no page: {error}")
    texts = "1 text" if len(sections) == 1 else f"{len(sections)} texts"
    print(f"minigpt: {texts} of at most {sampling.max_new_tokens:,} characters in {samples}")
    print(f"minigpt: longest run copied from the training text: {metrics['memorized']['longest_run']} characters")
    tracker.journal.artifact(samples.parent)
    tracker.note(RESULTS, "train", "evaluate", "sample")
    tracker.stage("sample", params.flatten(sampling, "sample."), params.flatten(metrics))
    if os.environ.get("MINIGPT_SUMMARY") != "off":  # `make` shows it after the stages, also if none had to run
        print(summarize(MODEL, RESULTS, next_steps=False))


if __name__ == "__main__":
    program.run(main)
