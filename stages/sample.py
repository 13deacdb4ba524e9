"""Write text with the trained model.

python -m stages.sample        models/gpt, data/prepared -> results/sample/{samples.txt,memorization.csv,metrics.json}
"""

from __future__ import annotations

from minigpt import errors, params
from minigpt.files import atomic_directory, write_csv, write_json
from minigpt.runtime import cpu
from stages import MODEL, PREPARED, RESULTS


def main() -> None:
    """Run the stage."""
    settings = params.load()
    cpu.configure_cpu(spin=True)
    from minigpt.data import dataset
    from minigpt.evaluation import memorization
    from minigpt.generation.generator import Generator
    from minigpt.generation.sampling import SamplingParams
    from minigpt.runtime.device import choose_device
    from minigpt.tracking.run import tracker_of_model

    tracker = tracker_of_model(RESULTS / "train" / "run.json")
    sample, device = settings.sample, choose_device(settings.train.device)
    characters = len(sample.prompts) * sample.max_new_tokens
    generator = Generator.load(MODEL, device, sample.dtype, compiled=sample.compile, characters=characters)
    names = [f"params.yaml: sample.prompts[{number}]" for number in range(len(sample.prompts))]
    for prompt, name in zip(sample.prompts, names, strict=True):
        generator.tokenizer.encode(prompt, name)

    sampling = SamplingParams(**sample.model_dump(include=set(SamplingParams.__dataclass_fields__)))
    sections, pairs = [], []
    for prompt, name in zip(sample.prompts, names, strict=True):
        texts = generator.generate(prompt, sample.max_new_tokens, sampling, sample.num_samples, name)
        for number, text in enumerate(texts, 1):
            sections.append(f"===== prompt {prompt!r}, sample {number} =====\n{text}\n")
            pairs.append((prompt, text))
    rows, metrics = memorization.compare(pairs, dataset.load_corpus(PREPARED))

    written = RESULTS / "sample" / "samples.txt"
    with atomic_directory(written.parent) as folder:
        (folder / written.name).write_text("\n".join(sections), encoding="utf-8")
        write_csv(folder / "memorised.csv", rows)
        write_json(folder / "metrics.json", metrics)
    print(f"minigpt: {len(sections)} texts of at most {sample.max_new_tokens:,} characters in {written}")
    print(f"minigpt: longest run copied from the training text: {metrics['memorised']['longest_run']} characters")
    tracker.journal.artifact(written.parent)
    tracker.stage("sample", params.flatten(sample, "sample."), params.flatten(metrics))


if __name__ == "__main__":
    errors.run(main)
