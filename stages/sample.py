"""Write text with the trained model.

python -m stages.sample        models/gpt -> results/sample/samples.txt
"""

from __future__ import annotations

from minigpt import errors, params, process
from minigpt.files import replacing
from stages import MODEL, RESULTS


def main() -> None:
    """Run the stage."""
    settings = params.load()
    process.settle()
    from minigpt import ranks, tracking
    from minigpt.generator import Decoding, Generator

    tracker = tracking.of_model(RESULTS / "train" / "run.json")
    sample, device = settings.sample, ranks.choose_device(settings.train.device)
    generator = Generator.load(MODEL, device, sample.dtype)
    names = [f"params.yaml: sample.prompts[{number}]" for number in range(len(sample.prompts))]
    for prompt, name in zip(sample.prompts, names, strict=True):
        generator.tokenizer.encode(prompt, name)

    decoding = Decoding(**sample.model_dump(include=set(Decoding.__dataclass_fields__)))
    sections = []
    for prompt, name in zip(sample.prompts, names, strict=True):
        texts = generator.generate(prompt, sample.max_new_tokens, decoding, sample.num_samples, name)
        for number, text in enumerate(texts, 1):
            sections.append(f"===== prompt {prompt!r}, sample {number} =====\n{text}\n")

    written = RESULTS / "sample" / "samples.txt"
    with replacing(written.parent) as folder:
        (folder / written.name).write_text("\n".join(sections), encoding="utf-8")
    print(f"minigpt: {len(sections)} texts of at most {sample.max_new_tokens:,} characters in {written}")
    tracker.journal.artifact(written, "sample")
    tracker.stage("sample", params.flatten(sample, "sample."), {})


if __name__ == "__main__":
    errors.run(main)
